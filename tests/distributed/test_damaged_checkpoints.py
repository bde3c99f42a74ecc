"""A checkpoint that is not what was written is never resumed from, and what was complete stays so."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks

from lightning_fed import GossipStrategy
from lightning_fed.federation.manifest import damage, newest_complete_checkpoint

CLIENTS = 4


def fit(directory: Path, resume: Path | None = None, epochs: int = 2, **settings: Any) -> np.ndarray:
    pl.seed_everything(1, verbose=False)
    strategy = GossipStrategy(num_clients=CLIENTS, optimizer_state="keep")
    keep = ModelCheckpoint(directory, "{epoch}", save_top_k=-1, save_last=True, save_on_train_epoch_end=True)
    trainer = silent_trainer(strategy, max_epochs=epochs, enable_checkpointing=True, callbacks=[keep], **settings)
    trainer.fit(Classifier(momentum=0.9), *loaders(clients(CLIENTS), batch_size=16), ckpt_path=resume)
    return all_rows(strategy)


def fit_on_two_ranks(directory: Path) -> None:
    fit(directory, devices=2)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two epochs, by two ranks."""
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(2, fit_on_two_ranks, directory)
    return directory


NEWEST = ["epoch=1.ckpt", "manifest.json", "algorithm.pt", "clients-00000-00001.pt", "clients-00002-00003.pt"]


@pytest.mark.parametrize("spoil", [cut, flip, delete])
@pytest.mark.parametrize("name", NEWEST)
def test_damage_to_any_file_is_named_and_the_previous_checkpoint_offered(
    name: str, spoil: Callable[[Path], None], saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    for last in [*folder.glob("last*")]:
        shutil.rmtree(last) if last.is_dir() else last.unlink()
    (path,) = [*folder.glob(f"epoch=1.federation-*/{name}"), *folder.glob(name)]
    spoil(path)
    contents = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="is damaged") as refusal:
        fit(folder, folder / "epoch=1.ckpt", epochs=3)
    assert name in str(refusal.value) and str(folder / "epoch=0.ckpt") in str(refusal.value)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == contents
    assert newest_complete_checkpoint(folder) == folder / "epoch=0.ckpt"


def test_a_file_that_does_not_belong_is_damage_too(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    assert damage(tmp_path / "epoch=1.ckpt") == []
    (directory,) = tmp_path.glob("epoch=1.federation-*")
    (directory / "more.pt").write_bytes(b"")
    assert damage(tmp_path / "epoch=1.ckpt") == [f"{directory.name}/more.pt is not in its manifest"]


def test_last_is_the_newest_complete_one(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    whole = fit(tmp_path / "whole", epochs=3)
    cut(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="last.ckpt.* is damaged .*epoch=1.ckpt"):
        resumed = fit(tmp_path, tmp_path / "last.ckpt", epochs=3)
    np.testing.assert_allclose(resumed, whole, rtol=0, atol=1e-6)  # two ranks, then one


def test_a_directory_from_which_nothing_is_complete(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1)
    for path in tmp_path.glob("*.ckpt"):
        flip(path)
    with pytest.raises(ValueError, match="no complete one beside it"):
        fit(tmp_path, tmp_path / "epoch=0.ckpt")
    assert newest_complete_checkpoint(tmp_path) is None


class NoRoom(pl.Callback):
    """From the second epoch on, this rank cannot write files of more than a few bytes, as on a full disk."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def fit_without_room(directory: Path, world_size: int, rank: int) -> str:
    pl.seed_everything(1, verbose=False)
    strategy = GossipStrategy(num_clients=CLIENTS)
    last = ModelCheckpoint(directory, save_last=True, save_top_k=-1, save_on_train_epoch_end=True)
    trainer = silent_trainer(
        strategy, world_size, max_epochs=2, enable_checkpointing=True, callbacks=[last, NoRoom(rank)]
    )
    try:
        trainer.fit(Classifier(), *loaders(clients(CLIENTS), batch_size=16))
    except OSError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk_ends_all_ranks_and_spoils_nothing(world_size: int, rank: int, tmp_path: Path) -> None:
    for words in run_ranks(world_size, fit_without_room, tmp_path, world_size, rank):
        assert "could not be written" in words and f"{{{rank}: " in words and "make room" in words
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    files, directories = [*tmp_path.glob("*.ckpt")], [*tmp_path.glob("*.federation-*")]
    assert len(files) == len(directories) and not any(map(damage, files))
    assert not [*tmp_path.rglob("*.writing")]

"""Nothing that the package reads can run code: a malicious file is refused, and its payload never runs."""

from __future__ import annotations

import ast
import json
import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer
from small_denoisers import unet_config

import lightning_fed
from lightning_fed import FedAvgStrategy, GossipStrategy
from lightning_fed.federation.durable_files import digest_of
from lightning_fed.federation.manifest import Manifest
from lightning_fed.modules.diffusion import load_denoiser
from lightning_fed.partition import ByAttribute
from lightning_fed.sample import load_module


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What exists after a payload has run."""
    return tmp_path / "the payload has run"


def test_the_payload_works(tmp_path: Path, mark: Path) -> None:
    torch.save(Bomb(mark), tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert mark.exists()


# ---------------------------------------------------------------------------------------------------------- checkpoints


def strategy_of() -> FedAvgStrategy:
    return FedAvgStrategy(num_clients=4, server_optimizer=torch.optim.Adam)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer = silent_trainer(strategy_of(), max_epochs=1)
    trainer.fit(Classifier(momentum=0.9), *loaders(clients(4)))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def with_bomb(content: Any, mark: Path, replaced: bool) -> Any:
    return Bomb(mark) if replaced else {**content, "more": Bomb(mark)}


def plant(file: Path, checkpoint: Path, mark: Path, replaced: bool) -> None:
    """Put a bomb into a file, or in its place, and make the manifest tell of the new bytes."""
    content = torch.load(file, weights_only=True)
    torch.save(with_bomb(content, mark, replaced), file)
    for directory in checkpoint.parent.glob("*.federation-*"):
        manifest = Manifest.read(directory)
        assert manifest is not None
        files = {name: digest_of(directory / name) for name in manifest.files}
        ordinary = digest_of(checkpoint)
        assert ordinary is not None and all(files.values())
        Manifest(ordinary, files).write(directory)  # type: ignore[arg-type]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("name", ["saved.ckpt", "saved.federation-*/clients-*.pt", "saved.federation-*/algorithm.pt"])
def test_no_file_of_a_checkpoint_is_unpickled(saved: Path, mark: Path, name: str, replaced: bool) -> None:
    (file,) = saved.parent.glob(name)
    plant(file, saved, mark, replaced)
    trainer = silent_trainer(strategy_of())
    with pytest.raises(ValueError, match=r"holds an object of .*mkdir.*add_safe_globals") as refused:
        trainer.fit(Classifier(momentum=0.9), *loaders(clients(4)), ckpt_path=str(saved))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert not mark.exists() and trainer.global_step == 0


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_asking_for_unsafe_loading_changes_nothing(saved: Path, mark: Path, stage: str) -> None:
    plant(saved, saved, mark, replaced=False)
    trainer = silent_trainer(strategy_of())
    train, val = loaders(clients(4))
    data = (train, val) if stage == "fit" else (val,)
    with pytest.raises(ValueError, match="add_safe_globals"):
        getattr(trainer, stage)(Classifier(momentum=0.9), *data, ckpt_path=str(saved), weights_only=False)
    assert not mark.exists()


def test_a_checkpoint_whose_manifest_was_not_forged_is_refused_unread(saved: Path, mark: Path) -> None:
    torch.save(Bomb(mark), saved)
    with pytest.raises(ValueError, match="is damaged"):
        silent_trainer(strategy_of()).fit(Classifier(momentum=0.9), *loaders(clients(4)), ckpt_path=str(saved))
    assert not mark.exists()


def test_a_checkpoint_that_no_federation_saved_is_not_unpickled_either(tmp_path: Path, mark: Path) -> None:
    torch.save({"state_dict": {}, "more": Bomb(mark)}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="add_safe_globals"):
        silent_trainer(strategy_of()).fit(
            Classifier(), *loaders(clients(4)), ckpt_path=str(tmp_path / "plain.ckpt"), weights_only=False
        )
    assert not mark.exists()


class Configured(Classifier):
    """With hyperparameters of a user's own."""

    def __init__(self, extra: Any, momentum: float = 0.0, lr: float = 0.1) -> None:
        super().__init__(momentum=momentum, lr=lr)
        self.save_hyperparameters()


def resumed(tmp_path: Path, extra: Any) -> pl.Trainer:
    """A run that has saved a module with such a hyperparameter, and goes on for another epoch."""
    path = str(tmp_path / "configured.ckpt")
    first = silent_trainer(GossipStrategy(num_clients=4), max_epochs=1)
    first.fit(Configured(extra), *loaders(clients(4)))
    first.save_checkpoint(path)
    second = silent_trainer(GossipStrategy(num_clients=4), max_epochs=2)
    second.fit(Configured(extra), *loaders(clients(4)), ckpt_path=path)
    return second


@pytest.mark.parametrize(
    "extra",
    [None, 0.1, "text", [1, 2], {"name": "adam", "betas": (0.9, 0.99)}, torch.ones(2), torch.float64],
    ids=str,
)
def test_plain_hyperparameters_resume(tmp_path: Path, extra: Any) -> None:
    assert resumed(tmp_path, extra).current_epoch == 2


def test_other_hyperparameters_resume_once_their_class_is_allowed(tmp_path: Path) -> None:
    extra = Namespace(name="adam")
    with pytest.raises(
        ValueError, match=r"object of argparse.Namespace, .*torch.serialization.add_safe_globals\(\[argparse"
    ):
        resumed(tmp_path, extra)
    with torch.serialization.safe_globals([Namespace]):
        assert resumed(tmp_path, extra).current_epoch == 2


# ---------------------------------------------------------------------------------------------------------- other files


def folder_of_a_network(path: Path, mark: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**unet_config(), "_diffusers_version": "0.30.0"}))
    torch.save({"conv_in.weight": Bomb(mark)}, path / "diffusion_pytorch_model.bin")


def attribute_file(path: Path, mark: Path) -> None:
    np.save(path, np.array([Bomb(mark)], dtype=object), allow_pickle=True)


def pickled_attribute_file(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(mark)))


def checkpoint_of_a_network(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Bomb(mark)}, path)


LABELS = np.zeros(4, dtype=np.int64)


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("writers.npy", attribute_file, lambda path: ByAttribute(path)(LABELS, 2, 0)),
        ("writers.npy", pickled_attribute_file, lambda path: ByAttribute(path)(LABELS, 2, 0)),
        ("network.ckpt", checkpoint_of_a_network, lambda path: load_denoiser(str(path))),
        ("network.ckpt", checkpoint_of_a_network, lambda path: load_module(str(path))),
        ("network", folder_of_a_network, lambda path: load_denoiser(str(path))),
    ],
    ids=["array of objects", "pickle as array", "checkpoint", "checkpoint to sample from", "folder"],
)
def test_no_other_file_is_unpickled(
    tmp_path: Path, mark: Path, name: str, write: Callable[[Path, Path], None], read: Callable[[Path], Any]
) -> None:
    write(tmp_path / name, mark)
    with pytest.raises(ValueError):
        read(tmp_path / name)
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------------- the sources

SOURCES = sorted(Path(lightning_fed.__file__).parent.rglob("*.py"))
# Modules that unpickle, or run what they are given, and functions of torch.distributed that unpickle what others send.
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
COLLECTIVES = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
HARMLESS = {"UnpicklingError"}  # an exception, to catch it


def unsafe_parts(source: str) -> list[str]:
    """What of a source file could unpickle something."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {name.name}" for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            from_unsafe = (node.module or "").split(".")[0] in MODULES
            names = {name.name for name in node.names}
            found += [f"import {name}" for name in names & COLLECTIVES | (names - HARMLESS if from_unsafe else set())]
        elif isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            found.append(node.attr)
        elif isinstance(node, ast.Call):
            found += unsafe_call(node)
    return found


def unsafe_call(call: ast.Call) -> list[str]:
    """A call that loads a file, and does not say that it is to be loaded safely."""
    name, settings = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in ("torch.load", "pl_load", "_load", "torch.hub.load_state_dict_from_url"):
        return [] if settings.get("weights_only") == "True" else [name]
    if name.split(".")[-1] in ("load_checkpoint", "load_from_checkpoint"):
        return [] if settings.get("weights_only") == "True" else [name]
    if name in ("np.load", "numpy.load"):
        return [] if settings.get("allow_pickle", "False") == "False" else [name]
    return [name] if name in ("eval", "exec", "torch.package.PackageImporter", "torch.jit.load") else []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_file_unpickles(path: Path) -> None:
    assert unsafe_parts(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.distributed as dist\ndist.all_gather_object(values, value)",
        "from torch.distributed import broadcast_object_list",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=weights_only)",
        "super().load_checkpoint(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_walk_over_the_sources_finds(source: str) -> None:
    assert unsafe_parts(source)


@pytest.mark.parametrize(
    "source", ["from pickle import UnpicklingError", "torch.load(path, weights_only=True)", "np.load(path)"]
)
def test_the_walk_over_the_sources_leaves_alone(source: str) -> None:
    assert not unsafe_parts(source)

"""Signals and exceptions: what can be saved is saved, exactly, and nobody waits for ranks that are gone."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from time import monotonic
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from documentation import ROOT, example, execute
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from ranks import run_ranks

from lightning_fed import GossipStrategy
from lightning_fed.federation import preemption
from lightning_fed.federation.manifest import newest_complete_checkpoint

CLIENTS, EPOCHS = 4, 3


class At(pl.Callback):
    """Does something after a joint step, on one rank (or on all: -1)."""

    def __init__(self, happening: str, round_: int, index: int, rank: int = -1) -> None:
        self.happening, self.place, self.rank = happening, (round_, index), rank

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        batch = args[2]
        if (batch.round, batch.index) == self.place and self.rank in (-1, trainer.global_rank):
            if self.happening == "raise":
                raise RuntimeError("the callback has failed")
            os.kill(os.getpid(), getattr(signal, self.happening))


class Failing(Classifier):
    """Fails in the middle of a joint step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.strategy.round == 1 and self.trainer.strategy.local_step._part.client == 2:
            raise RuntimeError("the step has failed")
        return super().training_step(batch, batch_idx)


def fit(
    directory: Path,
    world_size: int = 1,
    resume: Path | None = None,
    module: Any = Classifier,
    timeout: float = 60.0,
    **settings: Any,
) -> np.ndarray:
    pl.seed_everything(1, verbose=False)
    strategy = GossipStrategy(num_clients=CLIENTS, optimizer_state="keep", timeout=timeout)
    callbacks = [ModelCheckpoint(directory, "{step}", save_top_k=-1), *settings.pop("callbacks", [])]
    trainer = silent_trainer(
        strategy,
        world_size,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        callbacks=callbacks,
        default_root_dir=directory,
        **settings,
    )
    trainer.fit(module(momentum=0.9), *loaders(clients(CLIENTS)), ckpt_path=resume)
    return all_rows(strategy)


def outcome_of(*args: Any, **settings: Any) -> tuple[str, float]:
    """How a fit has ended, and after how many seconds."""
    start = monotonic()
    try:
        fit(*args, **settings)
    except BaseException as exception:
        return type(exception).__name__, monotonic() - start
    return "", monotonic() - start


def on_ranks(directory: Path, world_size: int, happening: str, place: tuple[int, int], rank: int) -> tuple[str, float]:
    return outcome_of(directory, world_size, callbacks=[At(happening, *place, rank)])


def test_sigterm_saves_after_the_joint_step_and_ends(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    assert outcome_of(tmp_path, callbacks=[At("SIGTERM", 1, 1)])[0] == "SIGTERMException"
    checkpoint = newest_complete_checkpoint(tmp_path)
    assert checkpoint is not None and not checkpoint.stem.endswith("step=6")
    np.testing.assert_array_equal(fit(tmp_path / "resumed", resume=checkpoint), whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_ends_all_at_the_end_of_the_round(rank: int, tmp_path: Path) -> None:
    whole = run_ranks(2, fit, tmp_path / "whole", 2)[0]
    ends = run_ranks(2, on_ranks, tmp_path, 2, "SIGTERM", (1, 1), rank)
    assert [name for name, _ in ends] == ["SIGTERMException"] * 2
    checkpoint = newest_complete_checkpoint(tmp_path)
    assert checkpoint is not None
    for resumed in run_ranks(2, fit, tmp_path / "resumed", 2, checkpoint):
        np.testing.assert_array_equal(resumed, whole)


def test_slurm_requeues_after_the_joint_step_and_finds_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole")
    calls = tmp_path / "bin/calls"
    calls.parent.mkdir()
    scontrol = calls.with_name("scontrol")
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{calls.parent}:{os.environ['PATH']}")
    slurm = {"plugins": [SLURMEnvironment(auto_requeue=True)]}
    outcome_of(tmp_path, callbacks=[At("SIGUSR1", 1, 1), At("raise", 2, 0)], **slurm)
    assert calls.read_text().split() == ["requeue", "7"]
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    requeued = {"plugins": [SLURMEnvironment(auto_requeue=True)]}
    np.testing.assert_array_equal(fit(tmp_path, **requeued), whole)  # Lightning looks for it by itself


def test_an_exception_between_steps_saves_the_federation(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    assert outcome_of(tmp_path, callbacks=[At("raise", 1, 1)])[0] == "RuntimeError"
    checkpoint = newest_complete_checkpoint(tmp_path)
    assert checkpoint is not None
    np.testing.assert_array_equal(fit(tmp_path / "resumed", resume=checkpoint), whole)


def test_an_exception_within_a_joint_step_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = fit(tmp_path / "whole")
    assert outcome_of(tmp_path, module=Failing)[0] == "RuntimeError"
    assert "RuntimeError in the middle of round 1, joint step 0" in capsys.readouterr().out
    checkpoint = newest_complete_checkpoint(tmp_path)
    assert checkpoint is not None  # that of the first epoch
    np.testing.assert_array_equal(fit(tmp_path / "resumed", resume=checkpoint), whole)


def test_ranks_that_fail_at_one_place_save_together(tmp_path: Path) -> None:
    whole = run_ranks(2, fit, tmp_path / "whole", 2)[0]
    assert [name for name, _ in run_ranks(2, on_ranks, tmp_path, 2, "raise", (1, 1), -1)] == ["RuntimeError"] * 2
    checkpoint = newest_complete_checkpoint(tmp_path)
    assert checkpoint is not None
    np.testing.assert_allclose(fit(tmp_path / "resumed", resume=checkpoint), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_saves_nothing_and_nobody_hangs(rank: int, tmp_path: Path) -> None:
    ends = run_ranks(2, on_ranks, tmp_path, 2, "raise", (1, 1), rank)
    assert ends[rank][0] == "RuntimeError" and ends[1 - rank][0]
    assert all(seconds < 60 for _, seconds in ends)
    assert [path.stem for path in tmp_path.glob("*.ckpt")] == [newest_complete_checkpoint(tmp_path).stem]  # type: ignore[union-attr]


def fit_beside_a_stopped_rank(directory: Path) -> None:
    with pytest.MonkeyPatch.context() as soon:
        soon.setattr(preemption, "SECONDS_TO_MEET", 0.5)
        fit(directory, 2, timeout=2.0, callbacks=[At("SIGSTOP", 1, 3, rank=0)])


def test_a_rank_gives_up_when_the_one_that_has_the_store_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*Timed out waiting 2000ms"):
        run_ranks(2, fit_beside_a_stopped_rank, tmp_path, timeout=30.0)


def test_the_documented_script_resumes_where_it_was_stopped(in_tmp_path: Path) -> None:
    page = ROOT / "docs" / "resuming.md"
    train, val = loaders(clients(8))

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return train

        def val_dataloader(self) -> Any:
            return val

    class Stopping(Classifier):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        execute(page, example(page, "resume"), module=Stopping(), data=Data())
    resumed = execute(page, example(page, "resume"), module=Classifier(), data=Data())["strategy"]
    assert resumed.round == 4

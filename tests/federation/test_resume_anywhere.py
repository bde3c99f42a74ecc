"""Stop after any joint step, resume, and end where the uninterrupted run ends: to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from lightning_fed import (
    DFedSAMStrategy,
    EControlStrategy,
    FedAvgStrategy,
    GaussianNoise,
    GossipStrategy,
    MoDeSTStrategy,
    TrimmedMean,
    UserLevelPrivacy,
)
from lightning_fed.callbacks import FederationMonitor, Grokfast, SharpnessAware
from lightning_fed.compression import LowRank, RandK, TopK
from lightning_fed.federation.virtual_clock import LogNormal, VirtualClock

CLIENTS = 5


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


STRATEGIES: dict[str, Any] = {
    "fedavg": lambda **s: FedAvgStrategy(cohort_size=3, **s),
    "fedprox": lambda **s: FedAvgStrategy(mu=0.1, optimizer_state="keep", **s),
    "fedadam": lambda **s: FedAvgStrategy(server_optimizer=adam, **s),
    "gossip": lambda **s: GossipStrategy(optimizer_state="keep", **s),
    "in waves": lambda **s: GossipStrategy(optimizer_state="keep", clients_per_step=3, **s),
    "gossip, rare": lambda **s: GossipStrategy(local_steps=2, rounds_per_epoch=2, topology="one-peer-exponential", **s),
    "choco": lambda **s: GossipStrategy(method="choco", gamma=0.4, compressor=TopK(0.3), **s),
    "low rank": lambda **s: GossipStrategy(method="choco", gamma=0.4, compressor=LowRank(1), **s),
    "dsgt": lambda **s: GossipStrategy(method="tracking", local_steps=1, rounds_per_epoch="pass", **s),
    "beer": lambda **s: GossipStrategy(
        method="beer", compressor=RandK(0.3), local_steps=1, rounds_per_epoch="pass", **s
    ),
    "dfedsam": lambda **s: DFedSAMStrategy(rho=0.05, **s),
    "econtrol": lambda **s: EControlStrategy(TopK(0.3), **s),
    "modest": lambda **s: MoDeSTStrategy(sample_size=3, num_aggregators=2, **s),
    "drops": lambda **s: GossipStrategy(on_nonfinite="drop", evaluate="both", **s),
    "clipped": lambda **s: GossipStrategy(max_update_norm=0.05, **s),
    "attacked": lambda **s: GossipStrategy(
        robust=TrimmedMean(1), attack=GaussianNoise([2], 1.0), topology="complete", **s
    ),
    "private": lambda **s: FedAvgStrategy(
        cohort_size=3, weighting="uniform", privacy=UserLevelPrivacy(0.1, 1.0, 0.1, secret_seed=1), **s
    ),
    "timed": lambda **s: GossipStrategy(clock=VirtualClock(LogNormal(1.0, 0.5)), float_buffers="local", **s),
}


TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "sharpness-aware": {"callbacks": [SharpnessAware]},
    "grokfast": {"callbacks": [Grokfast]},
}


class Quiet(Classifier):
    """Without a torchmetrics object in its step, which waves refuse."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def fit(name: str, directory: Path, resume: Path | None = None, saves: bool = False, **settings: Any) -> dict[str, Any]:
    """Train, and tell where that has led; with a checkpoint after each joint step, if wanted."""
    pl.seed_everything(3 if resume is None else 99, verbose=False)  # the checkpoint knows better
    strategy = STRATEGIES[name](num_clients=CLIENTS)
    callbacks = [callback() for callback in settings.pop("callbacks", [])]
    if saves:
        callbacks.append(ModelCheckpoint(directory, "{step}", save_top_k=-1, every_n_train_steps=1))
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"max_epochs": 2, **settings}
    trainer = silent_trainer(strategy, callbacks=callbacks, enable_checkpointing=checkpoints, **settings)
    module = Quiet() if name == "in waves" else Classifier(momentum=0.9, norm=name != "private")
    trainer.fit(module, *loaders(clients(CLIENTS), batch_size=8), ckpt_path=resume)
    return {
        "model": torch.cat([value.flatten() for value in module.state_dict().values()]).numpy(),
        "bytes": strategy.exchange.total_bytes,
        "steps": (trainer.global_step, trainer.current_epoch, strategy.round),
        "time": strategy.clock and strategy.clock.now,
        "rows": all_rows(strategy),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


class Record(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    name, version = "record", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


CASES = [(name, "plain") for name in STRATEGIES] + [("gossip", name) for name in TRAINERS if name != "plain"]


@pytest.mark.parametrize(("name", "trainer"), CASES)
def test_every_joint_step_is_a_place_to_stop(name: str, trainer: str, tmp_path: Path) -> None:
    whole = fit(name, tmp_path, **TRAINERS[trainer])
    np.testing.assert_equal(fit(name, tmp_path, saves=True, **TRAINERS[trainer]), whole)
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert len(checkpoints) >= 4
    for checkpoint in checkpoints:
        resumed = fit(name, tmp_path, checkpoint, **TRAINERS[trainer])
        if checkpoint == checkpoints[-1] and len(resumed["rows"]) == 0:
            del whole["rows"]  # which only the cohort of a round has
        np.testing.assert_equal({part: resumed[part] for part in whole}, whole, checkpoint.stem)


@pytest.mark.parametrize("name", ["fedavg", "gossip, rare", "modest"])
def test_a_logger_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    def lines(resume: Path | None = None, saves: bool = False) -> list[tuple[int | None, dict[str, float]]]:
        record = Record()
        monitors = [partial(FederationMonitor, plots=False), partial(LearningRateMonitor, "step")]
        fit(name, tmp_path, resume, saves, logger=record, log_every_n_steps=1, callbacks=monitors)
        return record.lines

    whole = lines(saves=True)
    assert len({step for step, _ in whole}) >= 4 and any("fed/consensus_distance" in values for _, values in whole)
    for checkpoint in sorted(tmp_path.glob("*.ckpt")):
        step, after = int(checkpoint.stem.removeprefix("step=")), lines(checkpoint)
        np.testing.assert_equal(after, whole[len(whole) - len(after) :], checkpoint.stem)
        # Of step k, counted from 0, all that is logged at its own end is before the checkpoint of k + 1 steps.
        assert {line[0] for line in whole if line[0] is not None and line[0] >= step} <= {line[0] for line in after}


@pytest.mark.parametrize("name", ["gossip", "modest"])
def test_a_checkpoint_of_validation_resumes_with_the_end_of_its_epoch(name: str, tmp_path: Path) -> None:
    def run(directory: str, resume: Path | None = None) -> dict[str, Any]:
        save = partial(ModelCheckpoint, tmp_path / directory, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        return fit(name, tmp_path, resume, callbacks=[save])

    whole = run("whole")
    np.testing.assert_equal(run("again", tmp_path / "whole/epoch=0.ckpt"), whole)
    # Of the last epoch Lightning does not repeat what was validated.
    last, parts = run("last", tmp_path / "whole/epoch=1.ckpt"), ("model", "steps")
    np.testing.assert_equal([last[part] for part in parts], [whole[part] for part in parts])
    train = {name: value for name, value in whole["metrics"].items() if name in ("train/loss", "train/loss_epoch")}
    assert len(train) == 2 and train.items() <= last["metrics"].items()


def test_early_stopping_counts_an_epoch_whose_end_was_interrupted(tmp_path: Path) -> None:
    patient = partial(EarlyStopping, "val/loss", patience=2, min_delta=1e9)
    whole = fit("gossip", tmp_path, saves=True, callbacks=[patient], max_epochs=9)
    assert whole["steps"][1] == 3
    steps = whole["steps"][0] // 3
    for epochs in (1, 2):
        checkpoint = tmp_path / f"step={epochs * steps}.ckpt"
        resumed = fit("gossip", tmp_path, checkpoint, callbacks=[patient], max_epochs=9)
        np.testing.assert_equal(resumed, whole, checkpoint.stem)


class FailsInValidation(pl.Callback):
    """Raises in the second batch of the first epoch's validation."""

    def on_validation_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.current_epoch == 0 and not trainer.sanity_checking and arguments[2] == 1:
            raise ArithmeticError("in validation")


def test_a_run_that_fails_in_validation_validates_again(tmp_path: Path) -> None:
    save = partial(ModelCheckpoint, tmp_path, "failed", save_on_exception=True)
    whole = fit("gossip", tmp_path)
    with pytest.raises(ArithmeticError):
        fit("gossip", tmp_path, callbacks=[save, FailsInValidation])
    (failed,) = tmp_path.glob("*.ckpt")
    np.testing.assert_equal(fit("gossip", tmp_path, failed), whole)

"""Interrupt after any round and resume: the same rows, on the same and on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks

from lightning_fed import DFedSAMStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.federation.strategy import FederatedStrategy

ROUNDS = 4


class Remembering(GossipStrategy):
    """An algorithm with state of its own for each client: the sum of its rows so far."""

    def setup_algorithm(self, bank: Any, exchange: Any) -> None:
        super().setup_algorithm(bank, exchange)
        self.memory = torch.zeros_like(bank.rows.matrix)

    def mix(self, rows: torch.Tensor, exchange: Any) -> None:
        if rows.shape == self.memory.shape:
            rows += 0.01 * self.memory
            self.memory += rows
        super().mix(rows, exchange)

    def client_matrices(self) -> dict[str, torch.Tensor]:
        return {**super().client_matrices(), "memory": self.memory}


def server_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def strategy_of(name: str) -> FederatedStrategy:
    if name == "fedadam":
        return FedAvgStrategy(num_clients=6, cohort_size=3, server_optimizer=server_adam)
    if name == "remembering":
        return Remembering(num_clients=6)
    if name == "dfedsam":
        return DFedSAMStrategy(num_clients=6)
    if name == "dpsgd":
        return GossipStrategy(num_clients=6, local_steps=1, rounds_per_epoch=2, optimizer_state="keep")
    return GossipStrategy(num_clients=6, optimizer_state="keep", topology="one-peer-exponential")


def fit(
    name: str, world_size: int, directory: str, resume: str | None, max_epochs: int = ROUNDS, steps: int = 0
) -> dict[str, Any]:
    """One rank's part of a run that saves every epoch, or every so many joint steps."""
    pl.seed_everything(11 if resume is None else 12345, verbose=False)  # the checkpoint knows better
    strategy = strategy_of(name)
    if steps:
        keep_all = ModelCheckpoint(directory, filename="{step}", save_top_k=-1, every_n_train_steps=steps)
    else:
        keep_all = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = silent_trainer(
        strategy, world_size, max_epochs=max_epochs, enable_checkpointing=True, callbacks=[keep_all]
    )
    module = Classifier(momentum=0.9)
    trainer.fit(module, *loaders(clients(6)), ckpt_path=resume)
    return {
        "rows": all_rows(strategy),
        "bytes": strategy.exchange.total_bytes,
        "round": strategy.round,
        "global_step": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "exported": torch.cat([value.flatten() for value in module.state_dict().values()]).numpy(),
    }


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    np.testing.assert_array_equal(one["rows"], other["rows"])
    np.testing.assert_array_equal(one["exported"], other["exported"])
    assert {name: one[name] for name in ("bytes", "round", "global_step", "metrics")} == {
        name: other[name] for name in ("bytes", "round", "global_step", "metrics")
    }


@pytest.mark.parametrize("name", ["gossip", "dpsgd", "dfedsam", "fedadam", "remembering"])
def test_resuming_after_any_round_is_exact(name: str, tmp_path: Path) -> None:
    whole = fit(name, 1, str(tmp_path / "whole"), None)
    for epoch in range(ROUNDS - 1):
        resumed = fit(name, 1, str(tmp_path / f"from{epoch}"), str(tmp_path / f"whole/epoch={epoch}.ckpt"))
        assert_equal(whole, resumed)


@pytest.mark.parametrize("name", ["gossip", "fedadam"])
def test_two_ranks_resume_exactly(name: str, tmp_path: Path) -> None:
    whole = run_ranks(2, fit, name, 2, str(tmp_path / "whole"), None)
    resumed = run_ranks(2, fit, name, 2, str(tmp_path / "resumed"), str(tmp_path / "whole/epoch=1.ckpt"))
    for one, other in zip(whole, resumed):
        assert_equal(one, other)


def test_a_rank_without_work_in_a_rounds_last_steps_resumes_what_it_has_logged(tmp_path: Path) -> None:
    whole = run_ranks(2, fit, "gossip", 2, str(tmp_path / "whole"), None, 2, 3)
    # Of the tenth and last joint step rank 0, whose shards are smaller, has nothing.
    resumed = run_ranks(2, fit, "gossip", 2, str(tmp_path / "resumed"), str(tmp_path / "whole/step=9.ckpt"), 2)
    assert all("train/loss_step" in result["metrics"] for result in whole)
    for one, other in zip(whole, resumed):
        assert_equal(one, other)


@pytest.mark.parametrize(
    ("name", "before", "after"), [("gossip", 1, 3), ("gossip", 3, 2), ("gossip", 2, 1), ("remembering", 2, 3)]
)
def test_resuming_on_another_number_of_ranks(name: str, before: int, after: int, tmp_path: Path) -> None:
    whole = fit(name, 1, str(tmp_path / "whole"), None)
    run_ranks(before, fit, name, before, str(tmp_path / "first"), None, 2)
    checkpoint = str(tmp_path / "first/epoch=1.ckpt")
    for resumed in run_ranks(after, fit, name, after, str(tmp_path / "second"), checkpoint):
        np.testing.assert_allclose(resumed["rows"], whole["rows"], rtol=0, atol=1e-6)
        assert (resumed["bytes"], resumed["round"]) == (whole["bytes"], whole["round"])


class Crash(pl.Callback):
    def __init__(self, round_: int, joint_step: int) -> None:
        self.position = round_, joint_step

    def on_train_batch_end(self, *args: Any) -> None:
        trainer, _, _, batch, _ = args
        if (batch.round, batch.index) == self.position:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "crash.ckpt")
            raise KeyboardInterrupt


def test_resuming_in_the_middle_of_a_round_is_exact(tmp_path: Path) -> None:
    def run(resume: str | None, *callbacks: pl.Callback) -> np.ndarray:
        pl.seed_everything(0, verbose=False)
        strategy = GossipStrategy(num_clients=6, optimizer_state="keep")
        trainer = silent_trainer(strategy, default_root_dir=tmp_path, callbacks=list(callbacks))
        trainer.fit(Classifier(momentum=0.9), *loaders(clients(6)), ckpt_path=resume)
        return all_rows(strategy)

    whole = run(None)
    with pytest.raises(SystemExit):
        run(None, Crash(1, 2))
    np.testing.assert_array_equal(run(str(tmp_path / "crash.ckpt")), whole)


def test_the_ordinary_file_loads_without_any_federation(tmp_path: Path) -> None:
    result = fit("gossip", 1, str(tmp_path), None, max_epochs=2)
    module = Classifier.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    loaded = torch.cat([value.flatten() for value in module.state_dict().values()]).numpy()
    np.testing.assert_array_equal(loaded, result["exported"])


def test_old_directories_are_removed_with_their_files(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    last_only = ModelCheckpoint(tmp_path, save_last=True, save_top_k=1, save_on_train_epoch_end=True)
    trainer = silent_trainer(GossipStrategy(num_clients=3), enable_checkpointing=True, callbacks=[last_only])
    trainer.fit(Classifier(), *loaders(clients(3)))
    files = {path.stem for path in tmp_path.glob("*.ckpt")}
    directories = [path.name.rsplit(".federation-", 1)[0] for path in tmp_path.glob("*.federation-*")]
    assert len(directories) == len(set(directories)) <= len(files)
    assert set(directories) <= files

"""A rank holds rows of its part of the cohort alone; the run and its checkpoints do not depend on who hosts whom."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer
from ranks import run_ranks

from lightning_fed import FedAvgStrategy

N, COHORT = 7, 3


class Save(pl.Callback):
    """Saves in the middle of a round, and counts rows."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.rows: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        strategy, batch = trainer.strategy, _[2]
        if (batch.round, batch.index) == (1, 1):
            trainer.save_checkpoint(Path(self.directory) / "middle.ckpt")
        if batch.is_last_of_round:
            assert len(strategy.bank.present) == len(strategy.bank.rows.matrix)
            self.rows.append([int(client) for client in strategy.bank.present])


def fit(
    world_size: int, directory: str, resume: str | None, place: Any = "device", leaves_something: bool = True
) -> dict[str, Any]:
    pl.seed_everything(1, verbose=False)
    save = Save(directory)
    policy: Any = "keep" if leaves_something else "reset"
    strategy = FedAvgStrategy(num_clients=N, cohort_size=COHORT, optimizer_state=policy, rows_device=place)
    trainer = silent_trainer(strategy, world_size, max_epochs=4, callbacks=[save])
    module = Classifier(norm=leaves_something, momentum=0.5)
    trainer.fit(module, *loaders(clients(N)), ckpt_path=resume)
    counters = np.array([int(strategy.bank.counters_of(client).sum()) for client in strategy.exchange.clients])
    return {
        "exported": torch.cat([value.flatten() for value in module.state_dict().values()]).numpy(),
        "counters": strategy.exchange.sum(torch.from_numpy(np.bincount(strategy.exchange.clients, counters, N))).numpy()
        if leaves_something
        else np.zeros(0),
        "bytes": strategy.exchange.total_bytes,
        "distance": strategy.consensus_distance(),
        "cohorts": [strategy.participation.cohort(round, N, strategy.seed).tolist() for round in range(4)],
        "rows": save.rows,
    }


def assert_same_run(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> None:
    np.testing.assert_allclose(one["exported"], other["exported"], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(one["counters"], other["counters"])
    assert one["bytes"] == other["bytes"]
    assert one["distance"] == pytest.approx(other["distance"], rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 2)])
def test_a_round_is_finished_on_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    alone = fit(1, str(tmp_path), None)
    first = run_ranks(before, fit, before, str(tmp_path), None, "cpu")
    for ranks in (first, run_ranks(after, fit, after, str(tmp_path / "again"), str(tmp_path / "middle.ckpt"))):
        for result in ranks:
            assert_same_run(result, alone, tolerance=1e-6)
        rounds = [list(chain(*held)) for held in zip(*(result["rows"] for result in ranks))]
        assert rounds == alone["cohorts"][-len(rounds) :]
    if before == after:
        for one, other in zip(first, ranks):
            assert_same_run(one, other)


def test_some_ranks_have_nobody_in_a_cohort(tmp_path: Path) -> None:
    results = run_ranks(4, fit, 4, str(tmp_path), None)
    assert any(not held for result in results for held in result["rows"])
    assert_same_run(results[0], fit(1, str(tmp_path), None), tolerance=1e-6)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1), (2, 3)])
def test_clients_that_leave_nothing_behind_are_dealt_out_evenly(before: int, after: int, tmp_path: Path) -> None:
    alone = fit(1, str(tmp_path), None, leaves_something=False)
    first = run_ranks(before, fit, before, str(tmp_path), None, "device", False)
    path = str(tmp_path / "middle.ckpt")
    for ranks in (first, run_ranks(after, fit, after, str(tmp_path / "again"), path, "device", False)):
        for result in ranks:
            assert_same_run(result, alone, tolerance=1e-6)
        rounds = [list(chain(*held)) for held in zip(*(result["rows"] for result in ranks))]
        assert rounds == alone["cohorts"][-len(rounds) :]
        for held in zip(*(result["rows"] for result in ranks)):
            assert max(map(len, held)) - min(map(len, held)) <= 1


def test_clients_that_leave_something_behind_stay_at_home(tmp_path: Path) -> None:
    results = run_ranks(2, fit, 2, str(tmp_path), None)
    for result, home in zip(results, (range(4), range(4, N))):
        assert all(client in home for held in result["rows"] for client in held)

"""Gossip, DFedSAM and FedAvg between processes that are killed and stopped: the others finish the fit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elastic_ranks import ElasticRanks
from federations import Classifier, clients, loaders, silent_trainer
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.strategies import DFedSAMStrategy, FedAvgStrategy, GossipStrategy

WORLD_SIZE, NUM_CLIENTS = 4, 8
ALGORITHMS: dict[str, Any] = {
    "gossip": lambda **settings: GossipStrategy("ring", **settings),
    "dfedsam": lambda **settings: DFedSAMStrategy("ring", gossip_steps=2, **settings),
    "fedavg": lambda **settings: FedAvgStrategy(**settings),
}
PING_TIMEOUT, PATIENCE = 0.5, 20.0


class Progress(Callback):
    """Tells the test how far this rank is, and slows it down so that the test can kill it on the way."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.trained: list[bool] = []
        self.validated: list[int] = []
        self.rows: list[np.ndarray] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.trained.append(False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.parts and not self.trained[-1]:
            self.trained[-1] = True
            time.sleep(self.pause)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        strategy = trainer.strategy
        self.rows.append(strategy.bank.rows.matrix.numpy().copy())
        if strategy.peers is not None:
            strategy.peers.network.store.set(f"epoch/{strategy.global_rank}", str(trainer.current_epoch))


def fit(
    strategy: FederatedStrategy,
    epochs: int,
    pause: float,
    directory: str | None = None,
    norm: bool = True,
    **settings: Any,
) -> Any:
    seed_everything(3)
    progress = Progress(pause)
    checkpoints = [ModelCheckpoint(directory, "last", save_top_k=1, every_n_epochs=1)] if directory else []
    trainer = silent_trainer(
        strategy,
        max_epochs=epochs,
        callbacks=[progress, *checkpoints],
        enable_checkpointing=bool(directory),
        **settings,
    )
    module = Classifier(norm, momentum=0.9)
    trainer.fit(module, *loaders(clients(NUM_CLIENTS)))
    return {
        "trained": progress.trained,
        "validated": progress.validated,
        "rows": progress.rows,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name},
        "bytes": strategy.exchange.sent_bytes.copy(),
        "clients": strategy.exchange.clients,
        "best": checkpoints[0].best_model_path if checkpoints else None,
        "leads": strategy.is_global_zero,
    }


def fit_on_this_rank(
    name: str, epochs: int, pause: float, ping_timeout: float, directory: str | None = None, norm: bool = True
) -> Any:
    strategy = ALGORITHMS[name](num_clients=NUM_CLIENTS, on_peer_loss="drop", ping_timeout=ping_timeout, timeout=30)
    return fit(strategy, epochs, pause, directory, norm, devices=int(os.environ["WORLD_SIZE"]))


def await_epoch(ranks: ElasticRanks, rank: int, epoch: int) -> None:
    key = f"lightning_fed/0/epoch/{rank}"
    ranks.await_key(key)
    deadline = time.monotonic() + 20
    while int(ranks.store.get(key)) < epoch:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_trajectory_is_the_ordinary_one_while_all_live(name: str) -> None:
    norm = name != "fedavg"  # BatchNorm over a minibatch of two makes much of the last bit of an average
    with ElasticRanks(WORLD_SIZE, fit_on_this_rank, name, 3, 0.0, PATIENCE, None, norm) as ranks:
        results = ranks.results()
    single = fit(ALGORITHMS[name](num_clients=NUM_CLIENTS), 3, 0.0, norm=norm)
    for epoch in range(3):
        rows = np.concatenate([results[rank]["rows"][epoch] for rank in range(WORLD_SIZE)])
        np.testing.assert_allclose(rows, single["rows"][epoch], rtol=0, atol=1e-6)
    for rank, result in results.items():
        assert result["trained"] == [True] * 3
        assert result["validated"] == ([0, 1, 2] if rank == 0 else [])
    np.testing.assert_array_equal(results[0]["bytes"], single["bytes"])
    assert results[0]["metrics"] == pytest.approx(single["metrics"], abs=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_others_finish_when_a_rank_is_killed(name: str, victim: int, tmp_path: Path) -> None:
    epochs = 8
    with ElasticRanks(WORLD_SIZE, fit_on_this_rank, name, epochs, 0.15, PING_TIMEOUT, str(tmp_path)) as ranks:
        await_epoch(ranks, victim, 2)
        ranks.kill(victim)
        results = ranks.results()
    survivors = [rank for rank in range(WORLD_SIZE) if rank != victim]
    assert sorted(results) == survivors
    leader = survivors[0] if victim == 0 else 0
    for rank in survivors:
        assert results[rank]["trained"] == [True] * epochs
        assert results[rank]["leads"] == (rank == leader)
        assert (epochs - 1 in results[rank]["validated"]) == (rank == leader)
    assert results[leader]["metrics"]["val/acc"] > 0.25
    # The checkpoint that the leader has written holds what it has evaluated.
    path = results[leader]["best"]
    module = Classifier.load_from_checkpoint(path, weights_only=False)
    trainer = silent_trainer("auto")
    metrics = trainer.validate(module, loaders(clients(2))[1], verbose=False)[0]
    assert metrics["val/acc"] == pytest.approx(results[leader]["metrics"]["val/acc"], abs=1e-6)
    assert torch.load(path, weights_only=False)["lightning_fed"]["round"] == epochs


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_stopped_rank_takes_part_again(name: str) -> None:
    epochs, sleeper = 40, 2
    with ElasticRanks(WORLD_SIZE, fit_on_this_rank, name, epochs, 0.12, PING_TIMEOUT) as ranks:
        await_epoch(ranks, sleeper, 2)
        ranks.stop(sleeper)
        time.sleep(4 * PING_TIMEOUT)
        ranks.resume(sleeper)
        results = ranks.results()
    assert sorted(results) == list(range(WORLD_SIZE))
    assert all(result["trained"] == [True] * epochs for rank, result in results.items() if rank != sleeper)
    missed = [epoch for epoch in range(epochs) if not results[sleeper]["trained"][epoch]]
    assert missed and missed[-1] < epochs - 3  # it has skipped what was over, and then met the others again


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_rank_that_wakes_when_all_is_over_leaves_what_was_saved(name: str, tmp_path: Path) -> None:
    epochs, sleeper = 6, 1
    with ElasticRanks(WORLD_SIZE, fit_on_this_rank, name, epochs, 0.1, PING_TIMEOUT, str(tmp_path)) as ranks:
        await_epoch(ranks, sleeper, 1)
        ranks.stop(sleeper)
        ranks.await_ends(*({*range(WORLD_SIZE)} - {sleeper}))
        saved = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        ranks.resume(sleeper)
        results = ranks.results()
    assert not results[sleeper]["leads"] and results[sleeper]["validated"] == []
    assert len(results[sleeper]["trained"]) < epochs
    assert results[0]["leads"] and results[0]["trained"] == [True] * epochs
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == saved


def diverge_on_rank_one(on_nonfinite: str) -> Any:
    """The rows of client 2, on rank 1, become infinite in round 1."""
    strategy = GossipStrategy(
        "ring", num_clients=NUM_CLIENTS, on_peer_loss="drop", ping_timeout=PING_TIMEOUT, on_nonfinite=on_nonfinite
    )

    class Spoiler(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if strategy.round == 1 and strategy.joint_index == 1 and 2 in strategy.exchange.clients:
                strategy.bank.rows.matrix[strategy.bank.slot(2)] = torch.inf

    seed_everything(3)
    progress = Progress(0.05)
    trainer = silent_trainer(strategy, WORLD_SIZE, max_epochs=4, callbacks=[Spoiler(), progress])
    try:
        trainer.fit(Classifier(norm=False), *loaders(clients(NUM_CLIENTS)))
    except RuntimeError as error:
        return str(error)
    return bool(np.isfinite(progress.rows[-1]).all())


def test_a_rank_whose_client_diverges_ends_alone() -> None:
    with ElasticRanks(WORLD_SIZE, diverge_on_rank_one, "raise") as ranks:
        results = ranks.results()
    assert "the models of clients [2] are not finite at the end of round 1" in results.pop(1)
    assert results == {0: True, 2: True, 3: True}


def test_a_diverged_client_starts_again_from_its_neighbours() -> None:
    with ElasticRanks(WORLD_SIZE, diverge_on_rank_one, "drop") as ranks:
        assert ranks.results() == {rank: True for rank in range(WORLD_SIZE)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **s: GossipStrategy("one-peer-exponential", **s), "undirected topology"),
        (lambda **s: FedAvgStrategy(server_optimizer=torch.optim.Adam, **s), "server_optimizer"),
    ],
)
def test_what_cannot_be_elastic_is_refused(make: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = make(num_clients=NUM_CLIENTS, on_peer_loss="drop")
    monkeypatch.setattr(type(strategy), "is_elastic", True)
    with pytest.raises(ValueError, match=message):
        silent_trainer(strategy).fit(Classifier(), *loaders(clients(NUM_CLIENTS)))

"""Sharpness on two ranks: the numbers of one process, on both, while training goes on as without the monitor."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from elastic_ranks import ElasticRanks
from federations import Classifier, clients, loaders, samples, silent_trainer
from ranks import run_ranks

from lightning_fed import GossipStrategy
from lightning_fed.callbacks import SharpnessMonitor


def trained(strategy: str, monitored: bool = True) -> dict[str, Any]:
    """Two epochs on two ranks, measured at the start and at the end."""
    pl.seed_everything(0, verbose=False)
    federated = strategy == "gossip"
    chosen: Any = GossipStrategy(num_clients=3) if federated else "ddp"
    data = loaders(clients(3)) if federated else loaders(samples(37), 8)
    monitor = SharpnessMonitor(every_n_epochs=2, num_batches=2, trace_samples=4)
    trainer = silent_trainer(chosen, 2, max_epochs=2, callbacks=[monitor] if monitored else [])
    module = Classifier()
    trainer.fit(module, *data)
    return {
        "weights": torch.cat([value.double().flatten() for value in module.state_dict().values()]).tolist(),
        "generator": torch.get_rng_state().tolist(),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("sharpness")},
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("sharpness")},
        "curves": monitor.curves,
    }


def alone(weights: list[float], strategy: str) -> dict[str, float]:
    """What one process measures at the start of a fit from these weights."""
    module = Classifier()
    flat, start = torch.tensor(weights, dtype=torch.float64), 0
    for value in module.state_dict().values():
        value.copy_(flat[start : start + value.numel()].reshape(value.shape))
        start += value.numel()
    monitor = SharpnessMonitor(num_batches=2, trace_samples=4, batch_size=4 if strategy == "gossip" else 8)
    data = loaders(clients(3).dataset if strategy == "gossip" else samples(37))
    silent_trainer("auto", max_epochs=1, limit_train_batches=1, callbacks=[monitor]).fit(module, *data)
    return {f"sharpness/{name}": points[0][1] for name, points in monitor.curves.items()}


@pytest.mark.parametrize("strategy", ["ddp", "gossip"])
def test_two_ranks_measure_what_one_measures_and_training_does_not_notice(strategy: str) -> None:
    first, second = run_ranks(2, trained, strategy)
    plain = run_ranks(2, trained, strategy, False)
    assert first["curves"] == second["curves"] and [epoch for epoch, _ in first["curves"]["trace"]] == [0, 2]
    assert first["logged"] == second["logged"] == pytest.approx(alone(first["weights"], strategy), rel=1e-5)
    for name in ("weights", "generator", "metrics"):
        assert [first[name], second[name]] == [rank[name] for rank in plain], name


def trained_elastically() -> dict[str, Any]:
    """As above, where ranks may die."""
    pl.seed_everything(0, verbose=False)
    strategy = GossipStrategy(num_clients=3, on_peer_loss="drop", ping_timeout=20, timeout=30)
    monitor = SharpnessMonitor(every_n_epochs=2, num_batches=1, trace_samples=2)
    trainer = silent_trainer(strategy, 3, max_epochs=3, callbacks=[monitor])
    trainer.fit(Classifier(norm=False), *loaders(clients(3)))
    return {"epochs": [epoch for epoch, _ in monitor.curves.get("trace", [])], "leads": strategy.is_global_zero}


def test_where_ranks_may_die_only_the_leader_measures() -> None:
    with ElasticRanks(3, trained_elastically) as ranks:
        found = ranks.results()
    assert [found[rank]["leads"] for rank in range(3)] == [True, False, False]
    assert [found[rank]["epochs"] for rank in range(3)] == [[0, 2, 3], [], []]

"""Robust rules on 1, 2 and 4 real ranks: the same rows to the bit, the same bytes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from ranks import run_ranks

from lightning_fed import (
    ALittleIsEnough,
    CoordinateMedian,
    FallOfEmpires,
    FedAvgStrategy,
    GaussianNoise,
    GeometricMedian,
    GossipStrategy,
    Krum,
    MoDeSTStrategy,
    NearestNeighborAverage,
    SignFlip,
    TrimmedMean,
)
from lightning_fed.federation import robust_mixing
from lightning_fed.federation.participation import UniformSample

N = 9
HOSTILE = [2, 7]

FEDERATIONS: dict[str, Any] = {
    "ring, trimmed mean": lambda: GossipStrategy("ring", num_clients=N, robust=TrimmedMean(1)),
    "complete, geometric median": lambda: GossipStrategy(
        "complete", num_clients=N, robust=GeometricMedian(), attack=SignFlip(HOSTILE, 3.0)
    ),
    "exponential, nearest": lambda: GossipStrategy(
        "exponential", num_clients=N, gossip_steps=2, robust=NearestNeighborAverage(2), attack=GaussianNoise(HOSTILE)
    ),
    "complete, cohort, multi-krum": lambda: GossipStrategy(
        "complete", num_clients=N, participation=UniformSample(size=5), robust=Krum(1, selected=3)
    ),
    "server, median": lambda: FedAvgStrategy(
        num_clients=N, weighting="uniform", robust=CoordinateMedian(), attack=GaussianNoise(HOSTILE), evaluate="both"
    ),
    # Of clients that are dealt out anew in every round.
    "server, cohort, krum": lambda: FedAvgStrategy(
        num_clients=N, cohort_size=7, weighting="uniform", robust=Krum(2), attack=SignFlip(HOSTILE)
    ),
    "server, geometric median": lambda: FedAvgStrategy(num_clients=N, robust=GeometricMedian()),
    "little, trimmed mean": lambda: GossipStrategy(
        "complete", num_clients=N, robust=TrimmedMean(2), attack=ALittleIsEnough(HOSTILE, z=1.0)
    ),
    "modest, median": lambda: MoDeSTStrategy(
        5, 2, num_clients=N, robust=CoordinateMedian(), attack=FallOfEmpires(HOSTILE)
    ),
    "server, empires": lambda: FedAvgStrategy(
        num_clients=N, cohort_size=6, weighting="uniform", robust=CoordinateMedian(), attack=FallOfEmpires(HOSTILE)
    ),
}


def federation(make: str, world_size: int, norm: bool = True) -> dict[str, Any]:
    pl.seed_everything(7, verbose=False)
    strategy = FEDERATIONS[make]()
    trainer = silent_trainer(strategy, devices=world_size, max_epochs=3, limit_val_batches=0)
    with pytest.MonkeyPatch.context() as small:  # several blocks, of several pieces
        small.setattr(robust_mixing, "COLUMNS", 64)
        small.setattr(robust_mixing, "TRAVEL_BYTES", 2 * 64 * 4 * N)
        trainer.fit(Classifier(norm, momentum=0.9), loaders(clients(N))[0])
    rows = all_rows(strategy) if strategy.bank.keeps_rows else torch.cat(strategy.bank.consensus[:2]).numpy()
    return {"rows": rows, "bytes": strategy.exchange.sent_bytes, "total_bytes": strategy.exchange.total_bytes}


ON_FOUR_RANKS = (
    "complete, geometric median",
    "complete, cohort, multi-krum",
    "server, cohort, krum",
    "server, empires",
)


# Without BatchNorm a round's matrix of float buffers is empty.
@pytest.mark.parametrize(
    ("name", "world_size", "norm"),
    [*((name, 2, True) for name in FEDERATIONS), *((name, 4, False) for name in ON_FOUR_RANKS)],
)
def test_a_rule_gives_the_same_bits_on_any_number_of_ranks(name: str, world_size: int, norm: bool) -> None:
    alone = federation(name, 1, norm)
    assert np.isfinite(alone["rows"]).all()
    for result in run_ranks(world_size, federation, name, world_size, norm):
        np.testing.assert_array_equal(result["rows"], alone["rows"])
        np.testing.assert_array_equal(result["bytes"], alone["bytes"])
        assert result["total_bytes"] == alone["total_bytes"] > 0

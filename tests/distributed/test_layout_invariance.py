"""The same federation on 1, 2 and 4 real ranks: same rows, same metrics, same bytes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from federations import Classifier, all_rows, clients, loaders, outcome, silent_trainer
from ranks import run_ranks

from lightning_fed import DFedSAMStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.topology import OnePeerExponential

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg-full": {},
    "fedavg-cohort": {"cohort_size": 4},
    "gossip-full": {},
    "gossip-cohort": {"participation": UniformSample(size=5)},
    "gossip-one-peer": {"topology": OnePeerExponential()},
    "gossip-both": {"evaluate": "both"},
    "dfedsam": {"gossip_steps": 2},
}
CLASSES = {"fedavg": FedAvgStrategy, "gossip": GossipStrategy, "dfedsam": DFedSAMStrategy}


def strategy_of(name: str) -> FederatedStrategy:
    return CLASSES[name.split("-")[0]](num_clients=12, **STRATEGIES[name])


def federation(name: str, world_size: int, **trainer: Any) -> dict[str, Any]:
    pl.seed_everything(7, verbose=False)
    strategy = strategy_of(name)
    trainer_ = silent_trainer(strategy, devices=world_size, **trainer)
    trainer_.fit(Classifier(momentum=0.9), *loaders(clients(12)))
    return outcome(strategy, trainer_)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if not name.startswith("fedavg")])
def test_gossip_is_the_same_to_the_bit(name: str) -> None:
    alone = federation(name, 1)
    for result in run_ranks(3, federation, name, 3):
        np.testing.assert_array_equal(result["rows"], alone["rows"])


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    np.testing.assert_allclose(one["rows"], other["rows"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(one["bytes"], other["bytes"])
    assert one["total_bytes"] == other["total_bytes"]
    assert (one["global_step"], one["round"]) == (other["global_step"], other["round"])
    assert one["consensus_distance"] == pytest.approx(other["consensus_distance"], abs=1e-6)
    # A step's training value is the mean over one rank's clients, so it is the one thing that knows the layout.
    names = {name for name in one["metrics"] if name != "train/loss_step"}
    assert names == {name for name in other["metrics"] if name != "train/loss_step"}
    for name in names:
        assert one["metrics"][name] == pytest.approx(other["metrics"][name], abs=2e-6), name


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_equal_one(name: str) -> None:
    alone = federation(name, 1)
    results = run_ranks(2, federation, name, 2)
    for result in results:
        assert_same(alone, result)


@pytest.mark.parametrize("name", ["fedavg-full", "fedavg-cohort", "gossip-cohort", "dfedsam"])
def test_four_ranks_equal_one(name: str) -> None:
    alone = federation(name, 1)
    for result in run_ranks(4, federation, name, 4):
        assert_same(alone, result)


def accumulated(world_size: int) -> dict[str, Any]:
    return federation("gossip-full", world_size, accumulate_grad_batches=2, gradient_clip_val=0.5)


def test_accumulation_and_clipping_do_not_know_the_layout() -> None:
    alone = accumulated(1)
    for result in run_ranks(2, accumulated, 2):
        assert_same(alone, result)


class DoubledBatch:
    """``ranks_per_client=2`` with batches of 4, or the same clients on one rank each with batches of 8."""

    def __init__(self, ranks_per_client: int) -> None:
        self.ranks_per_client = ranks_per_client

    def __call__(self) -> tuple[np.ndarray, np.ndarray, int]:
        pl.seed_everything(3, verbose=False)
        strategy = DFedSAMStrategy(num_clients=2, ranks_per_client=self.ranks_per_client)
        trainer = silent_trainer(strategy, devices=2 * self.ranks_per_client)
        # Neither dropout nor BatchNorm: both differ between two half batches and a whole one, by definition.
        module = Classifier(norm=False, dropout=0.0, momentum=0.9)
        trainer.fit(module, *loaders(clients(2, smallest=21, step=4), batch_size=8 // self.ranks_per_client))
        return all_rows(strategy), strategy.exchange.sent_bytes, strategy.exchange.wire_bytes


def test_two_ranks_a_client_equal_one_with_the_doubled_batch() -> None:
    whole = run_ranks(2, DoubledBatch(1))
    halves = run_ranks(4, DoubledBatch(2))
    for rows, sent_bytes, _ in halves:
        np.testing.assert_allclose(rows, whole[0][0], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(sent_bytes, whole[0][1])


def test_only_mixing_crosses_clients() -> None:
    """Per round, a rank's wire carries its row to the one other client, and nothing else."""
    row_bytes = 4 * sum(parameter.numel() for parameter in Classifier(norm=False).parameters())
    for _, _, wire_bytes in run_ranks(4, DoubledBatch(2)):
        assert wire_bytes == 3 * row_bytes

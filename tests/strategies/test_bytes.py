"""The counted bytes equal each algorithm's closed formula, client by client, to the byte.

A row of the small network has P = 12 * 16 + 16 + 16 * 4 + 4 = 276 parameters; its BatchNorm adds 32 parameters and
B = 32 float buffers. ``num_batches_tracked`` is an integer and stays at home.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer

from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.strategies import DFedSAMStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.topology import Complete, Exponential, OnePeerExponential, Ring, Star, Topology, Torus

ROUNDS = 3
PARAMETERS, NORM_PARAMETERS, NORM_BUFFERS = 276, 32, 32


def train(strategy: FederatedStrategy, module: Classifier | None = None, **trainer: Any) -> FederatedStrategy:
    train_loader, _ = loaders(clients(strategy.num_clients, smallest=6))
    settings = {"max_epochs": ROUNDS, "limit_val_batches": 0, **trainer}
    silent_trainer(strategy, **settings).fit(module or Classifier(norm=False), train_loader)
    return strategy


def rounds_attended(strategy: FederatedStrategy) -> np.ndarray:
    """``[N]``."""
    cohorts = [strategy.participation.cohort(round, strategy.num_clients, strategy.seed) for round in range(ROUNDS)]
    return np.bincount(np.concatenate(cohorts), minlength=strategy.num_clients)


def assert_sent(strategy: FederatedStrategy, per_client: Any, server: int = 0) -> None:
    per_client = np.broadcast_to(per_client, strategy.num_clients)
    np.testing.assert_array_equal(strategy.exchange.sent_bytes, per_client)
    assert strategy.exchange.server_bytes == server
    assert strategy.exchange.total_bytes == per_client.sum() + server


@pytest.mark.parametrize(
    ("topology", "num_clients", "out_degrees"),
    [
        (Ring(), 6, [2] * 6),
        (Ring(), 2, [1] * 2),
        (Torus(), 9, [4] * 9),
        (Torus(), 8, [3] * 8),  # 2 x 4: up and down are the same neighbour
        (Star(), 5, [4, 1, 1, 1, 1]),
        (Complete(), 5, [4] * 5),
        (Exponential(), 8, [3] * 8),  # i + 1, i + 2, i + 4
        (Exponential(), 6, [3] * 6),
        (OnePeerExponential(), 8, [1] * 8),
        (Ring(), 1, [0]),
    ],
)
def test_gossip_sends_a_row_to_every_out_neighbour(
    topology: Topology, num_clients: int, out_degrees: list[int]
) -> None:
    strategy = train(GossipStrategy(topology, num_clients=num_clients))
    assert_sent(strategy, ROUNDS * np.array(out_degrees) * PARAMETERS * 4)


@pytest.mark.parametrize("gossip_steps", [1, 4])
def test_multiple_gossip_steps_cost_as_many_times_the_bytes(gossip_steps: int) -> None:
    strategy = train(DFedSAMStrategy("ring", gossip_steps=gossip_steps, num_clients=6))
    assert_sent(strategy, ROUNDS * gossip_steps * 2 * PARAMETERS * 4)


def test_local_steps_are_free() -> None:
    once = train(GossipStrategy(num_clients=4, local_steps=1))
    often = train(GossipStrategy(num_clients=4, local_epochs=3))
    assert_sent(once, ROUNDS * 2 * PARAMETERS * 4)
    assert_sent(often, ROUNDS * 2 * PARAMETERS * 4)


def test_an_absent_client_neither_sends_nor_is_sent_to() -> None:
    num_clients = 6
    strategy = train(GossipStrategy("ring", num_clients=num_clients, participation=UniformSample(4), seed=2))
    rows = np.zeros(num_clients, dtype=int)
    for round in range(ROUNDS):
        cohort = set(strategy.participation.cohort(round, num_clients, 2).tolist())
        for client in cohort:
            rows[client] += len(cohort & {(client - 1) % num_clients, (client + 1) % num_clients})
    assert 0 < rows.sum() < ROUNDS * num_clients * 2
    assert_sent(strategy, rows * PARAMETERS * 4)


@pytest.mark.parametrize("cohort_size", [None, 2])
def test_fedavg_sends_two_rows_a_round_for_each_client_of_the_cohort(cohort_size: int | None) -> None:
    strategy = train(FedAvgStrategy(cohort_size=cohort_size, num_clients=5, seed=1))
    size = cohort_size or 5
    assert_sent(strategy, rounds_attended(strategy) * PARAMETERS * 4, server=ROUNDS * size * PARAMETERS * 4)
    assert strategy.exchange.total_bytes == ROUNDS * 2 * size * PARAMETERS * 4


@pytest.mark.parametrize("settings", [{"mu": 0.1}, {"server_optimizer": partial(torch.optim.Adam, lr=0.01)}])
def test_what_client_and_server_do_at_home_is_free(settings: dict[str, Any]) -> None:
    strategy = train(FedAvgStrategy(num_clients=3, **settings))
    assert_sent(strategy, ROUNDS * PARAMETERS * 4, server=ROUNDS * 3 * PARAMETERS * 4)


@pytest.mark.parametrize(("float_buffers", "buffers"), [("mix", NORM_BUFFERS), ("local", 0)])
def test_batchnorm_statistics_are_sent_only_if_they_are_mixed(float_buffers: Any, buffers: int) -> None:
    row = (PARAMETERS + NORM_PARAMETERS + buffers) * 4
    gossip = GossipStrategy("ring", gossip_steps=2, num_clients=4, float_buffers=float_buffers)
    assert_sent(train(gossip, Classifier(norm=True)), ROUNDS * 2 * 2 * row)
    fedavg = FedAvgStrategy(num_clients=4, float_buffers=float_buffers)
    assert_sent(train(fedavg, Classifier(norm=True)), ROUNDS * row, server=ROUNDS * 4 * row)


def test_frozen_parameters_are_not_sent() -> None:
    module = Classifier(norm=False)
    module.net[0].requires_grad_(False)
    head = 16 * 4 + 4
    assert_sent(train(GossipStrategy("ring", num_clients=4), module), ROUNDS * 2 * head * 4)


@pytest.mark.parametrize(("precision", "width"), [("64-true", 8), ("32-true", 4), ("bf16-true", 2), ("bf16-mixed", 4)])
def test_numbers_cost_what_their_dtype_costs(precision: Any, width: int) -> None:
    row = (PARAMETERS + NORM_PARAMETERS + NORM_BUFFERS) * width
    strategy = train(GossipStrategy("ring", num_clients=4), Classifier(norm=True), precision=precision)
    assert_sent(strategy, ROUNDS * 2 * row)


def test_a_continued_fit_counts_on() -> None:
    strategy, module = GossipStrategy("ring", num_clients=4), Classifier(norm=False)
    train_loader, _ = loaders(clients(4))
    trainer = silent_trainer(strategy, max_epochs=ROUNDS, limit_val_batches=0)
    trainer.fit(module, train_loader)
    trainer.fit_loop.max_epochs = 2 * ROUNDS
    trainer.fit(module, train_loader)
    assert strategy.round == 2 * ROUNDS
    assert_sent(strategy, 2 * ROUNDS * 2 * PARAMETERS * 4)

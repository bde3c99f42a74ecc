"""Every algorithm's trajectory, round by round and client by client, against the equations of its paper in NumPy.

The transcription below (between the two rules) knows neither torch nor this package. The order of the minibatches needs
nothing but slicing (``shuffle=False``), and mixing matrices are written out by hand; only the sampled cohorts are read
from the participation rule, because they are an input of the algorithms.

Shapes: R = rounds, N = clients, P = numbers in a row, B = samples in a minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from paper_problem import (
    CLIENTS,
    LABELS,
    ROUNDS,
    SEED,
    SIZES,
    START_P,
    TOLERANCE,
    TwoLayers,
    loader_of,
    local_sgd,
    pass_over_shard,
    quiet_trainer,
    run,
)

from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.strategies import DFedSAMStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.topology import Complete, OnePeerExponential, Ring

COHORT = 3

Cohorts = list[np.ndarray]
Average = Callable[[np.ndarray, int, np.ndarray], np.ndarray]  # (X, round, cohort) -> the mixed X


# ------------------------------------------------------------------------------------------------------- the papers


def one_pass(client: int, round: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return pass_over_shard(client)


def one_minibatch(client: int, round: int) -> list[tuple[np.ndarray, np.ndarray]]:
    batches = pass_over_shard(client)
    return [batches[round % len(batches)]]


def ring(X: np.ndarray, round: int, cohort: np.ndarray) -> np.ndarray:
    """``x_i <- (x_{i-1} + x_i + x_{i+1}) / 3``."""
    return np.stack([(X[i - 1] + X[i] + X[(i + 1) % CLIENTS]) / 3 for i in range(CLIENTS)])


def ring_of_cohort(X: np.ndarray, round: int, cohort: np.ndarray) -> np.ndarray:
    """The same; an absent neighbour's third stays with the client itself, an absent client keeps its row."""
    mixed = X.copy()
    for i in cohort:
        for j in ((i - 1) % CLIENTS, (i + 1) % CLIENTS):
            if j in cohort:
                mixed[i] += (X[j] - X[i]) / 3
    return mixed


def one_peer_exponential(X: np.ndarray, round: int, cohort: np.ndarray) -> np.ndarray:
    """``x_i <- (x_i + x_{i-h}) / 2`` with h = 1, 2, 4, 1, 2, 4, ...: client i sends to i + h."""
    hop = [1, 2, 4][round % 3]
    return np.stack([(X[i] + X[i - hop]) / 2 for i in range(CLIENTS)])


def repeated(times: int, average: Average) -> Average:
    """Multiple gossip steps; a time-varying graph moves on with every one of them."""

    def repeat(X: np.ndarray, round: int, cohort: np.ndarray) -> np.ndarray:
        for step in range(times):
            X = average(X, times * round + step, cohort)
        return X

    return repeat


def gossip(average: Average, work: Any, cohorts: Cohorts, **local: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """D-PSGD (adapt, then combine), DFedAvg, DFedAvgM, DFedSAM: after each round, all clients' rows and their mean."""
    X = np.tile(START_P, (CLIENTS, 1))
    for round, cohort in enumerate(cohorts):
        for i in cohort:
            X[i] = local_sgd(X[i], work(i, round), **local)
        X = average(X, round, cohort)
        yield X.copy(), X.mean(axis=0)


def fedavg(
    cohorts: Cohorts, by_samples: bool = True, server: Any = None, **local: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """McMahan et al., Algorithm 1; with ``server``, Reddi et al., Algorithm 2: all clients' rows, the server's model.

    Between rounds a client keeps what it has trained, until the server's model comes down again.
    """
    X, x = np.tile(START_P, (CLIENTS, 1)), START_P
    for round, cohort in enumerate(cohorts):
        n = SIZES if by_samples else np.ones(CLIENTS)
        delta = np.zeros_like(x)
        for k in cohort:
            X[k] = local_sgd(x, one_pass(k, round), **local)
            delta += n[k] / n[cohort].sum() * (X[k] - x)
        x = x + (delta if server is None else server(-delta))
        yield X.copy(), x


def sgd_with_momentum(lr: float, beta: float) -> Callable[[np.ndarray], np.ndarray]:
    m: Any = 0.0

    def step(g: np.ndarray) -> np.ndarray:
        nonlocal m
        m = beta * m + g
        return -lr * m

    return step


def adam(lr: float, tau: float) -> Callable[[np.ndarray], np.ndarray]:
    """With the bias correction of Kingma and Ba, which Reddi et al. leave out and torch has."""
    m: Any = 0.0
    v: Any = 0.0
    t = 0

    def step(g: np.ndarray) -> np.ndarray:
        nonlocal m, v, t
        t += 1
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        return -lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + tau)

    return step


# -------------------------------------------------------------------------------------------------------- the tests

FULL: Cohorts = [np.arange(CLIENTS)] * ROUNDS
SAMPLED: Cohorts = [UniformSample(COHORT).cohort(round, CLIENTS, SEED) for round in range(ROUNDS)]
HALF: Cohorts = [UniformSample(fraction=0.625).cohort(round, CLIENTS, SEED) for round in range(ROUNDS)]

Fedavg = partial(FedAvgStrategy, num_clients=CLIENTS, seed=SEED)
Gossip = partial(GossipStrategy, num_clients=CLIENTS, seed=SEED)
Dfedsam = partial(DFedSAMStrategy, num_clients=CLIENTS, seed=SEED)

ALGORITHMS: dict[str, tuple[Callable[[], FederatedStrategy], Callable[[], Any], float]] = {
    "fedavg": (lambda: Fedavg(), lambda: fedavg(FULL), 0),
    "fedavg-cohort": (lambda: Fedavg(cohort_size=COHORT), lambda: fedavg(SAMPLED), 0),
    "fedavg-cohort-keeps-rows": (lambda: Fedavg(cohort_size=COHORT, evaluate="both"), lambda: fedavg(SAMPLED), 0),
    "fedavg-uniform": (lambda: Fedavg(weighting="uniform"), lambda: fedavg(FULL, by_samples=False), 0),
    "fedavg-uniform-cohort": (
        lambda: Fedavg(weighting="uniform", cohort_fraction=0.625),
        lambda: fedavg(HALF, by_samples=False),
        0,
    ),
    "fedavgm": (
        lambda: Fedavg(server_optimizer=partial(torch.optim.SGD, lr=0.7, momentum=0.9), cohort_size=COHORT),
        lambda: fedavg(SAMPLED, server=sgd_with_momentum(0.7, 0.9)),
        0,
    ),
    "fedadam": (
        lambda: Fedavg(server_optimizer=partial(torch.optim.Adam, lr=0.03, betas=(0.9, 0.99), eps=1e-3)),
        lambda: fedavg(FULL, server=adam(0.03, 1e-3)),
        0,
    ),
    "fedprox": (lambda: Fedavg(mu=0.5, cohort_size=COHORT), lambda: fedavg(SAMPLED, mu=0.5), 0),
    "dpsgd": (lambda: Gossip(topology="ring", local_steps=1), lambda: gossip(ring, one_minibatch, FULL), 0),
    "dpsgd-rounds-per-epoch": (
        lambda: Gossip(topology=Ring(), local_steps=1, rounds_per_epoch=4),
        lambda: gossip(ring, one_minibatch, FULL),
        0,
    ),
    "dfedavg": (lambda: Gossip(topology=Ring()), lambda: gossip(ring, one_pass, FULL), 0),
    "dfedavgm": (lambda: Gossip(topology=Ring()), lambda: gossip(ring, one_pass, FULL, theta=0.9), 0.9),
    "dfedsam": (lambda: Dfedsam(rho=0.2), lambda: gossip(ring, one_pass, FULL, rho=0.2), 0),
    "dfedsam-mgs": (
        lambda: Dfedsam(rho=0.2, gossip_steps=3),
        lambda: gossip(repeated(3, ring), one_pass, FULL, rho=0.2),
        0,
    ),
    "one-peer-exponential": (
        lambda: Gossip(topology=OnePeerExponential()),
        lambda: gossip(one_peer_exponential, one_pass, FULL),
        0,
    ),
    "one-peer-exponential-mgs": (
        lambda: Gossip(topology="one-peer-exponential", gossip_steps=2),
        lambda: gossip(repeated(2, one_peer_exponential), one_pass, FULL),
        0,
    ),
    "gossip-cohort": (
        lambda: Gossip(topology=Ring(), participation=UniformSample(fraction=0.625)),
        lambda: gossip(ring_of_cohort, one_pass, HALF),
        0,
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_trajectory_of_every_client_is_the_papers(name: str) -> None:
    make, paper, momentum = ALGORITHMS[name]
    strategy = make()
    per_epoch = strategy.rounds_per_epoch
    assert isinstance(per_epoch, int)
    rows, model = run(strategy, momentum, epochs=ROUNDS // per_epoch)
    expected_rows, expected_models = map(np.stack, zip(*paper()))
    assert np.ptp(expected_rows[-1], axis=0).max() > 1e-3  # clients differ, and they have moved
    assert np.abs(expected_models[-1] - START_P).max() > 1e-2
    for round, held in zip(range(per_epoch - 1, ROUNDS, per_epoch), rows, strict=True):
        cohort = strategy.participation.cohort(round, CLIENTS, SEED)
        holders = np.arange(CLIENTS) if strategy.keeps_rows else cohort
        np.testing.assert_allclose(held, expected_rows[round][holders], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(model, expected_models[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("gossip_steps", [1, 3])
def test_dfedsam_of_radius_zero_is_dfedavg_to_the_bit(gossip_steps: int) -> None:
    for sam, plain in zip(run(Dfedsam(rho=0, gossip_steps=gossip_steps)), run(Gossip(gossip_steps=gossip_steps))):
        np.testing.assert_array_equal(sam, plain)


def test_gossip_over_the_complete_graph_is_uniform_fedavg() -> None:
    rows, gossiped = run(Gossip(topology=Complete()))
    _, averaged = run(Fedavg(weighting="uniform"))
    np.testing.assert_allclose(gossiped, averaged, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rows[-1], np.tile(averaged, (CLIENTS, 1)), rtol=0, atol=1e-12)


def test_a_proximal_weight_of_zero_is_fedavg_to_the_bit() -> None:
    for prox, plain in zip(run(Fedavg(mu=0.0)), run(Fedavg())):
        np.testing.assert_array_equal(prox, plain)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("make", [GossipStrategy, FedAvgStrategy, partial(DFedSAMStrategy, rho=0.0)])
def test_one_client_is_plain_lightning_to_the_bit(make: Callable[..., FederatedStrategy], precision: str) -> None:
    everything = [np.arange(len(LABELS))]
    alone, federated = (TwoLayers(momentum=0.9), TwoLayers(momentum=0.9))
    if precision == "32-true":
        alone.float(), federated.float()
    quiet_trainer(5, precision).fit(alone, loader_of(everything))
    strategy = make(num_clients=1, optimizer_state="keep")
    quiet_trainer(5, precision, strategy=strategy).fit(federated, loader_of(everything))
    assert np.abs(alone.vector() - START_P).max() > 1e-2
    np.testing.assert_array_equal(federated.vector(), alone.vector())

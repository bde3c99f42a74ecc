"""CHOCO-SGD, DSGT, DProxSGT, CDProxSGT and BEER: every client's model, tracker and copies, against NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from econtrol_equations import LAYERS, STEPS, WIDTH, minibatches, top_k_of_layers
from gossip_equations import RATIO, State, beer, cdprox, choco, dsgt, gradients, one_peer_exponential, ring, soft
from lightning.pytorch import Callback, Trainer
from paper_problem import (
    CLIENTS,
    ETA,
    SEED,
    SHARDS,
    START_P,
    TOLERANCE,
    TwoLayers,
    loader_of,
    pass_over_shard,
    quiet_trainer,
)

from lightning_fed import DFedSAMStrategy, GossipStrategy
from lightning_fed.compression import Identity, TopK
from lightning_fed.proximal import L1Norm
from lightning_fed.topology import OnePeerExponential


class RecordRounds(Callback):
    """Keeps, after every round, all rows and what the algorithm keeps beside them."""

    def __init__(self) -> None:
        self.states: list[State] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.is_last_of_round:
            kept = {"x": trainer.strategy.bank.rows.matrix, **trainer.strategy.client_matrices()}
            self.states.append({name: value.numpy().copy() for name, value in kept.items()})


class Scheduled(TwoLayers):
    """The two layers with a learning rate that is halved after every tenth step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5), "interval": "step"}]


Gossip = partial(GossipStrategy, num_clients=CLIENTS, seed=SEED, rounds_per_epoch=STEPS // 2)
Step = partial(Gossip, local_steps=1, optimizer_state="keep")


def train(strategy: GossipStrategy, module: TwoLayers | None = None, **trainer: Any) -> State:
    """Train for 50 rounds; returns the history of each quantity, ``[T, N, P]``."""
    module, record = module or TwoLayers(), RecordRounds()
    quiet_trainer(2, strategy=strategy, callbacks=[record], **trainer).fit(module, loader_of(SHARDS))
    assert strategy.round == len(record.states) == STEPS
    np.testing.assert_allclose(module.vector(), record.states[-1]["x"].mean(axis=0), rtol=0, atol=1e-12)
    return stacked(record.states)


def stacked(states: list[State]) -> State:
    return {name: np.stack([state[name] for state in states]) for name in states[0]}


MESSAGE = round(RATIO * WIDTH) * (8 + 2) + 4  # Top-K in float64: values, indices, and how many of these
MESSAGE_OF_LAYERS = sum(max(1, round(RATIO * size)) for size in LAYERS) * (8 + 2) + 4

Method = tuple[Callable[[], GossipStrategy], Callable[[], Iterator[State]], int]

METHODS: dict[str, Method] = {  # with the bytes of all rounds to one neighbour
    "choco": (
        lambda: Step(method="choco", compressor=TopK(RATIO), gamma=0.3),
        lambda: choco(0.3),
        STEPS * MESSAGE,
    ),
    "choco-layers": (
        lambda: Step(method="choco", compressor=TopK(RATIO, "layer"), gamma=0.3),
        lambda: choco(0.3, compress=partial(top_k_of_layers, ratio=RATIO)),
        STEPS * MESSAGE_OF_LAYERS,
    ),
    "choco-local-steps": (
        lambda: Gossip(method="choco", compressor=TopK(RATIO), gamma=0.3, start="model", local_steps=3, gossip_steps=2),
        lambda: choco(0.3, lambda i, t: minibatches(i, 3 * t, 3), gossip_steps=2, start=1),
        STEPS * 2 * MESSAGE,
    ),
    "choco-local-epochs": (
        lambda: Gossip(method="choco", compressor=TopK(RATIO), gamma=0.4),
        lambda: choco(0.4, lambda i, t: pass_over_shard(i)),
        STEPS * MESSAGE,
    ),
    "choco-dfedsam": (
        lambda: DFedSAMStrategy(
            method="choco",
            compressor=TopK(RATIO),
            gamma=0.3,
            rho=0.2,
            local_steps=1,
            num_clients=CLIENTS,
            seed=SEED,
            rounds_per_epoch=STEPS // 2,
        ),
        lambda: choco(0.3, rho=0.2),
        STEPS * MESSAGE,
    ),
    "dsgt": (lambda: Step(method="tracking"), lambda: dsgt(), (2 * STEPS - 1) * WIDTH * 8),
    "dsgt-one-peer": (
        lambda: Step(method="tracking", topology=OnePeerExponential()),
        lambda: dsgt(one_peer_exponential),
        (2 * STEPS - 1) * WIDTH * 8,
    ),
    "dproxsgt": (
        lambda: Step(method="tracking", proximal=L1Norm(0.01)),
        lambda: dsgt(weight=0.01),
        (2 * STEPS - 1) * WIDTH * 8,
    ),
    "cdproxsgt": (
        lambda: Step(method="tracking", compressor=TopK(RATIO), gamma=0.3, proximal=L1Norm(0.01)),
        lambda: cdprox(0.3, 0.01),
        2 * STEPS * MESSAGE,
    ),
    "compressed-dsgt": (
        lambda: Step(method="tracking", compressor=TopK(RATIO), gamma=0.4, start="model"),
        lambda: cdprox(0.4, start=1),
        2 * STEPS * MESSAGE,
    ),
    "beer": (
        lambda: Step(method="beer", compressor=TopK(RATIO), gamma=0.3),
        lambda: beer(0.3),
        (2 * STEPS - 1) * MESSAGE,
    ),
    "beer-from-the-model": (
        lambda: Step(method="beer", compressor=TopK(RATIO), gamma=0.4, start="model"),
        lambda: beer(0.4, start=1),
        (2 * STEPS - 1) * MESSAGE,
    ),
}


def assert_equal(history: State, paper: Iterator[State]) -> State:
    """All quantities of all clients in all rounds are the paper's; returns the paper's."""
    expected = stacked(list(paper))
    assert set(history) == set(expected)
    assert np.ptp(expected["x"][-1], axis=0).max() > 1e-3  # clients differ, and they have moved
    assert np.abs(expected["x"][-1] - START_P).max() > 1e-2
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    if "tracker" in history:
        means = history["tracker"].mean(axis=1), history["last gradient"].mean(axis=1)
        np.testing.assert_allclose(*means, rtol=0, atol=1e-14)
    return expected


@pytest.mark.parametrize("name", METHODS)
def test_the_trajectory_of_every_client_is_the_papers(name: str) -> None:
    make, paper, bytes_to_each = METHODS[name]
    strategy = make()
    assert_equal(train(strategy), paper())
    degree = 1 if name == "dsgt-one-peer" else 2
    np.testing.assert_array_equal(strategy.exchange.sent_bytes, [degree * bytes_to_each] * CLIENTS)
    assert strategy.exchange.server_bytes == 0


def test_each_clients_momentum_follows_its_tracker() -> None:
    assert_equal(train(Step(method="tracking"), TwoLayers(momentum=0.5)), dsgt(theta=0.5))


def test_clipping_shortens_the_step_and_not_the_tracker() -> None:
    expected = assert_equal(train(Step(method="tracking"), gradient_clip_val=0.6), dsgt(clip=0.6))
    is_clipped = np.linalg.norm(expected["tracker"], axis=2) > 0.6
    assert is_clipped.any() and not is_clipped.all()


def test_the_proximal_operator_has_the_steps_learning_rate() -> None:
    strategy = Step(method="tracking", proximal=L1Norm(0.02))
    assert_equal(train(strategy, Scheduled()), dsgt(weight=0.02, halved_every=10))


class TwoRates(TwoLayers):
    """The first layer learns ten times slower, and nobody trains the last bias."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        first, second = self.network[0], self.network[2]
        groups = [{"params": first.parameters(), "lr": ETA / 10}, {"params": [second.weight], "lr": ETA}]
        return torch.optim.SGD(groups)


def test_each_parameter_shrinks_by_its_own_learning_rate() -> None:
    strategy = Step(method="tracking", proximal=L1Norm(0.02))
    history = train(strategy, TwoRates())
    eta = np.repeat([ETA / 10, ETA / 10, ETA, 0], LAYERS)
    X, y = np.tile(START_P, (CLIENTS, 1)), np.zeros((CLIENTS, WIDTH))
    g = y
    for t in range(STEPS):
        g, g_before = gradients(X, t), g
        y = ring(y) + g - g_before
        X = ring(soft(X - eta * y, eta * 0.02))
        np.testing.assert_allclose(history["x"][t], X, rtol=0, atol=TOLERANCE)


def test_without_compression_at_full_rate_choco_is_plain_averaging() -> None:
    rows = train(Step(method="choco", compressor=Identity(), gamma=1.0))["x"]
    np.testing.assert_allclose(rows, train(Step())["x"], rtol=0, atol=TOLERANCE)

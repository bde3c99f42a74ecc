"""EControl, EF, EF21 and plain compression: every number that they keep, against the papers' equations in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from econtrol_equations import (
    LAYERS,
    STEPS,
    WIDTH,
    History,
    Optimizer,
    Papers,
    adamw,
    as_it_is,
    every_round,
    every_step,
    minibatches,
    sgd,
    top_k,
    top_k_of_layers,
)
from lightning.pytorch import Callback, Trainer
from paper_problem import (
    CLIENTS,
    ETA,
    SEED,
    SHARDS,
    START_P,
    TOLERANCE,
    TwoLayers,
    gradient,
    loader_of,
    local_sgd,
    quiet_trainer,
)

from lightning_fed import EControlStrategy
from lightning_fed.compression import Compressor, Identity, LowRank, ScaledSign, TopK


class AnyOptimizer(TwoLayers):
    """The two layers with an optimizer, and a scheduler, of the test's choice."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer or partial(torch.optim.SGD, lr=ETA), scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


class RecordState(Callback):
    """Keeps, after every round, the model and all that the algorithm keeps."""

    def __init__(self) -> None:
        self.states: list[dict[str, np.ndarray]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not batch.is_last_of_round:
            return
        strategy = trainer.strategy
        matrices = strategy.client_matrices()
        state = {"x": strategy.consensus(strategy.bank.rows.matrix, strategy.exchange), "h": strategy._mean.mean}
        state.update({name: matrices[key] for name, key in (("e", "error"), ("h_i", "estimate")) if key in matrices})
        self.states.append({name: value.numpy().copy() for name, value in state.items()})


Econtrol = partial(EControlStrategy, eta=0.1, num_clients=CLIENTS, seed=SEED, rounds_per_epoch=STEPS // 2)


def train(strategy: EControlStrategy, module: TwoLayers | None = None, **trainer: Any) -> History:
    """Train for 50 steps or rounds; returns the history of each quantity, ``[T, ...]``."""
    module, record = module or AnyOptimizer(), RecordState()
    quiet_trainer(2, strategy=strategy, callbacks=[record], **trainer).fit(module, loader_of(SHARDS))
    assert strategy.round == len(record.states) == STEPS
    np.testing.assert_array_equal(module.vector(), record.states[-1]["x"])
    return stacked(record.states)


def stacked(states: list[dict[str, np.ndarray]]) -> History:
    return {name: np.stack([state[name] for state in states]) for name in states[0]}


def assert_equal(history: History, paper: Iterator[dict[str, np.ndarray]], names: str) -> History:
    """All quantities of all steps are the paper's; returns the paper's."""
    expected = stacked(list(paper))
    assert set(history) == set(names.split())
    assert np.abs(expected["x"][-1] - START_P).max() > 1e-2
    for name in history:
        np.testing.assert_allclose(history[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    if "h_i" in history:
        np.testing.assert_allclose(history["h"], history["h_i"].mean(axis=1), rtol=1e-12, atol=1e-14)
    return expected


def message_bytes(ratio: float, blocks: list[int]) -> int:
    """Of Top-K in float64: 8 bytes a value, 2 an index, 4 for each 65,536 entries of the row."""
    return sum(max(1, round(ratio * size)) for size in blocks) * (8 + 2) + 4 * ceil(sum(blocks) / 65_536)


# -------------------------------------------------------------------------------------------------------- the tests

KEPT = {"econtrol": "x h e h_i", "ef21": "x h h_i", "ef": "x h e", "none": "x h"}

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "econtrol": ({}, {}),
    "econtrol-exact": ({"h0": "exact"}, {"h0": "exact"}),
    "econtrol-zero": ({"h0": "zero"}, {"h0": "zero"}),
    "econtrol-eta-0": ({"eta": 0.0}, {"eta": 0.0}),
    "econtrol-eta-1": ({"eta": 1.0, "h0": "zero"}, {"eta": 1.0, "h0": "zero"}),
    "ef21": ({"error_feedback": "ef21"}, {}),
    "ef21-exact": ({"error_feedback": "ef21", "h0": "exact"}, {"h0": "exact"}),
    "ef": ({"error_feedback": "ef"}, {}),
    "none": ({"error_feedback": "none"}, {}),
}


@pytest.mark.parametrize(
    ("name", "scope"),
    [*((name, "model") for name in METHODS), *((name, "layer") for name in ("econtrol", "ef21", "ef"))],
)
def test_gradients_at_every_step(name: str, scope: Any) -> None:
    settings, of_paper = METHODS[name]
    method = name.split("-")[0]
    strategy = Econtrol(TopK(0.1, scope), **settings)
    compress = partial(top_k if scope == "model" else top_k_of_layers, ratio=0.1)
    lr = 0.05 if name == "econtrol-eta-1" else ETA  # it would diverge otherwise, and blow rounding up
    history = train(strategy, AnyOptimizer(partial(torch.optim.SGD, lr=lr)))
    assert_equal(history, every_step(Papers(method, compress, **of_paper), sgd(lr)), KEPT[method])

    exact = name.endswith("exact")
    first, message = WIDTH * 8, message_bytes(0.1, [WIDTH] if scope == "model" else LAYERS)
    each = (CLIENTS - 1) * (STEPS * message + exact * (first - message))
    np.testing.assert_array_equal(strategy.exchange.sent_bytes, [each] * CLIENTS)
    assert strategy.exchange.server_bytes == 0


OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Papers], Iterator[dict[str, np.ndarray]]]]] = {
    "momentum": (
        {"optimizer": partial(torch.optim.SGD, lr=ETA, momentum=0.7)},
        {},
        lambda papers: every_step(papers, sgd(theta=0.7)),
    ),
    "adamw": (
        {"optimizer": partial(torch.optim.AdamW, lr=0.03, betas=(0.9, 0.99), weight_decay=0.1)},
        {},
        lambda papers: every_step(papers, adamw(0.03, 0.1)),
    ),
    "clipped": ({}, {"gradient_clip_val": 0.65}, lambda papers: every_step(papers, sgd(clip=0.65))),
    "scheduled": (
        {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.5)},
        {},
        lambda papers: every_step(papers, sgd(halved_every=10)),
    ),
    "accumulated": ({}, {"accumulate_grad_batches": 2}, lambda papers: every_step(papers, sgd(), accumulated=2)),
    "all": (
        {
            "optimizer": partial(torch.optim.SGD, lr=ETA, momentum=0.7),
            "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.5),
        },
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.65},
        lambda papers: every_step(papers, sgd(theta=0.7, clip=0.65, halved_every=10), accumulated=3),
    ),
}


@pytest.mark.parametrize("method", ["econtrol", "ef"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_modules_optimizer_steps_along_the_estimate(name: str, method: Any) -> None:
    of_module, of_trainer, paper = OPTIMIZERS[name]
    history = train(Econtrol(TopK(0.1), error_feedback=method), AnyOptimizer(**of_module), **of_trainer)
    expected = assert_equal(history, paper(Papers(method, partial(top_k, ratio=0.1))), KEPT[method])
    if "gradient_clip_val" in of_trainer:
        is_clipped = np.linalg.norm(expected["h"], axis=1) > 0.65
        assert is_clipped.any() and not is_clipped.all()


@pytest.mark.parametrize(
    ("local_steps", "method"), [(3, "econtrol"), (3, "ef21"), (3, "ef"), (3, "none"), (None, "econtrol"), (None, "ef")]
)
def test_pseudo_gradients_of_rounds(local_steps: int | None, method: Any) -> None:
    strategy = Econtrol(TopK(0.1), error_feedback=method, local_steps=local_steps, h0="zero")
    papers = Papers(method, partial(top_k, ratio=0.1), h0="zero")
    assert_equal(train(strategy), every_round(papers, local_steps, as_it_is), KEPT[method])
    each = (CLIENTS - 1) * STEPS * message_bytes(0.1, [WIDTH])
    np.testing.assert_array_equal(strategy.exchange.sent_bytes, [each] * CLIENTS)
    assert strategy.exchange.server_bytes == 0  # nobody sends x: all clients compute it


@pytest.mark.parametrize(
    ("optimizer", "paper"),
    [
        (partial(torch.optim.SGD, lr=ETA, momentum=0.7), sgd(theta=0.7)),
        (partial(torch.optim.AdamW, lr=0.03, betas=(0.9, 0.99), weight_decay=0.1), adamw(0.03, 0.1)),
    ],
    ids=["momentum", "adamw"],
)
def test_the_servers_optimizer_steps_along_the_estimate(optimizer: Any, paper: Optimizer) -> None:
    strategy = Econtrol(TopK(0.1), local_steps=2, server_optimizer=optimizer)
    papers = Papers("econtrol", partial(top_k, ratio=0.1))
    assert_equal(train(strategy), every_round(papers, 2, paper), KEPT["econtrol"])


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("method", ["econtrol", "ef21", "ef", "none"])
def test_without_compression_it_is_descent_along_the_mean(method: Any, local_steps: int) -> None:
    history = train(Econtrol(Identity(), error_feedback=method, local_steps=local_steps))
    x, expected = START_P, []
    for t in range(STEPS):
        if local_steps == 1:
            x = x - ETA * np.mean([gradient(x, *minibatches(i, t, 1)[0]) for i in range(CLIENTS)], axis=0)
        else:
            x = np.mean([local_sgd(x, minibatches(i, 3 * t, 3)) for i in range(CLIENTS)], axis=0)
        expected.append(x)
    np.testing.assert_allclose(history["x"], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("h0", ["exact", "zero", "compressed"])
def test_without_fed_back_errors_econtrol_is_ef21_to_the_bit(h0: Any) -> None:
    econtrol = train(Econtrol(TopK(0.1), eta=0.0, h0=h0))
    ef21 = train(Econtrol(TopK(0.1), error_feedback="ef21", h0=h0))
    for name in ef21:
        np.testing.assert_array_equal(econtrol[name], ef21[name], err_msg=name)


def test_ef21_from_zero_is_ef21_from_a_compressed_gradient() -> None:
    """``C(g - 0)`` is the first message of both."""
    zero, compressed = (train(Econtrol(TopK(0.1), error_feedback="ef21", h0=h0)) for h0 in ("zero", "compressed"))
    np.testing.assert_array_equal(zero["x"], compressed["x"])


@pytest.mark.parametrize(
    ("compressor", "eta"),
    [(TopK(0.1), 7 / WIDTH), (TopK(0.1, "layer"), 2 / 21), (ScaledSign(), 0.03), (LowRank(1), 0.03)],
)
def test_eta_is_the_share_that_the_compressor_keeps_at_least(compressor: Compressor, eta: float) -> None:
    """Of the layers of 35, 7, 21 and 3 the third one keeps least; 0.03 where that is a worst case of no use."""
    by_default, by_hand = (train(Econtrol(compressor, eta=value)) for value in (None, eta))
    np.testing.assert_array_equal(by_default["x"], by_hand["x"])


def test_one_percent_of_the_entries_is_the_default() -> None:
    strategy = EControlStrategy()
    assert repr(strategy.compressor) == "TopK(ratio=0.01, scope='model')"
    assert (strategy.error_feedback, strategy.eta, strategy.h0) == ("econtrol", None, "compressed")
    assert (strategy.local_steps, strategy.rounds_per_epoch, strategy.optimizer_state_policy) == (1, "pass", "keep")
    assert EControlStrategy(local_steps=None).optimizer_state_policy == "reset"


def test_virtual_clients_share_one_model_and_one_optimizer_state() -> None:
    strategy = Econtrol(TopK(0.1))
    train(strategy, AnyOptimizer(partial(torch.optim.SGD, lr=ETA, momentum=0.7)))
    rows = strategy.bank.rows.matrix
    assert rows.shape == (CLIENTS, WIDTH)
    assert {row.data_ptr() for row in rows} == {rows.data_ptr()}
    first = strategy.bank.optimizer_states(0)
    assert all(strategy.bank.optimizer_states(client) is first for client in range(CLIENTS))
    assert len(first[0]) == len(LAYERS)

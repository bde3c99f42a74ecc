"""Clients trained one by one: what a training step, a hook and a callback see, however short the way to them is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer
from torch import Tensor

from lightning_fed.federation.randomness import Stream, derive_seed, seed_generators
from lightning_fed.federation.sampler import JointBatch
from lightning_fed.strategies import FedAvgStrategy, GossipStrategy

Draws = tuple[float, float, float]


def draw() -> Draws:
    return float(torch.rand(())), random.random(), float(np.random.randn())


class Drawing(Classifier):
    """Draws from all three generators in the step and in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.in_steps: dict[tuple[int, int, int], Draws] = {}
        self.in_hooks: list[Draws] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        local_step = self.trainer.strategy.local_step  # type: ignore[attr-defined]
        part = local_step._part
        self.in_steps[local_step.joint.round, part.client, part.index] = draw()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.in_hooks.append(draw())


def test_every_local_step_and_every_hook_draws_from_a_stream_of_its_own() -> None:
    module = Drawing()
    trainer = silent_trainer(FedAvgStrategy(num_clients=3, seed=7, local_steps=2), max_epochs=2)
    trainer.fit(module, *loaders(clients(3)))

    def drawn_from(stream: Stream, *key: int) -> Draws:
        seed_generators(derive_seed(stream, 7, *key), torch.device("cpu"))
        return draw()

    keys = [(round, client, index) for round in range(2) for index in range(2) for client in range(3)]
    assert list(module.in_steps) == keys
    for key, numbers in module.in_steps.items():
        assert numbers == drawn_from(Stream.LOCAL_STEP, *key, 0)
    assert module.in_hooks == [drawn_from(Stream.ROUND, round, index) for round in range(2) for index in range(2)]


class WithoutNumber(Classifier):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class WithAnotherName(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def training_step(self, batch: Any, number: int) -> Tensor:  # type: ignore[override]
        self.numbers.append(number)
        return super().training_step(batch, number)


def fitted(module: pl.LightningModule, **settings: Any) -> pl.Trainer:
    trainer = silent_trainer(GossipStrategy("ring", num_clients=3, seed=0), max_epochs=1, **settings)
    trainer.fit(module, *loaders(clients(3, step=0)))
    return trainer


def rows_after_fit(make: Callable[[], pl.LightningModule], **settings: Any) -> tuple[Any, Tensor]:
    pl.seed_everything(0, verbose=False)
    module = make()
    strategy: Any = fitted(module, **settings).strategy
    return module, strategy.bank.rows.matrix


class Watching(pl.Callback):
    """Makes Lightning's own closure run, with every hook."""

    def on_after_backward(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("callbacks", [[], [Watching()]], ids=["short way", "every hook"])
def test_a_step_gets_the_arguments_that_it_takes(callbacks: list[pl.Callback]) -> None:
    (_, usual), (_, without), (named, other) = (
        rows_after_fit(make, callbacks=callbacks) for make in (Classifier, WithoutNumber, WithAnotherName)
    )
    assert torch.equal(usual, without) and torch.equal(usual, other)
    assert named.numbers == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_loop_is_lightnings_own_again_after_the_fit() -> None:
    loop = fitted(Classifier()).fit_loop.epoch_loop
    assert [name for name in vars(loop) if callable(getattr(type(loop), name, None))] == []


def minibatch_sizes(batch: JointBatch) -> list[int]:
    return [len(part.batch[1]) for part in batch.parts]


class LookingAtStart(pl.Callback):
    seen: list[int]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += minibatch_sizes(batch)


class LookingAtEnd(pl.Callback):
    seen: list[int]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += minibatch_sizes(batch)


class LookingModule(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen += minibatch_sizes(batch)


@pytest.mark.parametrize("looking", [LookingAtStart, LookingAtEnd])
def test_a_callback_finds_every_clients_minibatch(looking: type[LookingAtStart | LookingAtEnd]) -> None:
    callback = looking()
    callback.seen = []
    fitted(Classifier(), callbacks=[callback])
    assert callback.seen == [4, 4, 4, 4, 4, 4, 2, 2, 2]


def test_a_hook_of_the_module_finds_every_clients_minibatch() -> None:
    module = LookingModule()
    fitted(module)
    assert module.seen == [4, 4, 4, 4, 4, 4, 2, 2, 2]


def test_a_hook_of_the_optimizer_is_called_for_every_local_step() -> None:
    class Counting(Classifier):
        calls = 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(self.count)
            return optimizer

        def count(self, *args: Any) -> None:
            self.calls += 1

    (counting, counted), (_, plain) = rows_after_fit(Counting), rows_after_fit(Classifier)
    assert counting.calls == 9
    assert torch.equal(counted, plain)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_short_way_and_lightnings_own_give_the_same_rows(accumulate: int, weight_decay: float) -> None:
    class Decaying(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=weight_decay)

    (_, short), (_, long) = (
        rows_after_fit(Decaying, callbacks=callbacks, accumulate_grad_batches=accumulate)
        for callbacks in ([], [Watching()])
    )
    assert torch.equal(short, long)

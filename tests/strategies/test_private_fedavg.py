"""DP-FedAvg's trajectory, round by round, against the paper's Algorithm 1 in NumPy, given the same noise.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018, with its
fixed-denominator estimator; the clipping by layers of Pelikan et al. 2023.

Shapes: R = rounds, N = clients, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from paper_problem import (
    CLASSES,
    CLIENTS,
    FEATURES,
    HIDDEN,
    INPUTS,
    ROUNDS,
    SHARDS,
    START_P,
    TOLERANCE,
    TwoLayers,
    loader_of,
    local_sgd,
    pass_over_shard,
    quiet_trainer,
)

from lightning_fed import FedAvgStrategy, UserLevelPrivacy
from lightning_fed.privacy import Secret

CLIP, MULTIPLIER, COHORT, SEED = 0.4, 0.7, 3, 5
SIZES = [HIDDEN * FEATURES, HIDDEN, CLASSES * HIDDEN, CLASSES]  # of the layers


# -------------------------------------------------------------------------------------------------------- the papers


def norm(vector: np.ndarray) -> float:
    return float(np.sqrt(np.sum(vector**2)))


def clip(update: np.ndarray, clipping: str) -> np.ndarray:
    if clipping == "whole":
        return update * min(1.0, CLIP / norm(update))
    if norm(update) < CLIP:
        return update
    layers = np.split(update, np.cumsum(SIZES)[:-1])
    share = {"layers": lambda layer: 1 / len(layers), "layers_by_size": lambda layer: len(layer) / len(update)}
    return np.concatenate([layer * CLIP * np.sqrt(share[clipping](layer)) / norm(layer) for layer in layers])


def dp_fedavg(
    cohorts: list[np.ndarray], noises: list[np.ndarray], clipping: str, server: Any, mu: float
) -> Iterator[np.ndarray]:
    """The server's model after each round."""
    x = START_P
    for cohort, noise in zip(cohorts, noises):
        updates = [local_sgd(x, pass_over_shard(k), mu=mu) - x for k in cohort]
        delta = sum(clip(update, clipping) for update in updates) / len(cohort)
        delta = delta + MULTIPLIER * CLIP / len(cohort) * noise
        x = x + (delta if server is None else server(delta))
        yield x


def heavy_ball(lr: float, beta: float) -> Any:
    momentum: Any = 0.0

    def step(delta: np.ndarray) -> np.ndarray:
        nonlocal momentum
        momentum = beta * momentum + delta
        return lr * momentum

    return step


# -------------------------------------------------------------------------------------------------------- the package


class RecordServer(Callback):
    """Keeps the server's model of every round, and how many rounds each client took part in."""

    def __init__(self) -> None:
        self.models: list[np.ndarray] = []
        self.cohorts: list[np.ndarray] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch.index == 0:
            self.cohorts.append(trainer.strategy.cohort)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.models.append(trainer.strategy.server_row().numpy().copy())


def train(strategy: FedAvgStrategy, epochs: int = ROUNDS, module: Any = None) -> RecordServer:
    record = RecordServer()
    quiet_trainer(epochs, strategy=strategy, callbacks=[record]).fit(module or TwoLayers(), loader_of(SHARDS))
    return record


def private(clipping: Any = "whole", **settings: Any) -> FedAvgStrategy:
    privacy = UserLevelPrivacy(CLIP, MULTIPLIER, delta=1e-3, clipping=clipping, secret_seed=SEED)
    return FedAvgStrategy(num_clients=CLIENTS, weighting="uniform", privacy=privacy, **settings)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


@pytest.mark.parametrize(
    ("clipping", "cohort_size", "with_optimizer"),
    [
        ("whole", None, False),
        ("whole", COHORT, False),
        ("whole", COHORT, True),
        ("layers", None, False),
        ("layers", COHORT, True),
        ("layers_by_size", None, True),
        ("layers_by_size", COHORT, False),
    ],
)
def test_the_trajectory_is_the_papers(clipping: str, cohort_size: int | None, with_optimizer: bool) -> None:
    strategy = private(clipping, cohort_size=cohort_size, server_optimizer=sgd if with_optimizer else None, mu=0.1)
    record = train(strategy)
    noises = [Secret.draw(SEED).noise(round, len(START_P)) for round in range(ROUNDS)]
    server = heavy_ball(0.5, 0.9) if with_optimizer else None
    paper = list(dp_fedavg(record.cohorts, noises, clipping, server, mu=0.1))
    np.testing.assert_allclose(record.models, paper, rtol=0, atol=TOLERANCE)


def test_cohorts_are_drawn_from_the_secret_alone() -> None:
    one, other = (train(private(cohort_size=COHORT, seed=seed), epochs=5).cohorts for seed in (0, 1))
    np.testing.assert_array_equal(one, other)
    public = train(FedAvgStrategy(num_clients=CLIENTS, cohort_size=COHORT, seed=0), epochs=5).cohorts
    assert not np.array_equal(one, public)


@pytest.mark.parametrize("cohort_size", [None, COHORT])
def test_two_runs_share_neither_noise_nor_cohorts_without_a_seed(cohort_size: int | None) -> None:
    def strategy() -> FedAvgStrategy:
        privacy = UserLevelPrivacy(CLIP, MULTIPLIER, 1e-3)
        return FedAvgStrategy(
            num_clients=CLIENTS, cohort_size=cohort_size, weighting="uniform", privacy=privacy, seed=0
        )

    one, other = train(strategy(), epochs=4), train(strategy(), epochs=4)
    assert not np.isclose(one.models, other.models).any(axis=1).all()
    assert (cohort_size is None) == all(map(np.array_equal, one.cohorts, other.cohorts))


def test_another_fit_draws_anew() -> None:
    privacy = UserLevelPrivacy(CLIP, MULTIPLIER, 1e-3)
    strategy = FedAvgStrategy(num_clients=CLIENTS, cohort_size=COHORT, weighting="uniform", privacy=privacy)
    record, secrets = RecordServer(), set()
    trainer = quiet_trainer(0, strategy=strategy, callbacks=[record])
    for _ in range(3):
        trainer.fit_loop.max_epochs += 1
        trainer.fit(TwoLayers(), loader_of(SHARDS))
        secrets.add(strategy._secret.key)
        np.testing.assert_array_equal(record.cohorts[-1], strategy.participation.cohort(0, CLIENTS, strategy.seed))
    assert len(secrets) == len(record.cohorts) == 3


def test_clients_that_train_together_are_as_private() -> None:
    alone, together = (train(private(clients_per_step=number), epochs=4) for number in (1, 4))
    np.testing.assert_allclose(together.models, alone.models, rtol=0, atol=1e-12)


class Breaking(TwoLayers):
    """Client 2 (the only one with 8 samples) gets a model that is not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.is_broken(batch) else 1)

    def is_broken(self, batch: Any) -> bool:
        return bool((batch[0][0] == torch.from_numpy(INPUTS[SHARDS[2][0]])).all())


def test_a_dropped_client_counts_as_an_update_of_zero() -> None:
    record = train(private(on_nonfinite="drop"), epochs=1, module=Breaking())
    updates = [clip(local_sgd(START_P, pass_over_shard(k)) - START_P, "whole") for k in range(CLIENTS) if k != 2]
    noise = MULTIPLIER * CLIP * Secret.draw(SEED).noise(0, len(START_P))
    expected = START_P + (sum(updates) + noise) / CLIENTS
    np.testing.assert_allclose(record.models[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_noise_is_not_rounded_with_the_rows(precision: Any) -> None:
    """What clients send is rounded to short numbers; the noise that hides it has all of its own."""
    strategy = private(evaluate="clients")
    sums = []

    class Watching(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = strategy._server.step
            strategy._server.step = lambda update: (sums.append(update.clone()), before(update))[1]

    trainer = quiet_trainer(1, precision, strategy=strategy, callbacks=[Watching()])
    trainer.fit(TwoLayers().to(torch.float32), loader_of(SHARDS))
    rows, start = strategy.bank.rows.matrix.double().numpy(), torch.from_numpy(START_P).float()
    start_P = start.to(strategy.bank.rows.matrix.dtype).double().numpy()
    noise = MULTIPLIER * CLIP * Secret.draw(SEED).noise(0, len(START_P))
    np.testing.assert_allclose(-sums[0].numpy(), ((rows - start_P).sum(axis=0) + noise) / CLIENTS, atol=1e-13)


class SaveWithinARound(RecordServer):
    """Writes a checkpoint after the third joint step, when a round and a half are over."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3 and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("cohort_size", [None, COHORT])
def test_a_resumed_run_goes_on_with_its_own_secret(cohort_size: int | None, tmp_path: Path) -> None:
    path = tmp_path / "third.ckpt"

    def fit(resume: Path | None) -> tuple[FedAvgStrategy, list[np.ndarray]]:
        settings: dict[str, Any] = {"cohort_size": cohort_size, "weighting": "uniform", "local_steps": 2}
        strategy = FedAvgStrategy(num_clients=CLIENTS, privacy=UserLevelPrivacy(CLIP, MULTIPLIER, 1e-3), **settings)
        record = SaveWithinARound(path)
        trainer = quiet_trainer(4, strategy=strategy, callbacks=[record])
        trainer.fit(TwoLayers(), loader_of(SHARDS, shuffle=True), ckpt_path=resume)
        return strategy, record.models

    (whole, models), (resumed, last_models) = fit(None), fit(path)
    np.testing.assert_array_equal(last_models, models[1:])
    assert resumed.epsilon() == whole.epsilon() == whole.privacy.epsilon(4, cohort_size or CLIENTS, CLIENTS)
    secret = whole._secret.key
    assert secret not in path.read_bytes() and secret.hex().encode() not in path.read_bytes()  # the file of the model


@pytest.mark.parametrize("change", [{"privacy": None}, {"cohort_size": 4}, {"multiplier": 0.8}])
def test_rounds_of_another_privacy_are_not_continued(change: dict[str, Any], tmp_path: Path) -> None:
    def strategy(cohort_size: int = COHORT, multiplier: float = MULTIPLIER, **settings: Any) -> FedAvgStrategy:
        settings = {"privacy": UserLevelPrivacy(CLIP, multiplier, 1e-3), **settings}
        return FedAvgStrategy(num_clients=CLIENTS, cohort_size=cohort_size, weighting="uniform", **settings)

    trainer = quiet_trainer(1, strategy=strategy())
    trainer.fit(TwoLayers(), loader_of(SHARDS))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match='has privacy="UserLevelPrivacy'):
        quiet_trainer(2, strategy=strategy(**change)).fit(
            TwoLayers(), loader_of(SHARDS), ckpt_path=tmp_path / "one.ckpt"
        )

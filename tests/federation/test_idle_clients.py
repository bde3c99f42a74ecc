"""A stateless algorithm holds no row for a client that is not in the cohort, and nobody sees a difference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer
from torch import Tensor, nn

from lightning_fed import FedAvgStrategy, GossipStrategy
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.strategy import FederatedStrategy

N, COHORT = 7, 3
Sampled = partial(FedAvgStrategy, num_clients=N, cohort_size=COHORT)


class Counting(Classifier):
    """Its BatchNorm averages over all steps that its client has taken: integers that train the model."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(momentum=0.9, **settings)
        if isinstance(self.net[1], nn.BatchNorm1d):
            self.net[1].momentum = None


class Manual(Counting):
    """Leaves its last gradient behind after each step."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def fit(
    strategy: FederatedStrategy, make: Callable[[], Classifier] = Counting, resume: str | None = None, **settings: Any
) -> np.ndarray:
    """Train; returns what is exported: parameters, BatchNorm statistics, the count of steps."""
    pl.seed_everything(5, verbose=False)
    trainer, module = silent_trainer(strategy, **{"max_epochs": 4, **settings}), make()
    trainer.fit(module, *loaders(clients(strategy.num_clients)), ckpt_path=resume)
    return torch.cat([value.flatten() for value in module.state_dict().values()]).numpy()


@pytest.mark.parametrize("module", [Counting, Manual])
@pytest.mark.parametrize("place", ["device", "cpu"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer_state": "keep", "mu": 0.1},
        {"rounds_per_epoch": 2, "server_optimizer": partial(torch.optim.Adam, lr=0.05)},
    ],
    ids=["fedavg", "fedprox", "fedadam"],
)
def test_it_is_the_same_training_as_with_all_rows(settings: dict[str, Any], place: Any, module: Any) -> None:
    lean, full = Sampled(**settings, rows_device=place), Sampled(**settings, evaluate="both")
    np.testing.assert_array_equal(fit(lean, module), fit(full, module))
    assert not lean.keeps_rows and full.keeps_rows
    assert lean.bank.rows.matrix.shape[0] == COHORT and full.bank.rows.matrix.shape[0] == N
    last = lean.participation.cohort(lean.round - 1, N, lean.seed)
    assert list(lean.bank.present) == last.tolist() == lean.exchange.holders.tolist()
    for mine, theirs in zip(lean.bank.matrices[:2], full.bank.matrices[:2]):
        np.testing.assert_array_equal(mine.matrix.numpy(), theirs.matrix[last].numpy())
    for client in range(N):
        assert torch.equal(lean.bank.counters_of(client), full.bank.counters_of(client))
    np.testing.assert_array_equal(lean.exchange.sent_bytes, full.exchange.sent_bytes)
    assert lean.exchange.server_bytes == full.exchange.server_bytes


def kept_bytes(strategy: FederatedStrategy) -> int:
    """Of all tensors that grow with rows."""
    storages = {rows.matrix.untyped_storage().data_ptr(): rows.matrix for rows in strategy.bank.matrices}
    idle: list[Tensor] = list(strategy.bank._idle_counters.values())
    gradients = [g for kept in strategy.bank._gradients.values() for g in kept if g is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in [*storages.values(), *idle, *gradients])


@pytest.mark.parametrize(
    "module", [partial(Classifier, norm=False), partial(Manual, norm=False)], ids=["auto", "manual"]
)
def test_memory_does_not_grow_with_the_number_of_clients(module: Any) -> None:
    kept = []
    for num_clients in (4, 60):
        strategy = FedAvgStrategy(num_clients=num_clients, cohort_size=COHORT)
        fit(strategy, module, max_epochs=25)
        kept.append(kept_bytes(strategy))
    assert kept[1] <= kept[0]


def test_cohorts_of_one_size_use_the_same_memory() -> None:
    addresses = set()

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            addresses.add(trainer.strategy.bank.rows.matrix.data_ptr())

    fit(Sampled(), callbacks=[Look()])
    assert len(addresses) == 1


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ({}, False),
        ({"evaluate": "clients"}, True),
        ({"evaluate": "both"}, True),
        ({"float_buffers": "local"}, True),
        ({"on_peer_loss": "drop"}, False),  # on one rank, which has nobody to lose
    ],
    ids=str,
)
def test_rows_are_kept_where_they_are_needed(settings: dict[str, Any], keeps: bool) -> None:
    assert Sampled(**settings).keeps_rows == keeps


def test_algorithms_whose_clients_go_on_from_their_rows_keep_them() -> None:
    assert GossipStrategy(num_clients=N, participation=UniformSample(COHORT)).keeps_rows


class Measure(pl.Callback):
    """The consensus distance of each round, and what it should be."""

    def __init__(self) -> None:
        self.measured: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert trainer.strategy.consensus_distance() == 0  # there are no rows yet

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        rows = trainer.strategy.bank.rows.matrix
        assert len(rows) == COHORT
        expected = float((rows - rows.mean(dim=0)).square().sum(dim=1).mean().sqrt())
        self.measured.append(trainer.strategy.consensus_distance())
        assert self.measured[-1] == pytest.approx(expected, rel=1e-5) and expected > 1e-3


def test_the_consensus_distance_is_the_cohorts() -> None:
    measure = Measure()
    fit(Sampled(), callbacks=[measure])
    assert len(set(measure.measured)) == 4


def test_a_client_that_is_not_finite_restarts_from_its_cohort() -> None:
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            strategy, batch = trainer.strategy, _[2]
            if batch.round == 2 and batch.index == 0:
                self.client = batch.parts[1].client
                strategy.bank.rows.matrix[strategy.bank.slot(self.client)] = torch.nan

    for settings in ({}, {"evaluate": "both"}):
        strategy, spoil = Sampled(on_nonfinite="drop", **settings), Spoil()
        with pytest.warns(UserWarning, match="are not finite and restart"):
            exported = fit(strategy, callbacks=[spoil], max_epochs=3)
        assert strategy.dropped.tolist() == [spoil.client]
        assert np.isfinite(exported).all() and torch.isfinite(strategy.bank.rows.matrix).all()


# -------------------------------------------------------------------------------------------------------- checkpoints


class Save(pl.Callback):
    """Saves in the middle of a round, and after each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        batch = _[2]
        if (batch.round, batch.index) == (2, 1):
            trainer.save_checkpoint(self.directory / "middle.ckpt")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.directory / f"after{trainer.strategy.round}.ckpt")


@pytest.mark.parametrize("settings", [{}, {"optimizer_state": "keep"}], ids=str)
def test_resuming_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    strategy = Sampled(**settings)
    whole = fit(strategy, callbacks=[Save(tmp_path)])
    for name in ("middle", "after1", "after3"):
        resumed = Sampled(**settings)
        np.testing.assert_array_equal(fit(resumed, resume=str(tmp_path / f"{name}.ckpt")), whole, err_msg=name)
        assert torch.equal(resumed.bank.rows.matrix, strategy.bank.rows.matrix)
        for client in range(N):
            assert torch.equal(resumed.bank.counters_of(client), strategy.bank.counters_of(client))


def test_a_run_that_kept_rows_may_resume_without_and_not_the_other_way_round(tmp_path: Path) -> None:
    whole = fit(Sampled(evaluate="both"), callbacks=[Save(tmp_path)])
    for name in ("middle", "after2"):
        np.testing.assert_array_equal(fit(Sampled(), resume=str(tmp_path / f"{name}.ckpt")), whole)
    fit(Sampled(), callbacks=[Save(tmp_path)])
    with pytest.raises(ValueError, match=r"has no row of client \d.*evaluate='consensus' and float_buffers='mix'"):
        fit(Sampled(evaluate="both"), resume=str(tmp_path / "after2.ckpt"))


def test_a_checkpoint_holds_rows_of_the_cohort_alone(tmp_path: Path) -> None:
    fit(Sampled(), callbacks=[Save(tmp_path)])
    (block,) = tmp_path.glob("middle.federation-*/clients-*.pt")
    content = torch.load(block, weights_only=True)
    assert len(content["present"]) == len(content["rows"]) == len(content["buffers"]) == COHORT
    assert len(content["counters"]) == N

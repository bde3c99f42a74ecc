"""What the bar says, and how often."""

from __future__ import annotations

import re
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.callbacks import FederationMonitor, RoundProgressBar
from lightning_fed.data import FederatedDataset
from lightning_fed.strategies import FedAvgStrategy, GossipStrategy

N = 4


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self.layer(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recorder(RoundProgressBar):
    """Remembers what the bar would say after each update."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.said: list[tuple[str, float, float | None, dict[str, Any]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:  # type: ignore[override]
        super().on_train_batch_end(trainer, pl_module, *args)
        bar = self.train_progress_bar
        self.said.append((bar.desc, bar.n, bar.total, self.get_metrics(trainer, pl_module)))


def samples(count: int = 32) -> TensorDataset:
    return TensorDataset(torch.randn(count, 3), torch.randint(2, (count,)))


def fit(strategy: Any, *callbacks: pl.Callback, data: Any = None, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        callbacks=list(callbacks),
        enable_model_summary=False,
        **{**defaults, **settings},
    )
    trainer.fit(Linear(), DataLoader(data or samples(), 4, shuffle=True), DataLoader(samples(), 16))
    return trainer


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


def test_it_counts_rounds_and_joint_steps(terminal):
    bar = Recorder()
    fit(GossipStrategy(num_clients=N, rounds_per_epoch=2), FederationMonitor(plots=False), bar)
    # Two joint steps a round, two rounds an epoch, two epochs.
    assert [said[0] for said in bar.said] == [f"Round {round}/4: " for round in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert [said[1:3] for said in bar.said] == [(step, 4) for step in (1, 2, 3, 4, 1, 2, 3, 4)]


def test_it_shows_cohort_accuracy_consensus_and_the_users_own(terminal):
    bar = Recorder()
    strategy = FedAvgStrategy(num_clients=N, cohort_size=3, evaluate="both")
    trainer = fit(strategy, bar, FederationMonitor(plots=False), num_sanity_val_steps=0)
    first, last = bar.said[0][3], bar.said[-1][3]
    assert set(first) == {"cohort", "train_loss"}
    assert list(last) == ["cohort", "val_acc", "consensus", "train_loss"]
    assert last["cohort"] == 3
    at_the_end = bar.get_metrics(trainer, trainer.lightning_module)
    assert at_the_end["consensus"] == pytest.approx(strategy.consensus_distance())


def test_without_an_end_or_a_number_of_steps_it_names_neither(terminal):
    shards = [torch.arange(4 * client, 4 * client + 4 + 4 * (client == 3)).numpy() for client in range(N)]
    bar = Recorder()
    data = FederatedDataset(samples(), shards)
    fit(FedAvgStrategy(num_clients=N, cohort_size=1), bar, data=data, max_epochs=-1, max_steps=3)
    assert {said[0] for said in bar.said} <= {"Round 1: ", "Round 2: ", "Round 3: "}
    assert {said[2] for said in bar.said} == {None}
    assert set(bar.said[0][3]) >= {"cohort", "train_loss"}


def test_a_log_file_is_not_flooded(capsys):
    fit(GossipStrategy(num_clients=N), RoundProgressBar(), max_epochs=30)
    out = capsys.readouterr().out
    assert len(re.split(r"[\r\n]+", out.strip())) <= 3
    assert "Round 30/30: 100%" in out and "cohort=4" in out and "val_acc=" in out


@pytest.mark.parametrize("tty", [True, False])
def test_validate_has_a_bar(tty, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    trainer = fit(GossipStrategy(num_clients=N), RoundProgressBar())
    capsys.readouterr()
    trainer.validate(trainer.lightning_module, DataLoader(samples(), 4), verbose=False)
    assert "Validation DataLoader 0: 100%" in capsys.readouterr().out


def test_refresh_rate_zero_is_silent(capsys):
    fit(GossipStrategy(num_clients=N), RoundProgressBar(refresh_rate=0))
    assert capsys.readouterr().out == ""


def test_another_strategy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"RoundProgressBar .* SingleDeviceStrategy: pass a federated one"):
        fit("auto", RoundProgressBar())

"""What the monitor logs, draws and remembers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.image import imread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import MembershipSchedule, VirtualClock
from lightning_fed.callbacks import FederationMonitor
from lightning_fed.callbacks.federation_plots import (
    AGGREGATED,
    COLOURS,
    JOINED,
    LEFT,
    OFFLINE,
    TRAINED,
    draw_labels,
    draw_participation,
    draw_topology,
)
from lightning_fed.data import ClientDataModule
from lightning_fed.strategies import FedAvgStrategy, GossipStrategy, MoDeSTStrategy
from lightning_fed.topology import Ring

N, P = 5, 3 * 2 + 2
MEASURED = ["fed/bytes_sent", "fed/cohort_size", "fed/consensus_distance", "fed/round", "fed/update_norm"]


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.log("train_acc", self.accuracy(batch), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.accuracy(batch))

    def accuracy(self, batch: Any) -> Tensor:
        return (self.layer(batch[0]).argmax(dim=1) == batch[1]).float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples(count: int = 40) -> TensorDataset:
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(features, (features[:, 0] > 0).long())


def loaders() -> list[DataLoader[Any]]:
    return [DataLoader(samples(), 4, shuffle=True), DataLoader(samples(), 40)]


def trainer_of(strategy: Any, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, callbacks=list(callbacks), **{**defaults, **settings}
    )


def rows_of(csv_file: Path) -> list[dict[str, str]]:
    with csv_file.open() as file:
        return list(csv.DictReader(file))


def column(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name]]


def is_a_picture(path: Path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 200 and float(pixels[..., :3].std()) > 0.01


class Rows(pl.Callback):
    """Remembers all rows when training begins and after each round, before or after the monitor."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(trainer.strategy.bank.rows.matrix.double().numpy().copy())  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if args[1].is_last_of_round:
            self.on_train_start(trainer, pl_module)


def test_every_round_is_logged_with_what_it_did(tmp_path):
    rows = Rows()
    strategy = GossipStrategy(num_clients=N, rounds_per_epoch=2)
    trainer = trainer_of(
        strategy, FederationMonitor(), rows, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1), log_every_n_steps=3
    )
    trainer.fit(Linear(), *loaders())

    logged = rows_of(Path(trainer.log_dir) / "metrics.csv")
    assert all(set(row) == {*MEASURED, "epoch", "step", "train_loss", "train_acc", "val_acc"} for row in logged)
    assert column(logged, "fed/round") == [1, 2, 3, 4, 5, 6]
    assert column(logged, "fed/cohort_size") == [N] * 6
    # On a ring each client sends its row, float32, to two neighbours.
    assert column(logged, "fed/bytes_sent") == [round * N * 2 * 4 * P for round in range(1, 7)]
    means = [row.mean(axis=0) for row in rows.seen]
    norms = [np.linalg.norm(after - before) for before, after in pairwise(means)]
    assert column(logged, "fed/update_norm") == pytest.approx(norms, rel=1e-4)
    distances = [np.sqrt(((row - row.mean(axis=0)) ** 2).sum(axis=1).mean()) for row in rows.seen[1:]]
    assert column(logged, "fed/consensus_distance") == pytest.approx(distances, rel=1e-4)
    steps = [float(row["step"]) for row in logged if row["fed/round"]]
    assert steps == [1, 3, 5, 7, 9, 11]  # 8 samples a client are two joint steps a round
    assert len(column(logged, "val_acc")) == 3


def test_server_bytes_and_cohort_of_the_round_that_ended():
    class Cohorts(pl.Callback):
        sizes: list[tuple[float, float]] = []

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                metrics = trainer.callback_metrics
                self.sizes.append((float(metrics["fed/cohort_size"]), float(metrics["fed/bytes_sent"])))

    watcher = Cohorts()
    trainer = trainer_of(FedAvgStrategy(num_clients=N, cohort_size=2), FederationMonitor(plots=False), watcher)
    trainer.fit(Linear(), *loaders())
    assert watcher.sizes == [(2, round * 2 * 2 * 4 * P) for round in (1, 2, 3)]  # two down, two up


def test_early_stopping_and_checkpoints_can_monitor_a_round_from_the_first_one_on(tmp_path):
    stopping = EarlyStopping("fed/consensus_distance", patience=1, mode="max", min_delta=1e9)
    checkpoint = ModelCheckpoint(tmp_path, monitor="fed/update_norm", filename="best")
    trainer = trainer_of(
        GossipStrategy(num_clients=N), FederationMonitor(plots=False), stopping, checkpoint, max_epochs=9
    )
    trainer.fit(Linear(), *loaders())
    assert trainer.current_epoch == 2
    assert checkpoint.best_model_score is not None


def test_every_n_rounds(tmp_path):
    trainer = trainer_of(
        GossipStrategy(num_clients=N), FederationMonitor(every_n_rounds=2), logger=CSVLogger(tmp_path), max_epochs=5
    )
    trainer.fit(Linear(), *loaders())
    assert column(rows_of(Path(trainer.log_dir) / "metrics.csv"), "fed/round") == [2, 4]


def test_pictures_lie_in_the_loggers_directory(tmp_path):
    trainer = trainer_of(GossipStrategy(num_clients=N), FederationMonitor(), logger=CSVLogger(tmp_path))
    trainer.fit(Linear(), *loaders())
    pictures = sorted((Path(trainer.log_dir) / "federation").iterdir())
    assert [picture.name for picture in pictures] == ["bytes.png", "labels.png", "progress.png", "topology.png"]
    assert all(map(is_a_picture, pictures))


def test_without_labels_topology_or_validation_the_other_pictures_are_drawn(tmp_path, caplog):
    class Regression(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    data = TensorDataset(torch.randn(20, 3), torch.randn(20, 2))
    trainer = trainer_of(FedAvgStrategy(num_clients=N), FederationMonitor(str(tmp_path / "here")))
    with caplog.at_level("INFO"):
        trainer.fit(Regression(), DataLoader(data, 4))
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["progress.png"]  # all trained in all rounds
    assert caplog.text.count("no labels.png") == 1


def test_nothing_is_written_by_a_fast_dev_run_or_without_plots(in_tmp_path):
    for monitor, settings in ((FederationMonitor(), {"fast_dev_run": True}), (FederationMonitor(plots=False), {})):
        trainer_of(GossipStrategy(num_clients=N), monitor, **settings).fit(Linear(), *loaders())
    assert not list(in_tmp_path.iterdir())


def test_label_counts_of_a_data_module_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "lightning_fed.callbacks.federation_monitor.draw_labels",
        lambda counts: drawn.append(counts) or draw_labels(counts),
    )
    data = ClientDataModule(samples(), samples(), num_clients=N, batch_size=4)
    trainer = trainer_of(GossipStrategy(num_clients=N), FederationMonitor(str(tmp_path)), max_epochs=1)
    trainer.fit(Linear(), datamodule=data)
    trainer = trainer_of(GossipStrategy(num_clients=N), FederationMonitor(str(tmp_path)), max_epochs=1)
    trainer.fit(Linear(), DataLoader(data.train_dataset, 4, shuffle=True))
    np.testing.assert_array_equal(drawn[0], data.label_counts)
    np.testing.assert_array_equal(drawn[1], data.label_counts)


def curves_of(monitor: FederationMonitor) -> dict[str, Any]:
    return {name: value for name, value in monitor.state_dict().items() if name != "model"}


def test_a_resumed_run_draws_whole_curves(tmp_path):
    checkpoint = tmp_path / "half.ckpt"
    monitor = FederationMonitor(str(tmp_path))
    trainer = trainer_of(GossipStrategy(num_clients=N, seed=1), monitor, max_epochs=2)
    trainer.fit(Linear(), *loaders())
    trainer.save_checkpoint(checkpoint)
    torch.load(checkpoint, weights_only=True)

    resumed, whole = FederationMonitor(str(tmp_path)), FederationMonitor(str(tmp_path))
    settings: dict[str, Any] = {"max_epochs": 4}
    trainer_of(GossipStrategy(num_clients=N, seed=1), resumed, **settings).fit(
        Linear(), *loaders(), ckpt_path=checkpoint
    )
    trainer_of(GossipStrategy(num_clients=N, seed=1), whole, **settings).fit(Linear(), *loaders())
    assert [point[0] for point in resumed.consensus_distances] == [1, 2, 3, 4]
    assert curves_of(resumed) == curves_of(whole)
    assert list(whole.accuracies) == ["val_acc"]


def modest(**settings: Any) -> MoDeSTStrategy:
    """Client 4 comes in round 2, clients 0 and 1 crash in round 3, client 0 returns in round 5."""
    schedule = MembershipSchedule(joins={2: [4], 5: [0]}, crashes={3: [0, 1]})
    defaults: dict[str, Any] = {"num_clients": N, "sample_size": 2, "seed": 1, "availability": schedule}
    return MoDeSTStrategy(**{**defaults, **settings})


def test_the_rounds_of_modest_are_logged(tmp_path):
    strategy = modest(clock=VirtualClock(seconds_per_step=0.5))
    trainer = trainer_of(strategy, FederationMonitor(), logger=CSVLogger(tmp_path), max_epochs=6)
    trainer.fit(Linear(), *loaders())
    logged = rows_of(Path(trainer.log_dir) / "metrics.csv")
    plans = strategy.replay(6)
    assert column(logged, "fed/live_nodes") == [plan.live for plan in plans] == [4, 5, 3, 3, 4, 4]
    assert column(logged, "fed/aggregators") == [len(plan.averages) for plan in plans]
    assert column(logged, "fed/ping_timeouts") == [plan.ping_timeouts for plan in plans]
    assert sum(column(logged, "fed/ping_timeouts")) > 0
    assert column(logged, "fed/models_received") == [plan.models_received for plan in plans]
    assert column(logged, "fed/restarts") == [plan.restarts for plan in plans]
    assert column(logged, "fed/round_seconds") == pytest.approx([plan.ended - plan.began for plan in plans])
    assert column(logged, "fed/virtual_seconds") == pytest.approx([plan.ended for plan in plans])
    trained = np.cumsum([plan.training_seconds for plan in plans])
    assert column(logged, "fed/training_seconds") == pytest.approx(trained)
    assert is_a_picture(Path(trainer.log_dir) / "federation" / "participation.png")


def test_a_virtual_clock_is_logged_for_any_algorithm():
    trainer = trainer_of(
        GossipStrategy(num_clients=N, clock=VirtualClock(seconds_per_step=0.5, latency=0.25, bandwidth=float("inf"))),
        FederationMonitor(plots=False),
    )
    trainer.fit(Linear(), *loaders())
    assert trainer.callback_metrics["fed/virtual_seconds"] == 3 * (2 * 0.5 + 0.25)
    assert trainer.callback_metrics["fed/training_seconds"] == 3 * N * 2 * 0.5


def test_who_trained_when_is_recorded():
    monitor, strategy = FederationMonitor(plots=False, every_n_rounds=4), modest()
    trainer_of(strategy, monitor, max_epochs=6).fit(Linear(), *loaders())
    deeds = np.array([list(monitor.participation[round]) for round in range(1, 7)])
    for plan, did in zip(strategy.replay(6), deeds, strict=True):
        assert np.flatnonzero(did & TRAINED).tolist() == sorted(plan.starts)
        assert np.flatnonzero(did & AGGREGATED).tolist() == sorted(plan.averages)
    assert np.argwhere(deeds & JOINED).tolist() == [[1, 4], [4, 0]]
    assert np.argwhere(deeds & LEFT).tolist() == [[2, 0], [2, 1]]
    assert np.argwhere(deeds & OFFLINE).tolist() == [[0, 4], [2, 0], [2, 1], [3, 0], [3, 1], [4, 1], [5, 1]]


def test_a_sampled_cohort_is_recorded_and_drawn(tmp_path):
    monitor, strategy = FederationMonitor(str(tmp_path)), FedAvgStrategy(num_clients=N, cohort_size=2)
    trainer_of(strategy, monitor).fit(Linear(), *loaders())
    for round in range(3):
        cohort = strategy.participation.cohort(round, N, strategy.seed)
        assert np.flatnonzero(list(monitor.participation[round + 1])).tolist() == cohort.tolist()
    assert is_a_picture(tmp_path / "participation.png")


def test_a_resumed_run_draws_who_trained_from_the_first_round(tmp_path):
    monitor, whole, resumed = (FederationMonitor(plots=False) for _ in range(3))
    trainer = trainer_of(modest(), monitor, max_epochs=3)
    trainer.fit(Linear(), *loaders())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    trainer_of(modest(), resumed, max_epochs=6).fit(Linear(), *loaders(), ckpt_path=tmp_path / "half.ckpt")
    trainer_of(modest(), whole, max_epochs=6).fit(Linear(), *loaders())
    assert list(whole.participation) == [1, 2, 3, 4, 5, 6]
    assert curves_of(resumed) == curves_of(whole)


def test_a_thousand_clients_and_many_rounds_are_a_raster_in_which_every_crash_is_seen(tmp_path):
    deeds = np.zeros((1000, 1500), dtype=np.uint8)
    deeds[np.random.default_rng(0).integers(0, 1000, (13, 1500)), np.arange(1500)] = TRAINED
    deeds[7, 1234] = LEFT
    figure = draw_participation(list(range(1, 1501)), deeds)
    cells = np.asarray(figure.axes[0].images[0].get_array())
    assert cells.shape == (1000, 500)
    crash = 1 + [bit for bit, _, _ in COLOURS].index(LEFT)
    assert np.argwhere(cells == crash).tolist() == [[7, 1234 // 3]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["trained", "went offline"]
    figure.savefig(tmp_path / "participation.png")
    assert is_a_picture(tmp_path / "participation.png")


def test_a_second_federation_begins_new_curves():
    monitor = FederationMonitor(plots=False)
    for _ in range(2):
        trainer_of(GossipStrategy(num_clients=N), monitor).fit(Linear(), *loaders())
        assert list(monitor.participation) == [1, 2, 3]
        assert [point[0] for point in monitor.consensus_distances] == [1, 2, 3]
        assert [point[0] for point in monitor.accuracies["val_acc"]] == [1, 2, 3]


def test_wandb_is_shown_the_pictures(tmp_path):
    logger = create_autospec(WandbLogger, instance=True, save_dir=str(tmp_path))
    trainer_of(GossipStrategy(num_clients=N), FederationMonitor(), logger=logger).fit(Linear(), *loaders())
    shown = {call.args[0]: call.args[1] for call in logger.log_image.call_args_list}
    assert set(shown) == {"fed/labels", "fed/topology", "fed/progress", "fed/bytes"}
    assert shown["fed/bytes"] == [str(tmp_path / "federation" / "bytes.png")]


def test_a_hundred_clients_keep_readable_pictures(tmp_path):
    counts = np.random.default_rng(0).integers(0, 50, (100, 10))
    for name, figure in (("labels", draw_labels(counts)), ("topology", draw_topology(Ring(), 100))):
        figure.savefig(tmp_path / f"{name}.png")
        assert is_a_picture(tmp_path / f"{name}.png")
    assert draw_labels(counts).axes[0].get_title() == "Training samples of 100 clients"


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_another_strategy_is_refused_by_name(strategy):
    name = {"auto": "SingleDeviceStrategy", "ddp": "DDPStrategy"}[strategy]
    with pytest.raises(ValueError, match=rf"FederationMonitor .* {name}: pass a federated one"):
        FederationMonitor().setup(trainer_of(strategy), Linear(), "fit")


def test_every_n_rounds_must_be_positive():
    with pytest.raises(ValueError, match="every_n_rounds=0 must be at least 1"):
        FederationMonitor(every_n_rounds=0)

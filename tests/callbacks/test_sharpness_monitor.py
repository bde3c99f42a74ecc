"""What the monitor measures, on which samples, and that training does not notice."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, Classifier, Noisy, clients, loaders, samples, silent_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import CatMetric, Metric

from lightning_fed import DFedSAMStrategy, GossipStrategy
from lightning_fed.callbacks import SharpnessMonitor
from lightning_fed.callbacks.sharpness_monitor import fixed_batches, restored_metric

# Cheap, and on all samples at once.
Quick = partial(SharpnessMonitor, num_batches=1, batch_size=200, trace_samples=2, iterations=5)


def fit(*callbacks: pl.Callback, strategy: Any = "auto", **settings: Any) -> pl.Trainer:
    """Three epochs of a small classifier with BatchNorm and dropout, from the same start."""
    pl.seed_everything(0, verbose=False)
    data = settings.pop("data", None) or loaders(clients(4) if strategy != "auto" else samples(60))
    module = settings.pop("module", Classifier)()
    trainer = silent_trainer(strategy, callbacks=list(callbacks), **settings)
    trainer.fit(module, *data)
    return trainer


def by_hand(module: Classifier, dataset: TensorDataset, train: bool = False) -> dict[str, float]:
    """Eigenvalue, trace and rise from the whole Hessian, in float64."""
    module = module.double().train(train)
    inputs, labels = dataset.tensors
    net, parameters = module.net, dict(module.net.named_parameters())
    shapes = {name: value.shape for name, value in parameters.items()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
        buffers = {name: value.clone() for name, value in net.named_buffers()}
        logits = torch.func.functional_call(net, {**weights, **buffers}, inputs.double())
        return nn.functional.cross_entropy(logits, labels)

    w = torch.cat([value.detach().reshape(-1) for value in parameters.values()])
    hessian = torch.autograd.functional.hessian(loss, w)
    gradient = torch.func.grad(loss)(w)
    rise = loss(w + 0.05 * gradient / gradient.norm()) - loss(w)
    return {
        "top_eigenvalue": float(torch.linalg.eigvalsh(hessian)[-1]),
        "trace": float(hessian.trace()),
        "ascent_rise": float(rise),
    }


def last(monitor: SharpnessMonitor) -> dict[str, float]:
    return {name: points[-1][1] for name, points in monitor.curves.items()}


# ------------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize(("mode", "batches"), [("eval", 1), ("train", 1), ("eval", 3)])
def test_a_measurement_is_that_of_the_final_model(mode: Any, batches: int) -> None:
    settings: dict[str, Any] = {"num_batches": batches, "batch_size": 60 // batches, "mode": mode}
    monitor = SharpnessMonitor(every_n_epochs=9, iterations=2000, tolerance=3e-3, trace_samples=100, **settings)
    trainer = fit(monitor, module=partial(Classifier, dropout=0.0), max_epochs=2)
    found, exact = last(monitor), by_hand(trainer.lightning_module, samples(60), mode == "train")
    assert found["top_eigenvalue"] == pytest.approx(exact["top_eigenvalue"], rel=1e-4)
    assert found["ascent_rise"] == pytest.approx(exact["ascent_rise"], rel=1e-3)
    assert abs(found["trace"] - exact["trace"]) < 3 * found["trace_error"] < 0.3 * exact["trace"]
    assert found["threshold"] == 20 and found["stability"] == pytest.approx(found["top_eigenvalue"] * 0.1 / 2)


@pytest.mark.parametrize("settings", [{}, {"limit_train_batches": 2}], ids=["whole", "within a round"])
def test_a_federation_is_measured_by_its_consensus_model_on_all_clients_samples(settings: Any) -> None:
    shards = clients(4)
    monitor = SharpnessMonitor(num_batches=1, batch_size=52, iterations=2000, tolerance=1e-3)
    trainer = fit(monitor, strategy=GossipStrategy(num_clients=4), data=loaders(shards)[:1], **settings)
    assert trainer.strategy.consensus_distance() > 0.01  # type: ignore[attr-defined]
    exact = by_hand(trainer.lightning_module, shards.dataset)
    assert last(monitor)["top_eigenvalue"] == pytest.approx(exact["top_eigenvalue"], rel=1e-4)
    assert last(monitor)["ascent_rise"] == pytest.approx(exact["ascent_rise"], rel=1e-3)


class Watching(Classifier):
    """Notes in which precision its layers compute."""

    dtypes: set[torch.dtype] = set()

    def forward(self, features: Tensor) -> Tensor:
        logits = super().forward(features)
        if not self.training:
            self.dtypes |= {logits.dtype, torch.zeros(()).dtype}
        return logits


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("64-true", torch.float64)])
def test_under_mixed_precision_the_loss_is_not_autocast(precision: Any, dtype: torch.dtype) -> None:
    Watching.dtypes.clear()
    monitor = SharpnessMonitor(num_batches=1, batch_size=60, iterations=2000, tolerance=1e-3)
    data = [loaders(samples(60))[0]]
    trainer = fit(monitor, module=Watching, data=data, precision=precision)
    assert Watching.dtypes == {dtype}
    exact = by_hand(trainer.lightning_module, samples(60))
    assert last(monitor)["top_eigenvalue"] == pytest.approx(exact["top_eigenvalue"], rel=1e-4)


@pytest.mark.slow
def test_a_compiled_module_is_measured_as_it_is() -> None:
    data = [DataLoader(samples(60), 20)]
    plain, compiled = Quick(), Quick()
    fit(plain, data=data, max_epochs=1)
    fit(compiled, data=data, max_epochs=1, module=lambda: torch.compile(Classifier(), backend="aot_eager"))
    assert last(compiled) == pytest.approx(last(plain), rel=1e-3)


def test_the_edge_of_stability_is_known_for_one_sgd_with_one_rate() -> None:
    class Momentum(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    class Adam(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    class Groups(Classifier):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters(), "lr": 0.01}, {"params": self.net[4].parameters()}]
            return torch.optim.SGD(groups, lr=0.1)

    found = {}
    for kind in (Momentum, Adam, Groups):
        monitor = Quick()
        fit(monitor, module=kind, max_epochs=1)
        found[kind] = last(monitor).get("threshold")
    assert found == {Momentum: pytest.approx(38), Adam: None, Groups: None}


# ---------------------------------------------------------------------------------------------- training goes on


class Counting(Classifier):
    """Draws from all generators, keeps a buffer, calculates with a metric's value, and logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls = self.calls + 1
        features, labels = batch
        logits = self(features + 0.1 * torch.randn_like(features) + 0.1 * random.random() + 0.1 * np.random.rand())
        self.log("train/error", 1 - self.train_accuracy(logits, labels))
        self.log("train/acc", self.train_accuracy, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Watch(pl.Callback):
    """What there is when each epoch ends, after the monitor."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = [value for entry in trainer.optimizers[0].state.values() for value in entry.values()]
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen.append([value.clone().numpy() for value in [*gradients, *state, *pl_module.state_dict().values()]])
        self.seen.append([torch.get_rng_state().numpy(), np.random.get_state()[1], random.getstate()[1]])
        self.seen.append([[layer.training for layer in pl_module.modules()]])


@pytest.mark.parametrize("strategy", ["auto", GossipStrategy, DFedSAMStrategy])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_does_not_notice(strategy: Any, mode: Any) -> None:
    outcomes = []
    for monitors in ([], [Quick(mode=mode)]):
        federated = strategy if strategy == "auto" else strategy(num_clients=4, optimizer_state="keep")
        given = DataLoader(Noisy(), 8, shuffle=True), DataLoader(samples(37, seed=1), 10)
        watch = Watch()
        trainer = fit(*monitors, watch, strategy=federated, module=Counting, data=given)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "sharpness" not in name}
        outcomes.append(
            (watch.seen, metrics, [value.numpy() for value in trainer.lightning_module.state_dict().values()])
        )
        assert len(trainer.callback_metrics) - len(metrics) == 4 * len(monitors)
    assert outcomes[0][1] == outcomes[1][1] and {"train/error", "train/acc", "val/acc"} <= outcomes[0][1].keys()
    for before, after in zip([*outcomes[0][0], outcomes[0][2]], [*outcomes[1][0], outcomes[1][2]]):
        assert len(before) == len(after)
        for one, other in zip(before, after):
            np.testing.assert_array_equal(one, other)


class Total(Metric):
    """Updates its state in place."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()))

    def update(self, value: Tensor) -> None:
        self.total += value

    def compute(self) -> Tensor:
        return self.total


def test_metrics_forget_what_they_were_told() -> None:
    total, kept = Total(), CatMetric()
    for metric in (total, kept):
        metric.update(torch.tensor(1.0))
        metric.compute()
    states = [total.total, kept.value]
    with restored_metric(total), restored_metric(kept):
        for metric in (total, kept):
            metric(torch.tensor(2.0))
            metric.update(torch.tensor(3.0))
        assert (float(total.compute()), kept.compute().tolist()) == (6, [1, 2, 3])
    assert total.total is states[0] and kept.value is states[1]  # as metrics of one group share them
    for metric in (total, kept):
        assert metric._update_count == 1 and metric._computed == 1 and metric._forward_cache is None
        metric._computed = None
        assert float(metric.compute()) == 1


# --------------------------------------------------------------------------------------------- when, on which samples


def test_the_start_every_n_epochs_and_the_end(tmp_path: Path) -> None:
    monitor = Quick(every_n_epochs=2)
    best = ModelCheckpoint(tmp_path, monitor="sharpness/trace", every_n_epochs=2, save_on_train_epoch_end=True)
    trainer = fit(
        monitor,
        best,
        max_epochs=5,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1),
    )
    points = monitor.curves["trace"]
    assert [epoch for epoch, _ in points] == [0, 2, 4, 5]
    assert [epoch for epoch, _ in monitor.profiles] == [0, 5]
    assert [len(losses) for _, losses in monitor.profiles] == [11, 11] and monitor.radii[10] == 0.5
    rows = [line.split(",") for line in (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()]
    place, step = rows[0].index("sharpness/trace"), rows[0].index("step")
    logged = [(int(row[step]), float(row[place])) for row in rows[1:] if row[place]]
    assert [value for _, value in logged] == pytest.approx([value for _, value in points], rel=1e-5)
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)
    assert best.best_model_score == pytest.approx(min(value for _, value in points[1:3]), rel=1e-5)


class Recorder:
    """A loss that keeps the batches it is asked for."""

    def __init__(self) -> None:
        self.batches: list[list[Tensor]] = []

    def __call__(self, module: pl.LightningModule, batch: list[Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            self.batches.append([tensor.clone() for tensor in batch])
        return nn.functional.cross_entropy(module(batch[0]), batch[1])


def test_the_batch_is_the_same_each_time_and_after_a_resume(tmp_path: Path) -> None:
    data = [DataLoader(Noisy(), 8, shuffle=True)]
    first, second = Recorder(), Recorder()
    fit(Quick(loss=first, batch_size=16), data=data).save_checkpoint(tmp_path / "half.ckpt")
    trainer = silent_trainer("auto", max_epochs=4, callbacks=[Quick(loss=second, batch_size=16)])
    torch.manual_seed(7)
    trainer.fit(Classifier(), *data, ckpt_path=tmp_path / "half.ckpt")
    assert len(first.batches) == 4 and len(second.batches) == 1
    for inputs, labels in [*first.batches, *second.batches]:
        assert torch.equal(inputs, first.batches[0][0]) and torch.equal(labels, first.batches[0][1])
        assert len(labels) == 16


def test_samples_sorted_by_class_are_drawn_from_all_classes() -> None:
    inputs, labels = samples(400).tensors
    order = labels.argsort()
    recorder = Recorder()
    fit(Quick(loss=recorder, batch_size=32), data=[DataLoader(TensorDataset(inputs[order], labels[order]), 8)])
    assert set(recorder.batches[0][1].tolist()) == set(range(CLASSES))


def test_several_batches_of_the_loaders_size_and_those_of_an_iterable() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([samples(60)[index] for index in range(60)])

    for dataset in (samples(60), Stream()):
        recorder = Recorder()
        fit(Quick(loss=recorder, num_batches=3, batch_size=None), data=[DataLoader(dataset, 8)], max_epochs=1)
        sizes = {len(labels) for _, labels in recorder.batches}
        different = {tuple(labels.tolist()) for _, labels in recorder.batches}
        assert sizes == {8} and len(different) == 3
    assert any(torch.equal(inputs, samples(60).tensors[0][:8]) for inputs, _ in recorder.batches)


def test_each_evaluation_of_a_batch_draws_the_same_random_numbers() -> None:
    drawn: list[tuple[float, ...]] = []

    def loss(module: pl.LightningModule, batch: Any) -> Tensor:
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    fit(Quick(loss=loss, num_batches=2, batch_size=8))
    assert len(drawn) > 100 and len(set(drawn)) == 2


def test_validation_data() -> None:
    recorder = Recorder()
    fit(Quick(loss=recorder, data="val"))
    assert len(recorder.batches[0][1]) == 37


def test_no_batch_is_named() -> None:
    trainer = fit(max_epochs=1)
    with pytest.raises(ValueError, match="data='train': there is no batch to measure sharpness on"):
        fixed_batches(trainer, "train", 0, None)


def test_the_curves_of_a_resumed_run_are_whole(tmp_path: Path) -> None:
    data, module = loaders(samples(60), shuffle=False), partial(Classifier, dropout=0)
    half, resumed, whole = (Quick() for _ in range(3))
    fit(half, max_epochs=2, data=data, module=module).save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    trainer = silent_trainer("auto", max_epochs=4, callbacks=[resumed])
    trainer.fit(module(), *data, ckpt_path=tmp_path / "half.ckpt")
    fit(whole, max_epochs=4, data=data, module=module)
    assert resumed.curves == whole.curves and resumed.profiles == whole.profiles
    assert [epoch for epoch, _ in whole.curves["trace"]] == [0, 1, 2, 3, 4]


def test_two_monitors_keep_apart(tmp_path: Path) -> None:
    trainer = fit(Quick(), Quick(data="val", prefix="sharpness/val"))
    assert trainer.callback_metrics["sharpness/trace"] != trainer.callback_metrics["sharpness/val/trace"]
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert sum("SharpnessMonitor" in key for key in saved) == 2


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be at least 1"),
        ({"num_batches": 0}, "num_batches=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"trace_samples": 1}, "trace_samples=1 must be at least 2"),
        ({"tolerance": 0.0}, r"tolerance=0.0 must be in \(0, 1\)"),
        ({"tolerance": 1.0}, r"tolerance=1.0 must be in \(0, 1\)"),
        ({"rho": -0.1}, "rho=-0.1 must not be negative"),
        ({"rho": 0.0}, "rho=0 is no radius"),
        ({"data": "test"}, "data='test' is not one of"),
        ({"mode": "both"}, "mode='both' is not one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**settings)


class Skipping(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class PerSample(Classifier):
    def training_step(self, batch: Any) -> Any:
        return {"loss": nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")}


@pytest.mark.parametrize("module", [Skipping, PerSample])
def test_a_training_step_without_a_scalar_loss_is_refused(module: Any) -> None:
    with pytest.raises(ValueError, match=rf"{module.__name__}.training_step gave .* for batch 0 .* pass loss="):
        fit(Quick(), module=module)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_needs_a_loss_and_is_measured_with_one() -> None:
    with pytest.raises(ValueError, match=r"Manual has manual optimization, .* pass SharpnessMonitor\(loss=...\)"):
        fit(Quick(), module=Manual)
    manual, automatic = Quick(loss=Recorder()), Quick(loss=Recorder())
    fit(manual, module=Manual)
    fit(automatic)
    assert last(manual) == pytest.approx(last(automatic), rel=1e-4)


def test_a_module_on_parts_is_refused() -> None:
    trainer = silent_trainer("auto")
    trainer.strategy.__class__ = type("FSDPStrategy", (pl.strategies.Strategy,), {})
    with pytest.raises(ValueError, match="which FSDPStrategy does not keep"):
        SharpnessMonitor().on_fit_start(trainer, Classifier())

"""What the callbacks for generators measure and draw, from which model, and that training does not notice."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from elastic_ranks import ElasticRanks
from federations import silent_trainer
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.image import imread
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_fed import DFedSAMStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.callbacks import DiffusionMonitor, GenerativeMetrics, SampleGrid, SharpnessAware
from lightning_fed.callbacks.sample_grid import write_grid
from lightning_fed.data import DigitsDataModule, GaussianMixtureDataModule
from lightning_fed.metrics import (
    DigitsFeatures,
    MaximumMeanDiscrepancy,
    ModeCoverage,
    NearestMode,
    PixelFeatures,
    PrecisionRecall,
    SlicedWasserstein,
)
from lightning_fed.modules.diffusion import DiffusionTraining
from lightning_fed.partition import IID


class Recorded(DiffusionTraining):
    """Remembers all its training steps; would be disturbed by its dropout and by random numbers that sampling draws."""

    def __init__(self, size: int = 1, channels: int = 2, classes: int | None = None) -> None:
        network = UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(16,), dropout=0.1,
            layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
            add_attention=False, num_class_embeds=classes,
        )  # fmt: skip
        super().__init__(network, ema_decay=0.9, lr=3e-3, sampling_steps=2)
        self.steps: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.steps.append(self.last_step)
        return loss

    def draw(self, *args: Any) -> Tensor:
        torch.rand(()), np.random.rand(), random.random()
        return super().draw(*args)


class WithoutValidation(Recorded):
    validation_step = pl.LightningModule.validation_step


def ring(**settings: Any) -> GaussianMixtureDataModule:
    sizes = {"train_samples": 192, "eval_samples": 100, "modes": 4, "num_clients": 4, "batch_size": 16}
    return GaussianMixtureDataModule(partitioner=IID(), **{**sizes, **settings})


def digits(batch_size: int = 64) -> DigitsDataModule:
    return DigitsDataModule(num_clients=4, partitioner=IID(), batch_size=batch_size, pixels="symmetric")


def fit(callbacks: list[pl.Callback], strategy: Any = "auto", **settings: Any) -> pl.Trainer:
    """Two epochs on points, from the same start."""
    pl.seed_everything(0, verbose=False)
    module, data = settings.pop("module", None) or Recorded(), settings.pop("data", None) or ring()
    chosen = strategy(num_clients=4) if isinstance(strategy, type) else strategy
    trainer = silent_trainer(chosen, callbacks=callbacks, **{"max_epochs": 2, **settings})
    path = settings.get("ckpt_path")
    trainer.fit(module, datamodule=data, ckpt_path=path)
    return trainer


def metrics_of(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def everything(trainer: pl.Trainer) -> dict[str, Any]:
    """What a fit leaves behind: weights, buffers, generators, modes, metrics that the user logged."""
    module = trainer.lightning_module
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        **{name: value.numpy().copy() for name, value in module.state_dict().items()},
        "torch": torch.get_rng_state().numpy(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate()[1],
        "modes": [layer.training for layer in module.modules()],
        **{name: value for name, value in logged.items() if name.startswith(("train/", "val/"))},
    }


@pytest.mark.parametrize("strategy", ["auto", FedAvgStrategy])
def test_training_does_not_notice(strategy: Any, tmp_path: Path) -> None:
    callbacks = [
        SampleGrid(num=5, directory=str(tmp_path)),
        GenerativeMetrics(num=30, directory=str(tmp_path)),
        DiffusionMonitor(directory=str(tmp_path)),
    ]
    outcomes = [everything(fit(given, strategy)) for given in ([], callbacks)]
    assert outcomes[0].keys() == outcomes[1].keys() and {"train/loss", "val/loss"} < outcomes[0].keys()
    for name, value in outcomes[0].items():
        np.testing.assert_array_equal(value, outcomes[1][name], err_msg=name)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_trial_run_measures_one_batch_and_writes_nothing(tmp_path: Path) -> None:
    grid = SampleGrid(directory=str(tmp_path), num=7)
    metrics, monitor = GenerativeMetrics(data="val", directory=str(tmp_path)), DiffusionMonitor(directory=str(tmp_path))
    drawn: list[int] = []

    class Counted(Recorded):
        def sample(self, num: int, *args: Any, **kwargs: Any) -> Tensor:
            drawn.append(num)
            return super().sample(num, *args, **kwargs)

    module, data = Counted(), ring(eval_samples=400)
    trainer = fit([grid, metrics, monitor], module=module, fast_dev_run=True, data=data)
    expected = SlicedWasserstein()
    chosen = np.linspace(0, 400, 250, endpoint=False).astype(int)
    expected.update(data.datasets.val.tensors[0][chosen], real=True)
    expected.update(Recorded.sample(module, 250, seed=0), real=False)
    # Samples of an untrained model are so far from all points that it takes many digits to tell which points.
    assert metrics.curves["sliced_wasserstein"] == [(1, pytest.approx(float(expected.compute()), rel=1e-9))]
    assert metrics_of(trainer, "noise/") and not list(tmp_path.iterdir())
    assert drawn == [7, 250]


@pytest.mark.parametrize("callback", [SampleGrid, GenerativeMetrics, DiffusionMonitor])
def test_other_modules_are_refused(callback: Any) -> None:
    with pytest.raises(ValueError, match=f"{callback.__name__} needs a module of .*BoringModel has no `sample`"):
        silent_trainer("auto", callbacks=[callback()]).fit(BoringModel())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SampleGrid(every_n_epochs=0), "every_n_epochs=0"),
        (lambda: SampleGrid(num=0), "num=0"),
        (lambda: SampleGrid(steps=0), "steps=0"),
        (lambda: SampleGrid(class_labels=[]), "class_labels="),
        (lambda: fit([SampleGrid(class_labels=[0])]), "knows no classes"),
        (lambda: fit([SampleGrid(class_labels=[0, 4])], module=Recorded(classes=4)), "must be in 0 .. 3"),
        (lambda: DiffusionMonitor(bins=0), "bins=0"),
        (lambda: GenerativeMetrics(num=0), "num=0"),
        (lambda: GenerativeMetrics(batch_size=0), "batch_size=0"),
        (lambda: GenerativeMetrics(max_batches=0), "max_batches=0"),
        (lambda: GenerativeMetrics(data="test"), "data='test' is not one of"),  # type: ignore[arg-type]
        (lambda: GenerativeMetrics(extractor="pixel"), "extractor='pixel' is unknown"),  # type: ignore[arg-type]
        (lambda: GenerativeMetrics(measures=["fid"]), "measures=.* choose one or more of frechet"),  # type: ignore[list-item]
        (lambda: GenerativeMetrics(measures=[]), "measures="),
        (lambda: fit([GenerativeMetrics(measures=["mode_coverage"])], data=digits()), "nothing tells modes"),
        (lambda: fit([GenerativeMetrics(extractor=nn.Identity())]), r"extractor gives \[192, 2, 1, 1\]"),
        (lambda: fit([GenerativeMetrics(data="val")], module=WithoutValidation()), "has no validation_step"),
        (lambda: fit([GenerativeMetrics(num=3, measures=["precision_recall"])]), "3 generated samples"),
    ],
)  # fmt: skip
def test_bad_settings(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_they_are_made_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[pl.Callback])
    folder = "lightning_fed.callbacks"
    network = {"class_path": "lightning_fed.metrics.DigitsFeatures"}
    given = [
        {"class_path": f"{folder}.SampleGrid", "init_args": {"num": 4, "class_labels": [1, 2]}},
        {"class_path": f"{folder}.DiffusionMonitor", "init_args": {"bins": 5}},
        {"class_path": f"{folder}.GenerativeMetrics", "init_args": {"extractor": "digits", "measures": ["mmd"]}},
        {"class_path": f"{folder}.GenerativeMetrics", "init_args": {"extractor": network, "prefix": "other"}},
    ]
    grid, monitor, first, second = parser.instantiate(parser.parse_object({"callbacks": given})).callbacks
    assert grid.class_labels == [1, 2] and monitor.bins == 5 and first.measures == ("mmd",)
    assert first.extractor == "digits" and isinstance(second.extractor, DigitsFeatures)
    assert first.state_key != second.state_key


# --------------------------------------------------------------------------------------------------------- SampleGrid


@pytest.mark.parametrize("strategy", ["auto", "gossip"])
def test_a_grid_an_epoch_of_the_model_that_samples_come_from(strategy: Any, tmp_path: Path) -> None:
    module = Recorded(8, 1)
    grid = SampleGrid(every_n_epochs=2, num=6, seed=3)
    chosen = "auto" if strategy == "auto" else GossipStrategy(num_clients=4, local_steps=2)
    data, logger = digits(200), CSVLogger(tmp_path)
    fit([grid], chosen, module=module, data=data, max_epochs=4, logger=logger, limit_train_batches=2)
    folder = Path(module.trainer.log_dir) / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=0002.png", "epoch=0004.png"]
    first, last = (imread(path)[..., 0] for path in sorted(folder.iterdir()))
    assert not np.array_equal(first, last)
    expected = ((module.sample(6, seed=3)[:, 0] + 1) / 2).clamp(0, 1)  # after the fit: the consensus model
    assert last.shape == (2 * 50 + 2, 3 * 50 + 2)  # 48 pixels and a border of 2
    for number, image in enumerate(expected):
        top, left = 2 + 50 * (number // 3), 2 + 50 * (number % 3)
        shown = last[top : top + 48, left : left + 48]
        assert np.abs(shown[3::6, 3::6] - image.numpy()).max() <= 0.51 / 255 and shown[:6, :6].std() < 1e-6


def test_class_labels_take_turns(tmp_path: Path) -> None:
    module = Recorded(8, 1, classes=10)
    grids = [
        SampleGrid(num=4, class_labels=[7, 1, 1], directory=str(tmp_path / "some"), prefix="some"),
        SampleGrid(num=12, directory=str(tmp_path / "all"), prefix="all"),
    ]
    fit(grids, module=module, data=digits(), max_epochs=1, limit_train_batches=2)
    for name, labels in (("some", [7, 1, 1, 7]), ("all", [*range(10), 0, 1])):
        write_grid(module.sample(len(labels), torch.tensor(labels), seed=0).cpu(), tmp_path / "expected.png")
        assert np.array_equal(imread(tmp_path / "expected.png"), imread(tmp_path / name / "epoch=0001.png"))
        write_grid(module.sample(len(labels), torch.zeros(len(labels)).long(), seed=0), tmp_path / "other.png")
        assert not np.array_equal(imread(tmp_path / "other.png"), imread(tmp_path / name / "epoch=0001.png"))


def test_points_are_a_scatter_plot_with_the_modes(tmp_path: Path) -> None:
    fit([SampleGrid(directory=str(tmp_path / "crosses"), num=50)])
    # Plain loaders do not tell the modes.
    pl.seed_everything(0, verbose=False)
    trainer = silent_trainer("auto", callbacks=[SampleGrid(directory=str(tmp_path / "bare"), num=50)], max_epochs=2)
    trainer.fit(Recorded(), DataLoader(ring().datasets.train, 16))
    pictures = [imread(tmp_path / name / "epoch=0002.png")[..., :3] for name in ("crosses", "bare")]
    for picture in pictures:
        assert min(picture.shape[:2]) >= 400 and float(picture.std()) > 0.01
    assert pictures[0].sum() < pictures[1].sum()


@pytest.mark.slow
def test_weights_and_biases_shows_one_picture_over_time(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(
        [SampleGrid(directory=str(tmp_path / "here"), num=50), DiffusionMonitor(directory=str(tmp_path))], logger=logger
    )
    logger.experiment.finish()
    shown = [path.name.split("_")[0] for path in tmp_path.rglob("media/images/**/*.png")]
    assert sorted(shown) == ["loss", "samples", "samples"]


def test_colours_and_samples_that_are_not_finite(tmp_path: Path) -> None:
    images = torch.full((2, 3, 64, 64), torch.nan)
    images[0, :, 32:] = torch.inf
    images[1] = torch.tensor([1.0, 0.0, -3.0])[:, None, None]
    write_grid(images, tmp_path / "grid.png")
    pixels = imread(tmp_path / "grid.png")
    assert pixels.shape == (68, 134, 3)
    assert pixels[10, 10].tolist() == pixels[50, 10].tolist() == [0, 0, 0]
    assert pixels[10, 100] == pytest.approx([1, 0.5, 0], abs=0.01)


# ------------------------------------------------------------------------------------------------- GenerativeMetrics


def drawn(module: DiffusionTraining, num: int, batch_size: int, seed: int = 0) -> Tensor:
    sizes = [min(batch_size, num - start) for start in range(0, num, batch_size)]
    return torch.cat([module.sample(size, seed=seed + number) for number, size in enumerate(sizes)])


def by_hand(real: Tensor, fake: Tensor, modes: ModeCoverage, assigned: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """All measures of features ``[N, d]`` and ``[M, d]``, modes measured on what `assigned` makes of indices."""
    metrics = {
        "frechet_distance": FrechetInceptionDistance(feature=PixelFeatures(real.shape[1]), normalize=True),
        "sliced_wasserstein": SlicedWasserstein(),
        "mmd": MaximumMeanDiscrepancy(),
        "precision_recall": PrecisionRecall(),
    }
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        metric.update(real, real=True)
        metric.update(fake, real=False)
        value = metric.compute()
        found |= {key: float(part) for key, part in (value if isinstance(value, dict) else {name: value}).items()}
    modes.update(assigned(torch.tensor(True)), real=True)
    modes.update(assigned(torch.tensor(False)), real=False)
    values = {name: float(value) for name, value in modes.compute().items()}
    found |= {"mode_coverage": values["coverage"], "mode_total_variation": values["total_variation"]}
    return found | ({"mode_quality": values["inside"]} if isinstance(modes.assign, NearestMode) else {})


@pytest.mark.parametrize("strategy", ["auto", FedAvgStrategy, DFedSAMStrategy])
@pytest.mark.parametrize("data", ["val", "train"])
def test_measures_of_points_are_those_of_the_final_model(strategy: Any, data: Any) -> None:
    module, mixture = Recorded(), ring()
    callback = GenerativeMetrics(num=70, batch_size=32, data=data, seed=5, plots=False)
    trainer = fit([callback], strategy, module=module)
    real = getattr(mixture.datasets, data).tensors[0]
    fake = drawn(module, 70, 32, seed=5)
    modes = ModeCoverage(NearestMode(mixture.means, mixture.std), 4)
    expected = by_hand(real.flatten(1), fake.flatten(1), modes, lambda is_real: real if is_real else fake)
    assert metrics_of(trainer, "gen/") == pytest.approx(expected, rel=1e-4)
    assert expected["frechet_distance"] > 0.01 and expected["recall"] > 0


@pytest.mark.parametrize("extractor", ["digits", "module"])
def test_measures_of_digits_with_features_of_a_network(extractor: Any) -> None:
    class Halves(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert not self.training and images.min() >= 0 and images.max() <= 1
            return images.flatten(1)[:, :32]

    features = DigitsFeatures()
    chosen: Any = "digits" if extractor == "digits" else Halves()
    network: Any = features if extractor == "digits" else chosen
    classifier = None if extractor == "digits" else features.classifier
    module = Recorded(8, 1)
    callback = GenerativeMetrics(
        num=50, extractor=chosen, classifier=classifier, max_batches=1, batch_size=40, data="val", plots=False
    )
    trainer = fit([callback], module=module, data=digits(), max_epochs=1, limit_train_batches=3)
    real = digits().datasets.val.tensors[0][::5]  # 40 of 200, spread evenly
    real, fake = (((side + 1) / 2).clamp(0, 1) for side in (real, drawn(module, 50, 40)))
    modes = ModeCoverage(features.classifier, 10)
    expected = by_hand(network(real), network(fake), modes, lambda is_real: real if is_real else fake)
    assert metrics_of(trainer, "gen/") == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_real_samples_are_read_once_and_a_measure_can_be_chosen() -> None:
    points = ring().datasets.train
    reads: list[int] = []

    class Counting(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(points)

        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return points[index]

    callback = GenerativeMetrics(num=20, measures=["sliced_wasserstein"], data="val", plots=False)
    trainer = silent_trainer("auto", callbacks=[callback], max_epochs=3, check_val_every_n_epoch=9)
    trainer.fit(Recorded(), DataLoader(points, 64), DataLoader(Counting(), 64))
    assert sorted(reads) == list(range(len(points)))
    assert list(metrics_of(trainer, "gen/")) == ["sliced_wasserstein"]
    values = [value for _, value in callback.curves["sliced_wasserstein"]]
    assert len(values) == len(set(values)) == 3


def test_checkpoints_can_monitor_it_and_curves_are_drawn_and_resumed(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [GenerativeMetrics(every_n_epochs=2, num=40), DiffusionMonitor(bins=3)]

    settings: dict[str, Any] = {"enable_checkpointing": True, "logger": CSVLogger(tmp_path, name="", version="")}
    best = ModelCheckpoint(
        tmp_path, "best", monitor="gen/frechet_distance", every_n_epochs=2, save_on_train_epoch_end=True
    )
    first = callbacks()
    fit([*first, best], max_epochs=4, **settings)
    points = first[0].curves["frechet_distance"]
    assert [done for done, _ in points] == [2, 4]
    assert float(best.best_model_score) == pytest.approx(min(value for _, value in points))
    for picture in ("generative_metrics/curves.png", "diffusion/loss_by_noise.png"):
        pixels = imread(tmp_path / picture)
        assert min(pixels.shape[:2]) > 200 and float(pixels[..., :3].std()) > 0.01
    resumed = callbacks()
    trainer = silent_trainer("auto", callbacks=resumed, max_epochs=6, logger=settings["logger"])
    trainer.fit(Recorded(), datamodule=ring(), ckpt_path=best.best_model_path)
    at = torch.load(best.best_model_path, weights_only=True)["epoch"] + 1
    for old, new in zip(first, resumed):
        before = {name: [point for point in points if point[0] <= at] for name, points in old.curves.items()}
        assert {name: points[: len(before[name])] for name, points in new.curves.items() if name in before} == before
        assert max(points[-1][0] for points in new.curves.values()) == 6


def test_another_fit_from_the_start_forgets_the_curves_of_the_first() -> None:
    metrics = GenerativeMetrics(num=20, measures=["sliced_wasserstein"], plots=False)
    monitor = DiffusionMonitor(bins=1, plots=False)
    for _ in range(2):
        fit([metrics, monitor])
    for curves in (metrics.curves, monitor.curves):
        assert [[done for done, _ in points] for points in curves.values()] == [[1, 2]]


# --------------------------------------------------------------------------------------------------- DiffusionMonitor


def binned(
    steps: list[dict[str, Tensor]], module: DiffusionTraining, bins: int, name: str = "loss"
) -> dict[str, float]:
    """The mean of all samples of a bin of noise levels."""
    sigma, values = (torch.cat([step[key] for step in steps]).double() for key in ("sigma", name))
    low, high = np.log(module.denoiser.sigma_min), np.log(module.denoiser.sigma_max)
    places = ((sigma.log() - low) / (high - low) * bins).floor().long().clamp(0, bins - 1)
    centres = np.exp(low + (np.arange(bins) + 0.5) / bins * (high - low))
    return {f"{name}_{centres[k]:.2g}": float(values[places == k].mean()) for k in sorted(set(places.tolist()))}


@pytest.mark.parametrize("strategy", ["auto", FedAvgStrategy, DFedSAMStrategy, "sharpness_aware"])
def test_loss_by_noise_is_the_mean_over_all_local_steps_of_an_epoch(strategy: Any) -> None:
    module, monitor = Recorded(), DiffusionMonitor(bins=6, plots=False)
    by_callback = strategy == "sharpness_aware"
    callbacks = [monitor, *([SharpnessAware()] if by_callback else [])]
    trainer = fit(callbacks, "auto" if by_callback else strategy, module=module, max_epochs=2)
    steps = module.steps
    if strategy is DFedSAMStrategy or by_callback:
        steps = steps[::2]  # the second of each pair is at the perturbed point
    assert sum(len(step["sigma"]) for step in steps) == 2 * 192
    expected = binned(steps[len(steps) // 2 :], module, 6)
    logged = metrics_of(trainer, "noise/")  # which has what no sample of this epoch was like from the one before
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    last = {name: points[-1][1] for name, points in monitor.curves.items() if points[-1][0] == 2}
    assert last == pytest.approx(expected, rel=1e-5) and len(expected) >= 4


class TakesTurns(Recorded):
    """Manual optimization that tells a density ratio on every other batch, as f-distill does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.turns: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        before = self.last_step
        loss = DiffusionTraining.training_step(self, batch, batch_idx)
        if batch_idx % 2:
            self.last_step = before
        else:
            ratio = 4 * torch.randn(len(batch[0])) + 1
            ratio[0], ratio[1] = torch.nan, torch.inf
            self.last_step = {**self.last_step, "log_ratio": ratio, "weight": ratio.nan_to_num(0, 0, 0).exp()}
            self.turns.append(self.last_step)
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", ["auto", FedAvgStrategy])
def test_density_ratios_and_weights_of_the_turns_that_tell_them(strategy: Any, tmp_path: Path) -> None:
    module, monitor = TakesTurns(), DiffusionMonitor(bins=4, directory=str(tmp_path))
    trainer = fit([monitor], strategy, module=module, max_epochs=2)
    turns = module.turns[len(module.turns) // 2 :]
    expected = binned(turns, module, 4) | binned(turns, module, 4, "weight")
    last = {name: points[-1][1] for name, points in monitor.curves.items() if points[-1][0] == 2}
    assert last == pytest.approx(expected, rel=1e-5)
    assert metrics_of(trainer, "noise/").keys() >= expected.keys() and len(expected) > 4
    logs = torch.cat([turn["log_ratio"] for turn in turns])
    counts, _ = np.histogram(logs[~logs.isnan()].clamp(-10, 10).double().numpy(), 80, (-10, 10))
    assert [done for done, _ in monitor.ratios] == [1, 2] and monitor.ratios[-1][1] == counts.tolist()
    assert sum(counts) == len(logs) - len(turns)
    pixels = imread(tmp_path / "density_ratio.png")
    assert pixels.shape[1] > 2 * pixels.shape[0] and float(pixels[..., :3].std()) > 0.01
    # A resumed run draws the first epoch's histogram too.
    again = DiffusionMonitor()
    again.load_state_dict(monitor.state_dict())
    assert again.ratios == monitor.ratios and again.curves == monitor.curves


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, waiting = DiffusionMonitor(bins=3, plots=False), []
    look = DiffusionMonitor._look

    def counted(self: DiffusionMonitor, module: Any) -> None:
        look(self, module)
        waiting.append(len(self._waiting))

    monkeypatch.setattr(DiffusionMonitor, "_look", counted)
    module = Recorded()
    trainer = fit([monitor], module=module, data=ring(batch_size=1, train_samples=100), max_epochs=1)
    assert max(waiting) < 64 < len(module.steps)
    assert metrics_of(trainer, "noise/") == pytest.approx(binned(module.steps, module, 3), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- ranks


def on_ranks(strategy: str, folder: str) -> dict[str, Any]:
    chosen: Any = "ddp" if strategy == "ddp" else FedAvgStrategy(num_clients=3)
    callbacks = [
        SampleGrid(num=4, directory=folder),
        GenerativeMetrics(num=70, batch_size=16, data="val", directory=folder),
        DiffusionMonitor(bins=4, directory=folder),
    ]
    module = Recorded()
    trainer = fit(callbacks, chosen, module=module, devices=2, data=ring(num_clients=3))
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    steps = [{name: value.numpy() for name, value in step.items()} for step in module.steps]
    return {
        "gen": metrics_of(trainer, "gen/"), "noise": metrics_of(trainer, "noise/"), "state": state, "steps": steps
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fedavg"])
def test_two_ranks_share_the_work_and_agree(strategy: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, on_ranks, strategy, str(tmp_path))
    assert first["gen"] == second["gen"] and first["noise"] == second["noise"]
    module, mixture = Recorded(), ring()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in first["state"].items()})
    real, fake = mixture.datasets.val.tensors[0], drawn(module, 70, 16)
    modes = ModeCoverage(NearestMode(mixture.means, mixture.std), 4)
    expected = by_hand(real.flatten(1), fake.flatten(1), modes, lambda is_real: real if is_real else fake)
    assert first["gen"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    steps = []
    for rank in (first, second):
        mine = [{name: torch.from_numpy(value) for name, value in step.items()} for step in rank["steps"]]
        steps += mine[len(mine) // 2 :]
    assert sum(len(step["sigma"]) for step in steps) == 192
    last = binned(steps, module, 4)
    assert {name: first["noise"][name] for name in last} == pytest.approx(last, rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "epoch=0001.png",
        "epoch=0002.png",
        "loss_by_noise.png",
    ]


class LostEarly(pl.Callback):
    """Rank 1 dies after the first round, and leaves behind what it has measured."""

    def __init__(self, metrics: GenerativeMetrics, monitor: DiffusionMonitor, folder: str) -> None:
        self.metrics, self.monitor, self.will = metrics, monitor, Path(folder, "rank 1")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            self.will.write_text(repr((self.metrics.curves, self.monitor.curves)))
            os.kill(os.getpid(), signal.SIGKILL)


def elastic(folder: str) -> dict[str, Any]:
    metrics = GenerativeMetrics(num=40, measures=["sliced_wasserstein"], data="val", directory=folder)
    grid, monitor = SampleGrid(num=4, directory=folder), DiffusionMonitor(directory=folder)
    strategy = GossipStrategy(num_clients=4, on_peer_loss="drop", ping_timeout=0.5, timeout=30)
    module = Recorded()
    lost = LostEarly(metrics, monitor, folder)
    trainer = fit([lost, metrics, grid, monitor], strategy, module=module, devices=2, max_epochs=3)
    expected = SlicedWasserstein()
    expected.update(ring().datasets.val.tensors[0], real=True)
    expected.update(module.sample(40, seed=0), real=False)
    return {"curve": metrics.curves["sliced_wasserstein"], "last": float(expected.compute()),
            "noise": metrics_of(trainer, "noise/")}  # fmt: skip


@pytest.mark.slow
def test_a_rank_may_die_and_the_other_speaks(tmp_path: Path) -> None:
    with ElasticRanks(2, elastic, str(tmp_path)) as ranks:
        results = ranks.results()
    assert list(results) == [0] and (tmp_path / "rank 1").read_text() == "({}, {})"
    assert [done for done, _ in results[0]["curve"]] == [1, 2, 3] and len(results[0]["noise"]) > 3
    assert results[0]["curve"][-1][1] == pytest.approx(results[0]["last"], rel=1e-4)
    assert len(list(tmp_path.glob("epoch=*.png"))) == 3

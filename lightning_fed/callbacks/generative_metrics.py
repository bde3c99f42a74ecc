"""Compares what a generator makes with real data while it trains, under any strategy.

Shapes: B = samples of a batch, C, H, W = channels, height and width of an image, d = numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_fed.callbacks.drawn_samples import diffusion_module, sampled_in_batches, speaks
from lightning_fed.callbacks.feature_pass import is_elastic, on_device, samples_of, undisturbed
from lightning_fed.callbacks.figures import figure_directory, new_figure, save_figure
from lightning_fed.callbacks.neural_collapse import sums_over_ranks
from lightning_fed.callbacks.neural_collapse_plots import Curves, plot_measures
from lightning_fed.checks import check_choice, check_counts, check_flags, check_kinds, check_names, check_paths, given
from lightning_fed.data import GaussianMixtureDataModule
from lightning_fed.metrics import (
    DigitsFeatures,
    MaximumMeanDiscrepancy,
    ModeCoverage,
    NearestMode,
    PixelFeatures,
    PrecisionRecall,
    SlicedWasserstein,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["frechet_distance", "sliced_wasserstein", "mmd", "precision_recall", "mode_coverage"]

PANELS = (
    ("Distance from real samples", ("frechet_distance", "sliced_wasserstein"), True),
    ("Squared mean discrepancy", ("mmd",), False),
    ("Precision and recall", ("precision", "recall", "density", "coverage"), False),
    ("Modes", ("mode_coverage", "mode_quality", "mode_total_variation"), False),
)


class GenerativeMetrics(Callback):
    """Draws samples with a fixed seed at the end of an epoch, and compares them with the training or validation set.

    Logged for all loggers, and for ``ModelCheckpoint`` with ``save_on_train_epoch_end=True`` (and the same
    ``every_n_epochs``):

    * ``gen/frechet_distance``: torchmetrics' FID, with features of your choice;
    * ``gen/sliced_wasserstein``, ``gen/mmd`` (squared, unbiased, so it may be negative);
    * ``gen/precision``, ``gen/recall``, ``gen/density``, ``gen/coverage``;
    * ``gen/mode_coverage``, ``gen/mode_total_variation``, if the data are a
      :class:`~lightning_fed.data.GaussianMixtureDataModule`, then with ``gen/mode_quality`` (share of samples within 3
      standard deviations of a mode), or there is a classifier.

    All depend on how many samples there are on either side: compare with real against real. See
    :mod:`lightning_fed.metrics`. Training goes on bit by bit as without the measurement. In a federation the consensus
    model is drawn from. Ranks share the work; a sample counts once. Real samples are read at the first measurement of a
    fit, and their features kept. Drawn by rank zero when training ends: ``curves.png``; Weights & Biases and
    TensorBoard get it too. In ``fast_dev_run`` one batch of each side is compared.

    Args:
        every_n_epochs: measure after every so many epochs.
        num: generated samples, of all ranks together.
        steps: of the sampler; None for the module's own default.
        seed: of the noise.
        data: ``"train"``, the training set, as papers do, or ``"val"``, the (first) validation loader's data set.
        max_batches: of real samples on each rank, spread evenly over the data set; None for all samples.
        batch_size: of both sides. Which samples are generated depends on it, but not on the number of ranks.
        measures: which of ``"frechet_distance"``, ``"sliced_wasserstein"``, ``"mmd"``, ``"precision_recall"`` and
            ``"mode_coverage"``; None for all that can be taken.
        extractor: whose features are compared. ``"pixels"``: samples as they are, in [-1, 1], not clamped.
            ``"digits"``: :class:`~lightning_fed.metrics.DigitsFeatures`. Or a module from images in [0, 1] (clamped) to
            features ``[B, d]``.
        classifier: for mode coverage, a module from images in [0, 1] to logits ``[B, classes]``; None: that of
            ``"digits"`` features, or the modes of a mixture, if there is one of these.
        prefix: of the logged names. Two callbacks need two.
        directory: of the image; by default ``generative_metrics`` in the logger's directory, or in the Trainer's
            ``default_root_dir`` if there is no logger.
        plots: draw the image.

    Raises:
        ValueError: if a setting is out of range or unknown; at the start of the fit, if the module is no diffusion
            module, or nothing tells modes, but their coverage is asked for; at the first measurement, if an extractor
            gives no vectors, or there are too few samples.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num: int = 1000,
        steps: int | None = None,
        seed: int = 0,
        data: Literal["train", "val"] = "train",
        max_batches: int | None = None,
        batch_size: int = 250,
        measures: Sequence[Measure] | None = None,
        extractor: nn.Module | Literal["pixels", "digits"] = "pixels",
        classifier: nn.Module | None = None,
        prefix: str = "gen",
        directory: str | None = None,
        plots: bool = True,
    ) -> None:
        check_counts(every_n_epochs=every_n_epochs, num=num, batch_size=batch_size)
        check_counts(**given(steps=steps, max_batches=max_batches))
        check_counts(0, seed=seed)
        check_choice("data", data, "train", "val")
        if not isinstance(extractor, nn.Module) and extractor not in ("pixels", "digits"):
            raise ValueError(f"extractor={extractor!r} is unknown: use 'pixels', 'digits' or a module.")
        check_kinds(nn.Module, **given(classifier=classifier))
        check_names(prefix=prefix)
        check_paths(**given(directory=directory))
        check_flags(plots=plots)
        check_kinds((list, tuple), **given(measures=measures))
        if measures is not None and (not measures or set(measures) - set(get_args(Measure))):
            raise ValueError(f"measures={measures}: choose one or more of {', '.join(get_args(Measure))}.")
        self.every_n_epochs, self.num, self.steps, self.seed = every_n_epochs, num, steps, seed
        self.data, self.max_batches, self.batch_size = data, max_batches, batch_size
        self.measures = None if measures is None else tuple(measures)
        self.extractor, self.classifier = extractor, classifier
        self.prefix, self.directory, self.plots = prefix, directory, plots
        # For each logged name without prefix, (epochs done, value).
        self.curves: Curves = {}
        self._comparison: Comparison | None = None
        self._images: Path | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        diffusion_module(pl_module, self)
        if self.data == "val" and not is_overridden("validation_step", pl_module):
            raise ValueError(
                f"data='val' needs a validation loader, but Lightning sets up none for {type(pl_module).__name__}, "
                "since it has no validation_step: use data='train'."
            )
        known = (
            self.classifier is not None
            or self.extractor == "digits"
            or isinstance(self.extractor, DigitsFeatures)
            or isinstance(trainer.datamodule, GaussianMixtureDataModule)  # type: ignore[attr-defined]
        )
        if not known and "mode_coverage" in (self.measures or ()):
            raise ValueError(
                "measures has 'mode_coverage', but nothing tells modes: pass classifier=, or train on a "
                "GaussianMixtureDataModule."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch
        kept = {name: [point for point in points if point[0] <= done] for name, points in self.curves.items()}
        self.curves = {name: points for name, points in kept.items() if points}
        self._comparison = self._images = None
        if self.plots and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._images = figure_directory(trainer, "generative_metrics", self.directory)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch + 1
        if done % self.every_n_epochs or not speaks(trainer):
            return
        for name, value in self._measure(trainer, pl_module).items():
            self.curves.setdefault(name, []).append((done, value))
            # Ranks have the same value already; sync_dist keeps Lightning from asking for it.
            sync = not is_elastic(trainer)
            pl_module.log(f"{self.prefix}/{name}", value, on_step=False, on_epoch=True, sync_dist=sync)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._images is not None and trainer.is_global_zero and self.curves:
            save_figure(trainer, self._images, f"{self.prefix}/curves", draw_curves(self.curves))
            rank_zero_info(f"Plots of generative metrics: {self._images}")
        self._comparison = self._images = None

    def state_dict(self) -> dict[str, Any]:
        return {"curves": {name: list(points) for name, points in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: list(points) for name, points in state_dict["curves"].items()}

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """All measures of the module as it is now; a collective call."""
        module = diffusion_module(pl_module, self)
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        samples = samples_of(trainer, self.data, self.batch_size, 1 if is_trial else self.max_batches)
        in_common = sums_over_ranks(trainer, samples)
        with undisturbed(trainer, pl_module):
            if self._comparison is None:
                self._comparison = self._new_comparison(trainer, partial(bool, in_common))
                for batch in islice(samples.batches, samples.limit):
                    batch = on_device(trainer, pl_module, batch)
                    self._comparison.add(batch if isinstance(batch, Tensor) else batch[0], real=True)
                if not self._comparison.measured:
                    raise ValueError(f"data={self.data!r}: there is no batch to compare samples with.")
            num = min(self.num, self.batch_size) if is_trial else self.num
            share = (trainer.global_rank, trainer.world_size) if in_common else (0, 1)
            drawn = sampled_in_batches(trainer, module, num, self.batch_size, self.steps, self.seed, share)
            for batch in drawn:
                self._comparison.add(batch, real=False)
            return self._comparison.compute()

    def _new_comparison(self, trainer: Trainer, available: Callable[[], bool]) -> Comparison:
        extractor = DigitsFeatures() if self.extractor == "digits" else self.extractor
        data = trainer.datamodule  # type: ignore[attr-defined]
        modes: nn.Module | None = self.classifier
        if modes is None and isinstance(extractor, DigitsFeatures):
            modes = extractor.classifier
        elif modes is None and isinstance(data, GaussianMixtureDataModule):
            modes = NearestMode(data.means, data.std)
        chosen = self.measures or get_args(Measure)
        return Comparison(chosen, extractor if isinstance(extractor, nn.Module) else None, modes, available)


class Comparison:
    """The metrics of one fit, fed with images in [-1, 1] of both sides.

    Args:
        measures: which.
        extractor: from images in [0, 1] to features; None: the samples themselves.
        modes: :class:`~lightning_fed.metrics.NearestMode`, or a classifier of images in [0, 1]; None without modes.
        available: whether ranks are to be added up.
    """

    def __init__(
        self,
        measures: Sequence[str],
        extractor: nn.Module | None,
        modes: nn.Module | None,
        available: Callable[[], bool],
    ) -> None:
        self.measures, self.extractor, self.modes = measures, extractor, modes
        self.settings: dict[str, Any] = {"distributed_available_fn": available}
        self.metrics: dict[str, Metric] = {}
        self.coverage: ModeCoverage | None = None
        self.measured = False

    @torch.no_grad()
    def add(self, images: Tensor, real: bool) -> None:
        """Add a batch ``[B, C, H, W]``."""
        images = images.detach().float()
        unit = ((images + 1) / 2).clamp(0, 1)
        features = images.flatten(1) if self.extractor is None else evaluated(self.extractor, unit)
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"the extractor gives {list(features.shape)} for {len(images)} images, but must give vectors "
                f"[{len(images)}, d]: flatten or average feature maps in it."
            )
        if not self.measured:
            kinds = {name: kind for name, kind in self._kinds().items() if name in self.measures}
            self.metrics = {name: kind(features.shape[1]).to(features.device) for name, kind in kinds.items()}
            self.coverage = self._mode_coverage(unit)
            self.measured = True
        for metric in self.metrics.values():
            metric.update(features, real=real)
        if self.coverage is not None:
            self.coverage.update(images if isinstance(self.modes, NearestMode) else unit, real=real)

    def compute(self) -> dict[str, float]:
        """All measures; the generated samples are then forgotten, and the real ones are not."""
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            result = metric.compute()
            results = result if isinstance(result, dict) else {name: result}
            found |= {key: float(value) for key, value in results.items()}
            metric.reset()
        if self.coverage is not None:
            result = self.coverage.compute()
            found["mode_coverage"] = float(result["coverage"])
            found["mode_total_variation"] = float(result["total_variation"])
            if isinstance(self.modes, NearestMode):
                found["mode_quality"] = float(result["inside"])
            self.coverage.reset()
        return found

    def _kinds(self) -> dict[str, Callable[[int], Metric]]:
        """For each measure, from d to its metric of features."""
        settings = self.settings
        return {
            "frechet_distance": lambda size: FrechetInceptionDistance(
                feature=PixelFeatures(size), normalize=True, reset_real_features=False, **settings
            ),
            "sliced_wasserstein": lambda size: SlicedWasserstein(reset_real=False, **settings),
            "mmd": lambda size: MaximumMeanDiscrepancy(reset_real=False, **settings),
            "precision_recall": lambda size: PrecisionRecall(reset_real=False, **settings),
        }

    def _mode_coverage(self, unit: Tensor) -> ModeCoverage | None:
        if self.modes is None or "mode_coverage" not in self.measures:
            return None
        modes = self.modes.to(unit.device)
        number = modes.num_modes if isinstance(modes, NearestMode) else evaluated(modes, unit[:1]).shape[1]
        return ModeCoverage(modes, number, reset_real=False, **self.settings).to(unit.device)


def evaluated(network: nn.Module, images: Tensor) -> Tensor:
    """What a network gives in evaluation mode, float32."""
    result: Tensor = network.to(images.device).eval()(images)
    return result.float()


def draw_curves(curves: Curves) -> Figure:
    """A panel for each kind of measure that there is, over epochs."""
    shown = [panel for panel in PANELS if any(name in curves for name in panel[1])]
    figure = new_figure(10, 3.2 * -(-len(shown) // 2))
    for number, (title, names, logarithmic) in enumerate(shown):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, number + 1)
        plot_measures(axes, curves, names, logarithmic)
        if any(value < 0 for name in names for _, value in curves.get(name, [])):
            axes.autoscale(axis="y")
        axes.set_title(title)
    return figure

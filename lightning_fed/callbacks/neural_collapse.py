"""Follows neural collapse while a classifier trains, under any strategy and without a change to its module.

Shapes: B = samples of a batch, C = classes, K = classes that have samples, d = numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_fed.callbacks.feature_pass import (
    FeatureTap,
    Pool,
    Samples,
    Seen,
    SplitBatch,
    as_consensus,
    federation_in,
    is_elastic,
    samples_of,
    undisturbed,
)
from lightning_fed.callbacks.figures import figure_directory, save_figure
from lightning_fed.callbacks.neural_collapse_plots import (
    Curves,
    Snapshot,
    draw_curves,
    draw_depth,
    draw_gram,
    draw_means,
    snapshot_of,
)
from lightning_fed.checks import (
    check_callables,
    check_choice,
    check_counts,
    check_flags,
    check_kinds,
    check_names,
    check_pairs,
    check_paths,
    given,
)
from lightning_fed.metrics import ClassMoments, Moments, NearestCentreAgreement, collapse_measures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NeuralCollapseMonitor(Callback):
    """Measures NC1 to NC4 in a pass of its own over the training or validation set, and draws them at the end.

    The pass runs at the end of an epoch in evaluation mode: with dropout, BatchNorm's batch statistics, or features
    gathered while weights move, one would measure something else, often tenfold. Training goes on bit by bit as without
    it. In a federation the consensus model is measured, on the samples of all clients. Ranks share the samples, none is
    counted twice. Not for strategies that split the module itself over ranks (FSDP).

    Logged for all loggers, and for ``ModelCheckpoint`` with ``save_on_train_epoch_end=True`` (and the same
    ``every_n_epochs``): ``nc/nc1``, ``nc/nc1_trace``, ``nc/cdnv``,
    ``nc/nc2`` (distance from the simplex ETF), ``nc/nc2_equinorm``, ``nc/nc2_equiangle``, ``nc/nc2_of``, ``nc/nc3``,
    ``nc/nc3_etf``, ``nc/nc2_weight_etf`` and the like, ``nc/bias_residual``, ``nc/effective_rank``, ``nc/nc4``; for a
    layer in ``layers``, ``nc/<layer>/nc1`` and so on, without what compares with the classifier's weight. See
    :class:`~lightning_fed.metrics.NeuralCollapse`. A classifier without a weight ``[C, d]`` for these features has no
    ``nc3``.

    Drawn by rank zero when training ends: ``curves.png`` (measures over epochs), ``gram.png`` (cosines between class
    means), ``means.png`` (class means in a plane in which a simplex is a regular polygon) and, with ``layers``,
    ``depth.png``. Weights & Biases and TensorBoard get the images too.

    Args:
        head: dotted name of the classifier, for example ``"model.fc"``; None: the linear layer whose output the
            module's ``forward`` returns.
        layer: dotted name of a layer whose output is the feature; None: what goes into the head.
        layers: names of further layers to follow collapse through depth.
        every_n_epochs: measure after every so many epochs.
        data: ``"train"``, or the (first) ``"val"`` loader's data set.
        max_batches: of each rank, of samples spread evenly over the data set; None for all samples.
        batch_size: of the pass; None for the loader's.
        nearest_centre: measure NC4, which takes a second pass.
        split_batch: from a batch to ``(inputs, labels)``, labels integer ``[B]``; None: its first two elements.
        pool: from a layer's output to features ``[B, d]``; None: feature maps ``[B, d, H, W]`` are averaged over their
            positions, and anything else but ``[B, d]`` is refused.
        decays: see :class:`~lightning_fed.metrics.NeuralCollapse`.
        prefix: of the logged names. Two monitors need two.
        directory: of the images; by default ``neural_collapse`` in the logger's directory, or in the Trainer's
            ``default_root_dir`` if there is no logger.
        plots: draw images.

    Raises:
        ValueError: if a setting is out of range; at the start of the fit, if there is no such layer; at the first
            measurement, if a layer yields no vectors.
    """

    def __init__(
        self,
        head: str | None = None,
        layer: str | None = None,
        layers: Sequence[str] | None = None,
        every_n_epochs: int = 1,
        data: Literal["train", "val"] = "train",
        max_batches: int | None = None,
        batch_size: int | None = None,
        nearest_centre: bool = True,
        split_batch: Callable[[Any], tuple[Any, Tensor]] | None = None,
        pool: Callable[[Any], Tensor] | None = None,
        decays: tuple[float, float] | None = None,
        prefix: str = "nc",
        directory: str | None = None,
        plots: bool = True,
    ) -> None:
        check_names(prefix=prefix, **given(head=head, layer=layer))
        check_kinds((list, tuple), **given(layers=layers))
        for name in layers or ():
            check_names(layers=name)
        check_counts(every_n_epochs=every_n_epochs, **given(max_batches=max_batches, batch_size=batch_size))
        check_choice("data", data, "train", "val")
        check_flags(nearest_centre=nearest_centre, plots=plots)
        check_callables(**given(split_batch=split_batch, pool=pool))
        check_pairs("(0, inf)", **given(decays=decays))
        check_paths(**given(directory=directory))
        self.head, self.layer, self.layers = head, layer, list(layers or ())
        self.every_n_epochs, self.data = every_n_epochs, data
        self.max_batches, self.batch_size = max_batches, batch_size
        self.nearest_centre = nearest_centre
        self.split_batch: SplitBatch | None = split_batch
        self.pool: Pool | None = pool
        self.decays = decays
        self.prefix, self.directory, self.plots = prefix, directory, plots
        # For each logged name without prefix, (epochs done, value).
        self.curves: Curves = {}
        # What the pictures show, of the last measurement.
        self.snapshot: Snapshot | None = None
        self._missing: set[int] = set()
        self._tap: FeatureTap | None = None
        self._images: Path | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tap = FeatureTap(pl_module, self.head, self.layer, self.layers, self.split_batch, self.pool)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch
        kept = {name: [point for point in points if point[0] <= done] for name, points in self.curves.items()}
        self.curves = {name: points for name, points in kept.items() if points}
        self.snapshot, self._missing = None, set()
        if self.plots and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._images = figure_directory(trainer, "neural_collapse", self.directory)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch + 1
        # Where ranks may die, one of them speaks for all.
        if done % self.every_n_epochs or (is_elastic(trainer) and not trainer.is_global_zero):
            return
        measures = self._measure(trainer, pl_module)
        for name, value in measures.items():
            self.curves.setdefault(name, []).append((done, value))
            # Ranks have the same value already; sync_dist keeps Lightning from asking for it.
            pl_module.log(
                f"{self.prefix}/{name}", value, on_step=False, on_epoch=True, sync_dist=not is_elastic(trainer)
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._images is not None and trainer.is_global_zero and self.curves:
            self._draw(trainer)
            rank_zero_info(f"Plots of neural collapse: {self._images}")
        self._images = self._tap = None

    def state_dict(self) -> dict[str, Any]:
        return {"curves": {name: list(points) for name, points in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: list(points) for name, points in state_dict["curves"].items()}

    def _measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """All measures of the module as it is now; a collective call."""
        limit = 1 if trainer.fast_dev_run else self.max_batches  # type: ignore[attr-defined]
        samples = samples_of(trainer, self.data, self.batch_size, limit)
        settings: dict[str, Any] = {"distributed_available_fn": partial(sums_over_ranks, trainer, samples)}
        sums: dict[str, ClassMoments] = {}

        def add(seen: Seen) -> None:
            for name, features in seen.features.items():
                if name not in sums:
                    sizes = seen.logits.shape[1], features.shape[1]
                    sums[name] = ClassMoments(*sizes, **settings).to(module.device)
                sums[name].update(features, seen.labels)

        self._look(trainer, module, samples, add)
        if not sums:
            raise ValueError(f"data={self.data!r}: there is no batch to measure neural collapse on.")
        moments: dict[str, Moments] = {}
        for name, metric in sums.items():
            with metric.sync_context():
                moments[name] = metric.moments()
        with as_consensus(trainer):
            measures = self._compute(moments, sums[""].num_classes)
        if self.nearest_centre:
            measures |= self._disagreement(trainer, module, samples, moments, settings)
        return measures

    def _disagreement(
        self,
        trainer: Trainer,
        module: LightningModule,
        samples: Samples,
        moments: dict[str, Moments],
        settings: dict[str, Any],
    ) -> dict[str, float]:
        """NC4 of all layers. Random augmentation is that of the first pass: generators begin where they began then."""
        agreements = {
            name: NearestCentreAgreement(found.means, found.classes, **settings) for name, found in moments.items()
        }

        def compare(seen: Seen) -> None:
            for name, features in seen.features.items():
                agreements[name].update(features, seen.logits)

        self._look(trainer, module, samples, compare)
        return {under(name, "nc4"): float(metric.compute()) for name, metric in agreements.items()}

    def _look(self, trainer: Trainer, module: LightningModule, samples: Samples, use: Callable[[Seen], None]) -> None:
        """One pass over the samples of this rank."""
        assert self._tap is not None
        batches = self._tap.batches(trainer, samples)
        with undisturbed(trainer, module), closing(batches):
            for seen in batches:
                use(seen)

    def _compute(self, moments: dict[str, Moments], num_classes: int) -> dict[str, float]:
        """The measures of all layers but NC4, while the module is the one that was looked at."""
        assert self._tap is not None and self._tap.head is not None
        measures: dict[str, float] = {}
        for name, found in moments.items():
            sizes = num_classes, found.means.shape[1]
            weight, bias = (None, None) if name else classifier_of(self._tap.head, *sizes)
            values = collapse_measures(found, weight, bias, self.decays)
            values["nc2"] = values.pop("nc2_etf")
            measures |= {under(name, key): float(value) for key, value in values.items()}
            if not name:
                self.snapshot = snapshot_of(found, weight)
        self._name_missing(set(range(num_classes)) - set(moments[""].classes.tolist()), num_classes)
        return measures

    def _name_missing(self, missing: set[int], num_classes: int) -> None:
        """Say once of each class that it has no sample."""
        if missing - self._missing:
            rank_zero_warn(
                f"classes {sorted(missing)} have no sample in data={self.data!r}: neural collapse is measured on the "
                f"other {num_classes - len(missing)}."
            )
        self._missing |= missing

    def _draw(self, trainer: Trainer) -> None:
        self._save(trainer, "curves", draw_curves(self.curves))
        if self.layers:
            self._save(trainer, "depth", draw_depth(self.curves, self.layers))
        if self.snapshot is not None:
            self._save(trainer, "gram", draw_gram(self.snapshot))
            self._save(trainer, "means", draw_means(self.snapshot))

    def _save(self, trainer: Trainer, name: str, figure: Figure) -> None:
        assert self._images is not None
        save_figure(trainer, self._images, f"{self.prefix}/{name}", figure)


def under(layer: str, name: str) -> str:
    """A measure's name, with the layer that it is about if that is not the main one."""
    return f"{layer}/{name}" if layer else name


def sums_over_ranks(trainer: Trainer, samples: Samples) -> bool:
    """Whether the ranks' sums are parts of one."""
    federation = federation_in(trainer)
    one_process = trainer.world_size == 1 or (federation is not None and federation.is_elastic)
    return samples.are_shared and not one_process


def classifier_of(head: nn.Module, num_classes: int, num_features: int) -> tuple[Tensor | None, Tensor | None]:
    """Weight ``[C, d]`` and bias ``[C]`` of a head; None where it has none that reads these features."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape != (num_classes, num_features):
        return None, None
    return weight, bias if isinstance(bias, Tensor) and bias.shape == (num_classes,) else None

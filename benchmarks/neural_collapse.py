"""What neural-collapse metrics cost and find: compute and update against plain definitions, and a terminal phase.

``costs``: NC1 from the streamed sums through the C x C Gram matrix, against the float64 ``pinv`` of the d x d
between-class covariance from the same sums; and ``update`` with a batch of 256 float32 features, against two other
exact ways to stream the same moments: the whole d x d product of the same sums, and a merge of means and scatters (Chan
et al. 1979) that touches all C x d means in every batch. Milliseconds of CPU. The ways alternate in one process after a
warm-up; a ratio is the median of the ratios of neighbouring runs, its spread the smallest and the largest of them.

``phase``: protocol of Papyan, Han and Donoho (PNAS 2020) in small: 1,000 digits, a BatchNorm MLP 64-256-128-10 trained
for 400 epochs, long after the last training error, with the monitor in Lightning's Trainer.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import process_time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.callbacks import NeuralCollapseMonitor
from lightning_fed.callbacks.figures import new_figure
from lightning_fed.callbacks.neural_collapse_plots import Curves, Snapshot, plot_means, plot_measures
from lightning_fed.metrics import ClassMoments, Moments
from lightning_fed.metrics.neural_collapse import between_class_spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEATURES, BATCH = 2048, 256


def alternate(ways: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of CPU of each way in each repeat."""
    times: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for way, measured in zip(ways, times):
            start = process_time()
            way()
            if repeat:  # the first is the warm-up
                measured.append(1e3 * (process_time() - start))
    return times


def against(other: list[float], ours: list[float]) -> str:
    """How many times faster ours is."""
    ratios = sorted(slow / fast for slow, fast in zip(other, ours))
    return f"{median(ratios):.1f} ({ratios[0]:.1f} - {ratios[-1]:.1f})"


def nc1_by_gram(moments: Moments) -> Tensor:
    centred = moments.centred
    spectrum, within = between_class_spectrum(moments.scatter, centred, centred @ centred.T)
    return (within / spectrum.square()).sum() / moments.counts.sum() / len(centred)


def nc1_by_pinv(moments: Moments) -> Tensor:
    centred = moments.centred
    between = centred.T @ centred / len(centred)
    inverse = torch.linalg.pinv(between, hermitian=True, rtol=max(centred.shape) * torch.finfo(torch.float64).eps)
    return (moments.scatter @ inverse).trace() / moments.counts.sum() / len(centred)


class NaiveSums:
    """The same sums with the whole d x d product."""

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64)
        self.sums = torch.zeros(num_classes, FEATURES, dtype=torch.float64)
        self.products = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        features = features.double()
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.sums += nn.functional.one_hot(labels, len(self.counts)).double().T @ features
        self.products += features.T @ features

    def scatter_matrix(self) -> Tensor:
        return self.products - self.sums.T @ (self.sums / self.counts[:, None])


class NaiveMerge:
    """Means and scatter, merged with those of a batch over all classes."""

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64)
        self.means = torch.zeros(num_classes, FEATURES, dtype=torch.float64)
        self.scatter = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        features = features.double()
        members = nn.functional.one_hot(labels, len(self.counts)).double()
        counts = members.sum(dim=0)
        means = (members.T @ features) / counts.clamp(min=1)[:, None]
        inner, total = features - means[labels], self.counts + counts
        change = means - self.means
        spread = change * (self.counts * counts / total.clamp(min=1))[:, None]
        # Samples of a class lie around its new mean of this batch, and that away from the old one.
        self.scatter += inner.T @ inner + change.T @ spread
        self.means += change * (counts / total.clamp(min=1))[:, None]
        self.counts = total

    def scatter_matrix(self) -> Tensor:
        return self.scatter


def filled(num_classes: int) -> tuple[ClassMoments, list[tuple[Tensor, Tensor]]]:
    """Moments of batches around random class means, ten samples a class."""
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(num_classes, FEATURES, generator=draw)
    metric, batches = ClassMoments(num_classes, FEATURES), []
    for labels in torch.arange(num_classes).repeat(10).split(BATCH):
        batches.append((means[labels] + torch.randn(len(labels), FEATURES, generator=draw), labels))
        metric.update(*batches[-1])
    return metric, batches


def costs(repeats: int) -> None:
    print(f"d = {FEATURES}, {torch.get_num_threads()} thread(s)")
    print("| C | work | ours, ms | the other, ms | times faster (spread) | relative difference | state, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for number in (100, 1000):
        metric, batches = filled(number)
        moments = metric.moments()
        state = sum(getattr(metric, name).nbytes for name in metric.metric_state) / 1e6
        gram, pinv = alternate([partial(nc1_by_gram, moments), partial(nc1_by_pinv, moments)], repeats)
        difference = float(abs(nc1_by_gram(moments) / nc1_by_pinv(moments) - 1))
        row(number, "compute NC1, against pinv", gram, pinv, difference, state)
        others: list[Any] = [NaiveSums(number), NaiveMerge(number)]
        for other in others:
            for batch in batches:
                other.update(*batch)
        differences = [float((other.scatter_matrix() - moments.scatter).norm()) for other in others]
        ours, sums, merge = alternate([partial(way.update, *batches[0]) for way in (metric, *others)], repeats)
        for name, times, difference in zip(("whole product", "merge of all classes"), (sums, merge), differences):
            row(number, f"update, against {name}", ours, times, difference / float(moments.scatter.norm()), state)


def row(number: int, work: str, ours: list[float], other: list[float], difference: float, state: float) -> None:
    print(
        f"| {number} | {work} | {median(ours):.0f} | {median(other):.0f} | {against(other, ours)} | "
        f"{difference:.0e} | {state:.1f} |"
    )


class Digits(pl.LightningModule):
    """64-256-128-10 with BatchNorm, as the notes' terminal phase has it."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        widths = (64, 256, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers += [linear, nn.BatchNorm1d(after), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


class FirstAndLast(pl.Callback):
    """Keeps the class means of the monitor's first measurement; goes behind it in the Trainer's callbacks."""

    def __init__(self, monitor: NeuralCollapseMonitor) -> None:
        self.monitor = monitor
        self.first: Snapshot | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first = self.first or self.monitor.snapshot


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,000 training and 797 test images in a random order."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    data = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    train, test = (tuple(tensor[part] for tensor in data) for part in (slice(1000), slice(1000, None)))
    return TensorDataset(*train), TensorDataset(*test)


def phase(seed: int, epochs: int, plot: Path | None) -> None:
    """One run; prints the measures of the first and some later epochs."""
    pl.seed_everything(seed, verbose=False)
    train, test = digits()
    seen = NeuralCollapseMonitor(plots=False, layers=["body.2"], batch_size=1000)
    unseen = NeuralCollapseMonitor(data="val", prefix="nc/val", plots=False, every_n_epochs=epochs)
    ends = FirstAndLast(seen)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
        callbacks=[seen, unseen, ends],
    )
    start = process_time()
    trainer.fit(Digits(epochs), DataLoader(train, 64, shuffle=True), DataLoader(test, 797))
    seconds = process_time() - start
    names = ("nc1", "nc1_trace", "cdnv", "nc2", "nc2_equinorm", "nc2_equiangle", "nc3", "nc4", "effective_rank")
    curves = {name: dict(seen.curves[name]) for name in names}
    for epoch in sorted({min(epoch, epochs) for epoch in (1, 5, 20, 100, 200, epochs)}):
        print(f"| {seed} | {epoch} | " + " | ".join(f"{curves[name][epoch]:.4f}" for name in names) + " |")
    first, last = curves["nc1"][1], curves["nc1"][epochs]
    accuracy, on_test = float(trainer.callback_metrics["val/acc"]), unseen.curves["nc1"][-1][1]
    print(
        f"seed {seed}: NC1 fell {first / last:.0f} times; on test data {on_test:.4f}; test accuracy {accuracy:.3f}; "
        f"{seconds:.0f} s of CPU",
        flush=True,
    )
    if plot is not None and ends.first is not None and seen.snapshot is not None:
        draw(seen.curves, ends.first, seen.snapshot, epochs).savefig(plot, dpi=110)


def draw(curves: Curves, first: Snapshot, last: Snapshot, epochs: int) -> Figure:
    """The measures over epochs, and class means after the first and the last one."""
    figure = new_figure(13, 4.2)
    over_epochs, early, late = figure.subplots(1, 3)
    plot_measures(over_epochs, curves, ("nc1", "cdnv", "nc2", "nc3"), logarithmic=True)
    over_epochs.set_title("Neural collapse on 1,000 digits")
    for axes, snapshot, epoch in ((early, first, 1), (late, last, epochs)):
        plot_means(axes, snapshot)
        axes.set_title(f"Class means after epoch {epoch}, 2 sigma shaded")
    late.get_legend().remove()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["costs", "phase"], nargs="*", default=["costs", "phase"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path, help="file for a picture of the first seed's run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if "costs" in arguments.what:
        costs(arguments.repeats)
    if "phase" in arguments.what:
        print("| seed | epoch | NC1 | trace | CDNV | NC2 | equinorm | equiangle | NC3 | NC4 | eff. rank |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for seed in arguments.seeds:
            phase(seed, arguments.epochs, arguments.plot if seed == arguments.seeds[0] else None)


if __name__ == "__main__":
    main()

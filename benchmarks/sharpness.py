"""SAM on the digits: accuracy and curvature with and without label noise, beside SGD with the same compute; its cost.

1,000 training and 797 test images of scikit-learn's digits, MLP 64-128-128-10 with ReLU, SGD with learning rate 0.05
(cosine to zero), momentum 0.9, weight decay 5e-4, batches of 64, 150 epochs; the seed decides split, wrong labels,
initialization and order. The top eigenvalue is that of the training loss's Hessian, by power iteration. "Best" is the
best test accuracy after any epoch, which early stopping with a perfect monitor would find. Cost is CPU time of a step
inside a Trainer, the median over the steps of a run; sides alternate, and a ratio is the median over pairs of runs.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import mean, median, stdev
from time import process_time
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from overhead import Gathered, as_it_is
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_fed.callbacks import SharpnessAware
from lightning_fed.curvature import Hessian, top_eigenvalue

TRAIN, BATCH, WARM_UP_STEPS = 1000, 64, 50


class Classifier(LightningModule):
    """A network under SGD with a cosine schedule over the epochs."""

    def __init__(self, net: nn.Module, epochs: int) -> None:
        super().__init__()
        self.net, self.epochs = net, epochs

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def mlp() -> nn.Module:
    """64-128-128-10."""
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def convnet() -> nn.Module:
    """Two convolutions with BatchNorm on 8x8 images, wide enough that arithmetic outweighs the loop around it."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def digits(seed: int, noise: float) -> tuple[Gathered, Gathered]:
    """Training and test set; a share of the training labels is replaced by another class."""
    random = np.random.default_rng(seed)
    data = load_digits()
    order = random.permutation(len(data.target))
    images, labels = data.images[order] / 16, data.target[order].copy()
    wrong = random.permutation(TRAIN)[: round(noise * TRAIN)]
    labels[wrong] = (labels[wrong] + random.integers(1, 10, len(wrong))) % 10
    x, y = torch.from_numpy(images).float().unsqueeze(1), torch.from_numpy(labels)
    return Gathered(x[:TRAIN], y[:TRAIN]), Gathered(x[TRAIN:], y[TRAIN:])


class TestAccuracy(Callback):
    """Test accuracy after each epoch."""

    def __init__(self, test: Gathered) -> None:
        self.test = test
        self.accuracies: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            images, labels = self.test.tensors
            self.accuracies.append(float((pl_module(images).argmax(dim=1) == labels).float().mean()))


def train(module: LightningModule, data: Dataset[Any], epochs: int, *callbacks: Callback, shuffle: bool = True) -> None:
    """One silent fit on a CPU."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, BATCH, shuffle=shuffle, collate_fn=as_it_is))


def sharpness(module: Classifier, data: Gathered) -> float:
    """The top eigenvalue of the training loss's Hessian."""
    images, labels = data.tensors
    hessian = Hessian([lambda: nn.functional.cross_entropy(module(images), labels)], module.parameters())
    return top_eigenvalue(hessian).value


class Method(NamedTuple):
    """A row of the first table."""

    name: str
    rho: float = 0.0
    adaptive: bool = False
    epochs: int = 150

    def callbacks(self) -> list[Callback]:
        return [SharpnessAware(self.rho, adaptive=self.adaptive)] if self.rho else []


RADII = (0.05, 0.1, 0.2, 0.5, 1.0)
METHODS = [
    Method("SGD"),
    Method("SGD, twice the epochs", epochs=300),
    *(Method(f"SAM {rho}", rho) for rho in RADII),
    *(Method(f"ASAM {rho}", rho, adaptive=True) for rho in (1.0, 2.0)),
]


class Outcome(NamedTuple):
    """What came out of each seed: test accuracies in percent, the training loss's top eigenvalue."""

    last: list[float]
    best: list[float]
    eigenvalue: list[float]


def outcome(method: Method, noise: float, seeds: int) -> Outcome:
    """Train a method from each seed."""
    result = Outcome([], [], [])
    for seed in range(seeds):
        data, test = digits(seed, noise)
        seed_everything(seed, verbose=False)
        module, watch = Classifier(mlp(), method.epochs), TestAccuracy(test)
        train(module, data, method.epochs, *method.callbacks(), watch)
        result.last.append(100 * watch.accuracies[-1])
        result.best.append(100 * max(watch.accuracies))
        result.eigenvalue.append(sharpness(module, data))
    return result


def row(method: Method, noise: float, result: Outcome) -> str:
    """A row of the first table."""
    spread = f" ± {stdev(result.last):.1f}" if len(result.last) > 1 else ""
    each = " / ".join(f"{value:.3f}" for value in result.eigenvalue)
    return (
        f"| {noise:.0%} | {method.name} | {mean(result.last):.1f}{spread} | {mean(result.best):.1f} "
        f"| {mean(result.eigenvalue):.3f} ({each}) |"
    )


def plot(results: dict[float, dict[Method, Outcome]], path: str) -> None:
    """Accuracy and top eigenvalue against the radius; bands are a standard deviation over seeds to either side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for colour, (noise, outcomes) in zip(("tab:blue", "tab:orange"), results.items()):
        sweep = {
            method.rho: found for method, found in outcomes.items() if method.epochs == 150 and not method.adaptive
        }
        longer = next(found for method, found in outcomes.items() if method.epochs == 300)
        for axes, index in ((left, 0), (right, 2)):
            values = [found[index] for found in sweep.values()]
            label = f"{noise:.0%} wrong labels"
            axes.plot(list(sweep), [mean(each) for each in values], "o-", color=colour, markersize=4, label=label)
            low, high = ([mean(each) + side * stdev(each) for each in values] for side in (-1, 1))
            axes.fill_between(list(sweep), low, high, color=colour, alpha=0.2, linewidth=0)
            axes.axhline(mean(longer[index]), color=colour, linestyle=":", linewidth=1)
        left.plot(list(sweep), [mean(found.best) for found in sweep.values()], "--", color=colour, linewidth=1)
    left.set(xlabel="radius rho (0 is SGD)", ylabel="test accuracy, %")
    right.set(xlabel="radius rho (0 is SGD)", ylabel="top eigenvalue of the Hessian", yscale="log", ylim=(0.05, 30))
    left.plot([], [], "k--", linewidth=1, label="best epoch")
    left.plot([], [], "k:", linewidth=1, label="SGD, twice the epochs")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=0.05)
        axes.set_xlim(-0.005, 1.2)
        axes.set_xticks([0, *RADII], ["0", *map(str, RADII)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


class StepClock(Callback):
    """CPU time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(process_time())


class Nothing(Callback):
    """Changes nothing."""


def milliseconds(make: Callable[[], nn.Module], callbacks: list[Callback], steps: int) -> float:
    """CPU time of the median step."""
    torch.manual_seed(0)
    samples = BATCH * (WARM_UP_STEPS + steps)
    clock = StepClock()
    data = Gathered(torch.randn(samples, 1, 8, 8), torch.randint(10, (samples,)))
    train(Classifier(make(), 1), data, 1, clock, *callbacks, shuffle=False)
    ends = clock.ends[WARM_UP_STEPS - 1 :]
    return 1e3 * median(end - start for start, end in pairwise(ends))


def cost(name: str, make: Callable[[], nn.Module], callbacks: Callable[[], list[Callback]], args: Any) -> str:
    """A row of the second table."""
    steps = args.steps if make is mlp else args.steps // 4
    pairs = []
    for repeat in range(args.repeats + 1):
        sides = [list, callbacks] if repeat % 2 else [callbacks, list]
        times = {side: milliseconds(make, side(), steps) for side in sides}
        pairs.append((times[list], times[callbacks]))
    pairs = pairs[1:]  # the first pair warms up
    ratios = [ours / plain for plain, ours in pairs]
    plain, ours = (median(times) for times in zip(*pairs))
    return f"| {name} | {plain:.3f} | {ours:.3f} | {median(ratios):.3f} | {min(ratios):.3f} - {max(ratios):.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["accuracy", "cost", "all"], default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", help="draw accuracies and eigenvalues of two or more seeds")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.part != "cost":
        accuracy_and_curvature(args.seeds, args.plot)
    if args.part != "accuracy":
        print("| step | plain, ms | with it, ms | ratio | spread |")
        print("|---|---|---|---|---|")
        for name, make in (("MLP", mlp), ("convnet with BatchNorm", convnet)):
            print(cost(f"{name}, SAM", make, lambda: [SharpnessAware()], args), flush=True)
            print(cost(f"{name}, five callbacks that do nothing", make, lambda: [Nothing() for _ in range(5)], args))


def accuracy_and_curvature(seeds: int, plot_path: str | None) -> None:
    """Print the first table and draw it."""
    print("| wrong labels | method | test accuracy, last | best | top eigenvalue (seeds) |")
    print("|---|---|---|---|---|")
    results: dict[float, dict[Method, Outcome]] = {0.0: {}, 0.4: {}}
    for noise, outcomes in results.items():
        for method in METHODS:
            outcomes[method] = outcome(method, noise, seeds)
            print(row(method, noise, outcomes[method]), flush=True)
    if plot_path is not None and seeds > 1:
        plot(results, plot_path)


if __name__ == "__main__":
    main()

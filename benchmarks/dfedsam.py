"""Test accuracy, consensus and bytes of decentralized algorithms on non-IID digits: does the paper's order hold?

50 clients on a ring share the 1,197 training digits with Dirichlet(0.3) label skew. All algorithms make the same number
of local optimizer steps, 5 x ROUNDS minibatches of 16: D-PSGD talks after every one, the others after every fifth. SAM
evaluates two gradients a step, which is counted. Hyperparameters are chosen for each algorithm alone by the validation
accuracy (ties: loss) of the consensus model, on a seed of their own; test data are seen once, by the final runs.
The consensus distance is ``sqrt(mean_i ||x_i - x_bar||^2)`` after the last gossip.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_fed.data import DigitsDataModule
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.modules import ImageClassifier
from lightning_fed.strategies import DFedSAMStrategy, GossipStrategy

CLIENTS, ALPHA, LOCAL_STEPS, BATCH = 50, 0.3, 5, 16
LRS = (0.05, 0.1, 0.2, 0.4, 0.8)
RHOS = (0.01, 0.05, 0.1, 0.2)
TUNING_SEED, SEEDS = 100, (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One training: an algorithm with its hyperparameters, on one seed."""

    name: str
    rounds: int
    local_steps: int = LOCAL_STEPS
    momentum: float = 0.0
    rho: float | None = None
    gossip_steps: int = 1
    lr: float = 0.1
    seed: int = TUNING_SEED

    @property
    def gradients(self) -> int:
        """Gradient evaluations of one client."""
        return self.rounds * self.local_steps * (1 if self.rho is None else 2)

    def strategy(self) -> FederatedStrategy:
        settings: dict[str, Any] = {
            "topology": "ring",
            "gossip_steps": self.gossip_steps,
            "num_clients": CLIENTS,
            "local_steps": self.local_steps,
            "evaluate": "both",
            "on_nonfinite": "raise",
            "seed": self.seed,
        }
        return GossipStrategy(**settings) if self.rho is None else DFedSAMStrategy(rho=self.rho, **settings)


def train(run: Run) -> dict[str, float]:
    """Metrics of one run: validation for the choice of hyperparameters, the rest for the table."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(run.seed, verbose=False)
    module = ImageClassifier("small_convnet", lr=run.lr, momentum=run.momentum)
    data = DigitsDataModule(num_clients=CLIENTS, batch_size=BATCH, seed=run.seed)
    strategy = run.strategy()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=run.rounds,
        check_val_every_n_epoch=run.rounds,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, data)
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        return {"val_acc": 0.0, "val_loss": float("inf")}  # diverged
    metrics = dict(trainer.callback_metrics)
    distance, sent = strategy.consensus_distance(), float(strategy.exchange.sent_bytes.mean())
    metrics.update(trainer.test(module, data, verbose=False)[0])
    return {
        "val_acc": float(metrics["val/acc"]),
        "val_loss": float(metrics["val/loss"]),
        "test_acc": float(metrics["test/acc"]),
        "clients_acc": float(metrics["test/acc/clients_mean"]),
        "distance": distance,
        "megabytes": sent / 1e6,
    }


Train = Callable[[Iterable[Run]], Iterable[dict[str, float]]]


def choose(candidates: list[Run], train_all: Train) -> Run:
    """The candidate that validates best."""
    results = list(train_all(candidates))
    for run, result in zip(candidates, results):
        line = (
            f"{run.name}: lr={run.lr} rho={run.rho} val/acc={result['val_acc']:.3f} val/loss={result['val_loss']:.3f}"
        )
        print(line, file=sys.stderr, flush=True)
    best = max(range(len(candidates)), key=lambda i: (results[i]["val_acc"], -results[i]["val_loss"]))
    return candidates[best]


def tune(algorithm: Run, train_all: Train) -> Run:
    """The learning rate first, then SAM's radius at that rate."""
    best = choose([replace(algorithm, lr=lr) for lr in LRS], train_all)
    return best if best.rho is None else choose([replace(best, rho=rho) for rho in RHOS], train_all)


def row(name: str, run: Run, train_all: Train) -> str:
    """A row of the table: the run on every seed, as mean and standard deviation."""
    results = list(train_all([replace(run, seed=seed) for seed in SEEDS]))

    def cell(metric: str) -> str:
        values = [result[metric] for result in results]
        return f"{mean(values):.3f} ± {stdev(values):.3f}"

    rho = "-" if run.rho is None else run.rho
    return (
        f"| {name} | {run.lr} | {rho} | {cell('test_acc')} | {cell('clients_acc')} | {cell('distance')} "
        f"| {mean(result['megabytes'] for result in results):.2f} | {run.gradients} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of 5 local steps; D-PSGD: five times that, of one step")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; results do not depend on it")
    args = parser.parse_args()
    algorithms = [
        Run("D-PSGD", 5 * args.rounds, local_steps=1),
        Run("DFedAvg", args.rounds),
        Run("DFedAvgM", args.rounds, momentum=0.9),
        Run("DFedSAM", args.rounds, rho=0.05),
        Run("DFedSAM-MGS", args.rounds, rho=0.05, gossip_steps=4),
    ]
    print("| algorithm | lr | rho | consensus acc. | clients' acc. | consensus distance | MB sent | gradients |")
    print("|---|---|---|---|---|---|---|---|")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:

        def train_all(runs: Iterable[Run]) -> Iterable[dict[str, float]]:
            return pool.map(train, runs)

        tuned = {algorithm.name: tune(algorithm, train_all) for algorithm in algorithms}
        for name, run in tuned.items():
            print(row(name, run, train_all), flush=True)
        # Distances depend on the learning rate: a control in which only the number of gossip steps differs.
        control = replace(tuned["DFedSAM"], gossip_steps=4)
        print(row("control: DFedSAM's lr and rho, 4 gossip steps", control, train_all), flush=True)


if __name__ == "__main__":
    main()

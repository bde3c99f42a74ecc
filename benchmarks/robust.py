"""Test accuracy of 26 clients on digits, 5 of them hostile: every attack on every rule, and on plain averaging.

The setting is that of MoNNA (Farhadkhani et al., ICML 2023), on smaller data: everybody talks to everybody after each
step of SGD with momentum 0.99 (m <- 0.99 m + 0.01 g, x <- x - 0.75 m), minibatches of 25, Dirichlet(1) label skew; here
a multilayer perceptron on the 1,197 training digits. Rules expect f = 5. Attackers know all honest models. All messages
arrive, so a node averages the n - f models nearest to its own.

The model that is measured is the mean of the 21 honest clients' models: those of the hostile five, also of the label
flippers, get a weight of zero.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_fed import (
    ALittleIsEnough,
    CoordinateMedian,
    FallOfEmpires,
    GaussianNoise,
    GeometricMedian,
    GossipStrategy,
    Krum,
    NearestNeighborAverage,
    NotANumber,
    SignFlip,
    Silent,
    TrimmedMean,
)
from lightning_fed.attacks import Attack
from lightning_fed.data import DigitsDataModule, LabelFlip
from lightning_fed.modules import ImageClassifier
from lightning_fed.partition import Dirichlet
from lightning_fed.robust import RobustMix

CLIENTS, BYZANTINE, BATCH, ALPHA = 26, 5, 25, 1.0
BETA, ETA = 0.99, 0.75
HOSTILE = list(range(BYZANTINE))

RULES: dict[str, Callable[[], RobustMix | None]] = {
    "plain averaging": lambda: None,
    "coordinate median": CoordinateMedian,
    "trimmed mean": lambda: TrimmedMean(BYZANTINE),
    "geometric median": GeometricMedian,
    "Krum": lambda: Krum(BYZANTINE),
    "Multi-Krum, m = 21": lambda: Krum(BYZANTINE, selected=CLIENTS - BYZANTINE),
    "nearest neighbours": lambda: NearestNeighborAverage(BYZANTINE),
}
ATTACKS: dict[str, Callable[[], Attack | None]] = {
    "none": lambda: None,
    "sign flip x 5": lambda: SignFlip(HOSTILE, scale=5.0),
    "a little (z = 1.5)": lambda: ALittleIsEnough(HOSTILE, z=1.5),
    "empires (10)": lambda: FallOfEmpires(HOSTILE, epsilon=10.0),
    "noise (1)": lambda: GaussianNoise(HOSTILE, std=1.0),
    "label flip": lambda: None,
    "silent": lambda: Silent(HOSTILE),
    "NaN": lambda: NotANumber(HOSTILE),
}


def accuracy(attack: str, rule: str, steps: int, seed: int) -> float:
    """Test accuracy of the honest clients' mean model; NaN if the run ended because models were not finite."""
    seed_everything(seed, verbose=False)
    data = DigitsDataModule(CLIENTS, Dirichlet(ALPHA, min_samples=2), BATCH, seed=seed)
    samples: Dataset[Any] = data.train_dataset
    if attack == "label flip":
        samples = LabelFlip(samples, HOSTILE, data.num_classes)
    strategy = GossipStrategy(
        "complete",
        robust=RULES[rule](),
        attack=ATTACKS[attack](),
        num_clients=CLIENTS,
        local_steps=1,
        rounds_per_epoch=steps,
        optimizer_state="keep",
        clients_per_step=CLIENTS,
        on_nonfinite="drop",
        seed=seed,
    )
    # torch's momentum has no factor 1 - beta before the gradient: the rate has it.
    module = ImageClassifier("mlp", lr=ETA * (1 - BETA), momentum=BETA)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        with redirect_stdout(sys.stderr):
            trainer.fit(module, DataLoader(samples, BATCH, shuffle=True))
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        return float("nan")
    weights = np.zeros(CLIENTS)
    weights[BYZANTINE:] = 1 / (CLIENTS - BYZANTINE)
    with torch.no_grad():
        honest = strategy.exchange.mean(strategy.bank.rows.matrix, weights)
        nn.utils.vector_to_parameters(honest, module.parameters())
        images, labels = test_set(data)
        return float((module.eval()(images).argmax(dim=1) == labels).float().mean())


def test_set(data: DigitsDataModule) -> tuple[Tensor, Tensor]:
    """All test images and labels."""
    (batch,) = data.test_dataloader()
    return batch[0], batch[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="local steps of each client, one round each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print("| attack |", " | ".join(RULES), "|")
    print("|---" * (1 + len(RULES)) + "|")
    began = time.process_time()
    for attack in ATTACKS:
        results = [accuracy(attack, rule, args.steps, args.seed) for rule in RULES]
        cells = ["diverged" if np.isnan(result) else f"{result:.3f}" for result in results]
        print(f"| {attack} |", " | ".join(cells), "|", flush=True)
    print(f"\n{time.process_time() - began:.0f} CPU s")


if __name__ == "__main__":
    main()

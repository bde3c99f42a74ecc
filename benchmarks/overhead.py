"""The cost of the engine where it brings nothing: one client on one rank, against Lightning's own strategy.

The same module, data and Trainer settings run under ``strategy="auto"`` (one device) and under this package's gossip
with ``num_clients=1``; batches of 32 from a TensorDataset, in file order. The two sides alternate in one process, after
a warm-up run of each. Reported is CPU time per local step over a whole epoch but its first steps; the ratio is the
median over pairs.

A DataLoader collates a TensorDataset sample by sample, which this package replaces by one gather. To see the engine
without that gain, the rows "batches gathered" give both sides a data set that gathers a batch in one call.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fed.modules import MLP, ImageClassifier
from lightning_fed.strategies import GossipStrategy

BATCH, WARM_UP_STEPS = 32, 50


class Classifier(LightningModule):
    """The smallest possible step around a network: no logs, no metrics."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def convnet() -> nn.Module:
    """Three convolutions on 3x32x32 images, 32,042 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Gathered(Dataset[Any]):
    """A TensorDataset that is asked for whole batches."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> list[Tensor]:
        return [tensor[index] for tensor in self.tensors]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        numbers = torch.tensor(indices)
        return [tensor.index_select(0, numbers) for tensor in self.tensors]


def as_it_is(batch: list[Tensor]) -> list[Tensor]:
    """The collate function of batches that are complete."""
    return batch


class StepClock(Callback):
    """CPU time from the end of the warm-up steps to the end of the last one."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.start = self.end = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP_STEPS - 1:
            self.start = process_time()
        elif batch_idx == WARM_UP_STEPS + self.steps - 1:
            self.end = process_time()


def image_classifier() -> LightningModule:
    return ImageClassifier("mlp")


class Case(NamedTuple):
    """A module, the shape of one of its images, and how batches come."""

    name: str
    make: Callable[[], LightningModule]
    shape: tuple[int, ...]
    gathers: bool = False


def milliseconds_per_step(case: Case, steps: int, federated: bool) -> float:
    """One fit, of which ``steps`` steps are timed."""
    samples = BATCH * (WARM_UP_STEPS + steps)
    torch.manual_seed(0)
    tensors = torch.randn(samples, *case.shape), torch.randint(10, (samples,))
    dataset: Dataset[Any] = Gathered(*tensors) if case.gathers else TensorDataset(*tensors)
    loader = DataLoader(dataset, BATCH, collate_fn=as_it_is if case.gathers else None)
    clock = StepClock(steps)
    trainer = Trainer(
        strategy=GossipStrategy("complete", num_clients=1) if federated else "auto",
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(case.make(), loader)
    return 1e3 * (clock.end - clock.start) / steps


def compare(case: Case, steps: int, repeats: int) -> str:
    """Alternate the two sides; returns a row of the table."""
    for side in (False, True):  # warm up
        milliseconds_per_step(case, steps, side)
    pairs = []
    for repeat in range(repeats):
        # Swap who goes first, so that drift of the machine favours nobody.
        order = (False, True) if repeat % 2 == 0 else (True, False)
        times = {side: milliseconds_per_step(case, steps, side) for side in order}
        pairs.append((times[False], times[True]))
    ratios = [ours / plain for plain, ours in pairs]
    plain, ours = (median(times) for times in zip(*pairs))
    return f"| {case.name} | {plain:.3f} | {ours:.3f} | {median(ratios):.3f} | {min(ratios):.3f} - {max(ratios):.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| step | Lightning alone, ms | lightning_fed, ms | ratio | spread |")
    print("|---|---|---|---|---|")
    for case in (
        Case("MLP 64-64-64-10", lambda: Classifier(MLP()), (1, 8, 8)),
        Case("MLP, batches gathered", lambda: Classifier(MLP()), (1, 8, 8), gathers=True),
        Case("MLP in ImageClassifier (two logs a step), batches gathered", image_classifier, (1, 8, 8), gathers=True),
        Case("convnet on 3x32x32", lambda: Classifier(convnet()), (3, 32, 32)),
        Case("convnet, batches gathered", lambda: Classifier(convnet()), (3, 32, 32), gathers=True),
    ):
        steps = args.steps if case.shape == (1, 8, 8) else args.steps // 4
        print(compare(case, steps, args.repeats), flush=True)


if __name__ == "__main__":
    main()

"""Small federations that several tests run: a data set, modules, a silent Trainer, and what to compare afterwards."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_fed.data import FederatedDataset
from lightning_fed.federation.strategy import FederatedStrategy

FEATURES, CLASSES = 12, 4


def samples(count: int, seed: int = 0) -> TensorDataset:
    """A learnable classification problem: ``[count, 12]`` features, ``[count]`` labels of 4 classes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(features, (features @ teacher).argmax(dim=1))


class Noisy(Dataset[Any]):
    """Random augmentation with all three generators."""

    def __init__(self) -> None:
        self.samples = samples(60)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.samples[index]
        return inputs + 0.1 * torch.randn(FEATURES) + 0.1 * random.random() + 0.1 * np.random.rand(), label


def clients(num_clients: int, smallest: int = 10, step: int = 2) -> FederatedDataset:
    """Clients of unequal sizes: ``smallest``, ``smallest + step``, ... samples (never one left over from fours)."""
    sizes = [smallest + step * client for client in range(num_clients)]
    starts = np.cumsum([0, *sizes])
    indices = [np.arange(start, start + size) for start, size in zip(starts, sizes)]
    return FederatedDataset(samples(int(starts[-1])), indices)


def small_network(norm: bool = True, dropout: float = 0.2) -> nn.Sequential:
    """With BatchNorm and dropout, if wanted: what may depend on the layout, or on who shares a step."""
    return nn.Sequential(
        nn.Linear(FEATURES, 16),
        nn.BatchNorm1d(16) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(16, CLASSES),
    )


class Classifier(pl.LightningModule):
    """A small network with BatchNorm, dropout and logs: whatever may depend on the layout."""

    def __init__(self, norm: bool = True, dropout: float = 0.2, momentum: float = 0.0, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = small_network(norm, dropout)
        self.train_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        logits = self(features)
        loss = nn.functional.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/acc", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        features, labels = batch
        logits = self(features)
        self.val_accuracy(logits, labels)
        self.log("val/loss", nn.functional.cross_entropy(logits, labels))
        self.log("val/acc", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        features, labels = batch
        self.log("test/loss", nn.functional.cross_entropy(self(features), labels))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=self.hparams["momentum"])


def silent_trainer(strategy: Any, devices: int = 1, **settings: Any) -> pl.Trainer:
    """A Trainer on CPU that writes and prints nothing unless asked to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": devices,
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(strategy=strategy, **{**defaults, **settings})


def loaders(dataset: Any, batch_size: int = 4, shuffle: bool = True) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation loaders; 37 validation samples divide by neither 2 nor 4 ranks."""
    return DataLoader(dataset, batch_size, shuffle=shuffle), DataLoader(samples(37, seed=1), 10)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks of the default process group, or this one's alone."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_rows(strategy: FederatedStrategy) -> np.ndarray:
    """The rows of all clients, parameters and float buffers, ``[N, P + B]``; a collective call."""
    bank = strategy.bank
    mine = torch.cat([bank.rows.matrix, bank.buffers.matrix], dim=1).cpu().numpy()
    blocks = {block[0]: block[1] for block in gather_objects((strategy.exchange.clients.start, mine))}
    return np.concatenate([blocks[start] for start in sorted(blocks)])


def outcome(strategy: FederatedStrategy, trainer: pl.Trainer) -> dict[str, Any]:
    """What must not depend on the layout."""
    return {
        "rows": all_rows(strategy),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "bytes": strategy.exchange.sent_bytes.copy(),
        "total_bytes": strategy.exchange.total_bytes,
        "global_step": trainer.global_step,
        "round": strategy.round,
        "consensus_distance": strategy.consensus_distance(),
    }

"""Consistency distillation on two gloo ranks: replicas follow one schedule and stay equal."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from federations import silent_trainer
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.modules.diffusion import EDMDenoiser
from lightning_fed.modules.diffusion.consistency_training import ConsistencyTraining

WORLD, BATCH, BATCHES = 2, 4, 4


class Linear(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        features = self.layer(x.flatten(1)) + (time / 100).sin().to(x)[:, None]
        return self.dropout(features).view_as(x)


class Steps(pl.Callback):
    """Draws the same random numbers on every rank, and keeps the schedule."""

    def __init__(self) -> None:
        self.levels: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.levels.append(int(trainer.callback_metrics["train/discretization_steps"]))


def on_rank(strategy: str, world: int, same_data: bool) -> dict[str, Any]:
    teacher, pairs = EDMDenoiser(Linear(1), sigma_data=0.7), {"name": "doubling", "smallest": 4, "largest": 32}
    module = ConsistencyTraining(Linear(0), teacher, pairs=pairs, lr=0.01, ema_decay=0.9)
    trainer = silent_trainer(strategy, world, max_epochs=1, callbacks=[steps := Steps()], use_distributed_sampler=False)
    seed = 0 if same_data else trainer.global_rank
    images = torch.randn(BATCH * BATCHES, 1, 2, 2, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    trainer.fit(module, DataLoader(TensorDataset(images), BATCH))
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    return {"weights": weights, "levels": steps.levels, "images": images.numpy()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.array_equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


def test_two_ranks_that_see_the_same_are_one_process() -> None:
    alone, ranks = on_rank("auto", 1, True), run_ranks(WORLD, on_rank, "ddp", WORLD, True)
    assert alone["levels"] == ranks[0]["levels"] == ranks[1]["levels"] == [5, 9, 17, 33]
    assert equal(alone, ranks[0])
    assert equal(*ranks)


def test_ranks_that_see_different_images_stay_equal() -> None:
    ranks = run_ranks(WORLD, on_rank, "ddp", WORLD, False)
    assert not np.array_equal(ranks[0]["images"], ranks[1]["images"])
    assert ranks[0]["levels"] == ranks[1]["levels"] == [5, 9, 17, 33]
    assert equal(*ranks)

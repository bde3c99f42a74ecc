"""Small networks, images and modules of the tests of consistency training."""

from __future__ import annotations

from typing import Any

import diffusers
import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.modules.diffusion.consistency_training import ConsistencyTraining
from lightning_fed.modules.diffusion.noise_pairs import NoisePair

SIDE, CHANNELS = 3, 2
NUMBERS = CHANNELS * SIDE * SIDE
LOW, HIGH, DATA = 0.002, 80.0, 0.7


class Linear(nn.Module):
    """F(x, time) = W x + v sin(time / 100), of the flattened image: its gradient is known."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(NUMBERS, NUMBERS) / 5)
        self.v = nn.Parameter(torch.randn(NUMBERS) / 5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        features = x.flatten(1) @ self.w + (time.to(x.dtype) / 100).sin()[:, None] * self.v
        output = self.dropout(features).view_as(x)
        if not torch.is_grad_enabled():
            torch.rand(1, device=x.device)  # what the target draws beside its mask must leave no trace
        return output


def unet(**settings: Any) -> diffusers.UNet2DModel:
    """A network of 8 x 8 images that knows no classes unless told to."""
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return diffusers.UNet2DModel(**{**defaults, **settings})


def linear_images(count: int = 24) -> Tensor:
    return torch.rand(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def digits(count: int = 32) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1


def batches_of(images: Tensor, size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images), size)


class Records(ConsistencyTraining):
    """Keeps what each step drew and what it logged."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.steps: list[tuple[Tensor, NoisePair, Tensor, Tensor]] = []
        self.levels: list[int] = []

    def loss(self, images: Tensor, pair: NoisePair, noise: Tensor, *args: Any) -> Tensor:
        value = super().loss(images, pair, noise, *args)
        self.steps.append((images, pair, noise, value.detach()))
        return value

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.levels.append(int(self.trainer.callback_metrics["train/discretization_steps"]))


class SeedsEachStep(pl.Callback):
    """Makes the random numbers of a step a function of its number, so that runs can be compared after a resume."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        torch.manual_seed(1000 + trainer.global_step)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(map(torch.equal, states[0].values(), states[1].values()))

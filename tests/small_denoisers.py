"""Networks and data of diffusion tests: a U-Net of 18,000 weights, a linear network, images of noise with a colour."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SIDE, CLASSES = 8, 3


def unet_config(**settings: Any) -> dict[str, Any]:
    """The configuration of a U-Net for ``[1, 8, 8]`` images, with other settings where given."""
    return {
        "_class_name": "UNet2DModel",
        "sample_size": SIDE,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        **settings,
    }


def dit_config(**settings: Any) -> dict[str, Any]:
    """The configuration of a diffusion transformer for ``[1, 8, 8]`` images."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": SIDE,
        "in_channels": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_layers": 1,
        "norm_num_groups": 4,
        "num_embeds_ada_norm": CLASSES,
        **settings,
    }


def coloured(count: int = 24, channels: int = 1, seed: int = 0) -> TensorDataset:
    """Images ``[count, channels, 8, 8]`` in [-1, 1], each class around a brightness of its own, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = 0.1 * torch.randn(count, channels, SIDE, SIDE, generator=generator)
    return TensorDataset((noise + (labels - 1).view(-1, 1, 1, 1) * 0.6).clamp(-1, 1), labels)


def batches(count: int = 24, batch_size: int = 4, channels: int = 1) -> DataLoader[Any]:
    return DataLoader(coloured(count, channels), batch_size)


class LinearNetwork(nn.Module):
    """``F(x, time) = W x + time b + c`` of flat samples ``[B, P]``: its gradients are a line of NumPy each."""

    def __init__(self, numbers: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.W = nn.Parameter(torch.randn(numbers, numbers, generator=generator).to(dtype))
        self.b = nn.Parameter(torch.randn(numbers, generator=generator).to(dtype))
        self.c = nn.Parameter(torch.randn(numbers, generator=generator).to(dtype))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x @ self.W.T + time[:, None] * self.b + self.c


class Zero(nn.Module):
    """F = 0, with which a denoiser is that of ``N(0, sigma_data^2)``, exactly. It counts its evaluations."""

    evaluations = 0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.evaluations += 1
        return torch.zeros_like(x)

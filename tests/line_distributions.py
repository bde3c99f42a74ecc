"""Distributions on a line whose noisy densities and scores are known: a mixture as the teacher, a normal student.

Shapes: x and sigma are of shapes that broadcast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Mixture:
    """Equal parts of normal distributions."""

    means: tuple[float, ...] = (-2.0, 2.0)
    std: float = 0.5

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        return self._parts(x, sigma).logsumexp(dim=0) - math.log(len(self.means))

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        pulls = torch.stack([(mean - x) / (self.std**2 + sigma**2) for mean in self.means])
        return (self._parts(x, sigma).softmax(dim=0) * pulls).sum(dim=0)

    def denoised(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The mean of clean points, given a noisy one."""
        return x + sigma**2 * self.score(x, sigma)

    def samples(self, num: int) -> Tensor:
        return torch.tensor(self.means)[torch.randint(len(self.means), (num,))] + self.std * torch.randn(num)

    def _parts(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        variance = torch.as_tensor(self.std**2 + sigma**2, dtype=x.dtype)
        size = (2 * math.pi * variance).log()
        return torch.stack([-0.5 * ((x - mean) ** 2 / variance + size) for mean in self.means])


@dataclass(frozen=True)
class Normal:
    """``b + a z``; a and b may have gradients."""

    b: Tensor
    a: Tensor

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        variance = self.a**2 + sigma**2
        return -0.5 * ((x - self.b) ** 2 / variance + (2 * math.pi * variance).log())

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        return (self.b - x) / (self.a**2 + sigma**2)

    def denoised(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        return x + sigma**2 * self.score(x, sigma)

    def fixed(self) -> Normal:
        """The same without gradients."""
        return Normal(self.b.detach(), self.a.detach())


class ExactTeacher(nn.Module):
    """The mixture as a denoiser of ``[B, 1, 1, 1]`` images."""

    sample_shape = (1, 1, 1)

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.mixture.denoised(x, sigma.view(-1, 1, 1, 1))


class AffineStudent(nn.Module):
    """``b + a z`` of the noise ``sigma_max z``."""

    sample_shape = (1, 1, 1)

    def __init__(self, b: float, a: float) -> None:
        super().__init__()
        self.b, self.a = nn.Parameter(torch.tensor(b)), nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.b + self.a * x / sigma.view(-1, 1, 1, 1)


class LineNetwork(nn.Module):
    """A perceptron of a point and the logarithm of its noise level, ``[B, 1, 1, 1]``.

    Args:
        denoises: with EDM's preconditioning for data of deviation 2; else it returns logits ``[B]``.
        width: of two hidden layers.
    """

    sample_shape = (1, 1, 1)

    def __init__(self, denoises: bool, width: int = 64) -> None:
        super().__init__()
        self.denoises = denoises
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        x, sigma = x.flatten(1), sigma.view(-1, 1)
        scale = (sigma**2 + 4).rsqrt()
        output = self.layers(torch.cat([x * scale, sigma.log() / 2, x / 3], dim=1))
        if not self.denoises:
            return output.squeeze(1)
        return (4 * scale**2 * x + 2 * sigma * scale * output).view(-1, 1, 1, 1)

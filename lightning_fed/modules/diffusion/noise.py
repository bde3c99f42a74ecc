"""Noise levels: how they are drawn, how they are spaced, and how much an error at each of them counts.

Shapes: B = samples. All noise levels are standard deviations ("sigma"), never variances.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fed.checks import check_counts, check_numbers
from lightning_fed.modules.diffusion.named import Named

RHO = 7.0  # of the spacing, Karras et al. 2022, section 3


def karras_sigmas(position: Tensor, sigma_min: float, sigma_max: float, rho: float = RHO) -> Tensor:
    """``(sigma_min^(1/rho) + position (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho`` (Karras et al. 2022, eq. 5).

    Args:
        position: in [0, 1], from the smallest to the largest noise level, any shape.
        sigma_min: at position 0.
        sigma_max: at position 1.
        rho: 7 is EDM's; larger puts more levels near ``sigma_min``.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + position * (high - low)) ** rho


def karras_positions(sigma: Tensor, sigma_min: float, sigma_max: float, rho: float = RHO) -> Tensor:
    """The inverse of :func:`karras_sigmas`: how far along the spacing each noise level is, in [0, 1]."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (sigma ** (1 / rho) - low) / (high - low)


class NoiseDistribution(Named):
    """How noise levels are drawn for training."""

    @abstractmethod
    def sample(self, size: int, sigma_min: float, sigma_max: float, device: torch.device) -> Tensor:
        """float32 ``[size]`` on the device, drawn with its generator; a federation seeds it for each client."""


@dataclass(frozen=True)
class LogNormal(NoiseDistribution):
    """``log sigma ~ N(mean, std^2)``; EDM trains with (-1.2, 1.2) (Karras et al. 2022, table 1). It has no bounds.

    Args:
        mean: of the logarithm.
        std: of the logarithm.
    """

    name = "lognormal"
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        check_numbers(mean=self.mean)
        check_numbers("(0, inf)", std=self.std)

    def sample(self, size: int, sigma_min: float, sigma_max: float, device: torch.device) -> Tensor:
        return (torch.randn(size, device=device) * self.std + self.mean).exp()


@dataclass(frozen=True)
class KarrasUniform(NoiseDistribution):
    """Uniform among ``steps`` levels of EDM's spacing, without the ends (DMD2 and f-distill: 0.2 % to 99.8 %).

    Args:
        low: smallest position on the spacing, in [0, 1].
        high: largest position.
        steps: levels from ``sigma_min`` to ``sigma_max``; 1,000 in the papers.
    """

    name = "karras"
    low: float = 0.002
    high: float = 0.998
    steps: int = 1000

    def __post_init__(self) -> None:
        check_numbers(low=self.low, high=self.high)
        check_counts(2, steps=self.steps)
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"low={self.low}, high={self.high} of Karras noise levels: it must be 0 <= low < high <= 1."
            )

    def sample(self, size: int, sigma_min: float, sigma_max: float, device: torch.device) -> Tensor:
        first, last = round(self.low * (self.steps - 1)), round(self.high * (self.steps - 1))
        index = torch.randint(first, last + 1, (size,), device=device)
        return karras_sigmas(index / (self.steps - 1), sigma_min, sigma_max)


class Weighting(Named):
    """How much a squared error of the denoiser counts at a noise level."""

    @abstractmethod
    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        """Weights, of sigma's shape."""


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    """``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2``: the network's own error counts alike at all levels."""

    name = "edm"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


@dataclass(frozen=True)
class UniformWeighting(Weighting):
    """1: the error of the image."""

    name = "uniform"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class ScoreWeighting(Weighting):
    """``1 / sigma^2``: the error of the noise, and of the score up to a second factor of sigma."""

    name = "score"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return sigma**-2

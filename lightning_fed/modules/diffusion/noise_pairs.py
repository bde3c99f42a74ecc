"""Pairs of neighbouring noise levels on which a consistency model should agree, and how much each pair counts.

Shapes: B = samples, N = noise levels of a grid. A pair is a lower level a and an upper level b, a < b.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fed.checks import check_counts, check_numbers
from lightning_fed.modules.diffusion.named import Named
from lightning_fed.modules.diffusion.noise import karras_sigmas


class NoisePair(NamedTuple):
    """Pairs for a minibatch.

    Attributes:
        lower: a, of the target, ``[B]``; 0 where the target is the clean image itself.
        upper: b, of the trained pass, ``[B]``.
        weight: of the loss, ``[B]``.
    """

    lower: Tensor
    upper: Tensor
    weight: Tensor


class NoisePairs(Named):
    """How pairs are drawn for training, finer as it proceeds.

    How fine is told by a number, the ``resolution``: of a grid, its levels N.
    """

    @abstractmethod
    def resolution(self, step: int, total_steps: int) -> int:
        """How fine the pairs are after ``step`` of ``total_steps`` optimizer steps."""

    @property
    @abstractmethod
    def finest(self) -> int:
        """The resolution at the end of training."""

    @abstractmethod
    def draw(self, size: int, resolution: int, sigma_min: float, sigma_max: float, like: Tensor) -> NoisePair:
        """Pairs ``[size]`` with the type and device of ``like``, drawn with that device's default generator."""


@dataclass(frozen=True)
class DoublingPairs(NoisePairs):
    """Improved consistency training (Song, Dhariwal 2023, arXiv 2310.14189, section 3.5 and table 1).

    ``N(k) = min(s0 2^floor(k / K'), s1) + 1`` levels with EDM's spacing, ``K' = floor(K / (log2 floor(s1 / s0) + 1))``.
    The pair (i, i + 1) has the probability of its interval under ``log sigma ~ N(mean, std^2)`` and the weight
    ``1 / (b - a)``.

    Args:
        smallest: s0, intervals at the start.
        largest: s1, intervals at the end.
        mean: P_mean, of the logarithm.
        std: P_std, of the logarithm.
    """

    name = "doubling"
    smallest: int = 10
    largest: int = 1280
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        check_counts(smallest=self.smallest, largest=self.largest)
        check_numbers(mean=self.mean)
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(
                f"smallest={self.smallest}, largest={self.largest} of doubling pairs: it must be "
                "1 <= smallest <= largest, the numbers of intervals at the start and at the end."
            )
        _check_std(self.std)

    def resolution(self, step: int, total_steps: int) -> int:
        stages = math.log2(self.largest // self.smallest) + 1
        steps_of_stage = max(1, math.floor(total_steps / stages))
        return min(self.smallest * 2 ** min(step // steps_of_stage, 64), self.largest) + 1

    @property
    def finest(self) -> int:
        return self.largest + 1

    def probabilities(self, grid: Tensor) -> Tensor:
        """Of the pairs (i, i + 1) of an increasing grid ``[N]``: ``[N - 1]``, which sum to 1."""
        cumulative = torch.erf((grid.log() - self.mean) / (math.sqrt(2) * self.std))
        return cumulative.diff() / (cumulative[-1] - cumulative[0])

    def draw(self, size: int, resolution: int, sigma_min: float, sigma_max: float, like: Tensor) -> NoisePair:
        grid = increasing_grid(resolution, sigma_min, sigma_max)
        index = torch.multinomial(self.probabilities(grid).to(like), size, replacement=True)
        return _on_grid(grid, index, 1 / grid.diff(), like)


@dataclass(frozen=True)
class FixedPairs(NoisePairs):
    """A constant grid with EDM's spacing, all intervals alike and of weight 1.

    Consistency distillation (Song et al. 2023, arXiv 2303.01469, section 5.1): 18 levels for CIFAR-10, 40 for
    ImageNet-64.

    Args:
        levels: N.
    """

    name = "fixed"
    levels: int = 18

    def __post_init__(self) -> None:
        check_counts(2, levels=self.levels)

    def resolution(self, step: int, total_steps: int) -> int:
        return self.levels

    @property
    def finest(self) -> int:
        return self.levels

    def draw(self, size: int, resolution: int, sigma_min: float, sigma_max: float, like: Tensor) -> NoisePair:
        grid = increasing_grid(resolution, sigma_min, sigma_max)
        index = torch.randint(resolution - 1, (size,), device=like.device)
        return _on_grid(grid, index, torch.ones_like(grid[1:]), like)


@dataclass(frozen=True)
class EasyPairs(NoisePairs):
    """Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548): from diffusion training to ever closer pairs.

    ``log b ~ N(mean, std^2)`` and ``a = b max(0, 1 - (1 + 8 sigmoid(-b)) / q^(s + 1))`` in stage s, of weight
    ``1 / (b - a)``. Where a would be below ``sigma_min`` the target is the clean image; in the first stage it nearly
    always is. The network should start from a diffusion model. The resolution is ``q^(s + 1)``.

    Args:
        q: by how much pairs come closer from one stage to the next.
        stages: of equal length; 8 for CIFAR-10. ``q=256, stages=1`` is the paper's recipe for one GPU hour.
        mean: P_mean, of the logarithm.
        std: P_std, of the logarithm.
    """

    name = "easy"
    q: int = 2
    stages: int = 8
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        check_counts(2, q=self.q)
        check_counts(stages=self.stages)
        check_numbers(mean=self.mean)
        _check_std(self.std)

    def resolution(self, step: int, total_steps: int) -> int:
        stage = min(step * self.stages // max(1, total_steps), self.stages - 1)
        return self.q ** (stage + 1)

    @property
    def finest(self) -> int:
        return self.q**self.stages

    def draw(self, size: int, resolution: int, sigma_min: float, sigma_max: float, like: Tensor) -> NoisePair:
        normal = torch.randn(size, device=like.device, dtype=like.dtype)
        # Below sigma_min the boundary condition's factors change their sign.
        upper = (normal * self.std + self.mean).exp().clamp(min=sigma_min)
        lower = upper * (1 - (1 + 8 * torch.sigmoid(-upper)) / resolution)
        lower = torch.where(lower > sigma_min, lower, 0)
        return NoisePair(lower, upper, 1 / (upper - lower))


def increasing_grid(levels: int, sigma_min: float, sigma_max: float) -> Tensor:
    """EDM's spacing from ``sigma_min`` to ``sigma_max``, float64 ``[levels]`` on the CPU."""
    return karras_sigmas(torch.linspace(0, 1, levels, dtype=torch.float64), sigma_min, sigma_max)


def _on_grid(grid: Tensor, index: Tensor, weights: Tensor, like: Tensor) -> NoisePair:
    lower, upper, weights = (values.to(like) for values in (grid[:-1], grid[1:], weights))
    return NoisePair(lower[index], upper[index], weights[index])


def _check_std(std: float) -> None:
    check_numbers(std=std)
    if not std > 0:
        raise ValueError(f"std={std} of the logarithm of noise levels must be positive.")

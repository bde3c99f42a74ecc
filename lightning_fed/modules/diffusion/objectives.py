"""What a one-step student minimises, given the teacher's and the fake score network's estimates of its noisy samples.

Shapes: B = samples, C, H, W = channels, height and width of an image.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_fed.checks import check_choice, check_flags, check_numbers
from lightning_fed.modules.diffusion.denoiser import like_images
from lightning_fed.modules.diffusion.divergences import Divergence
from lightning_fed.modules.diffusion.named import Named

LevelWeight = Literal["dmd", "score"]
EPSILON = 1e-6


@dataclass
class StudentBatch:
    """The student's samples, and what the other networks say of them.

    Args:
        images: the samples x, ``[B, C, H, W]``, with gradient.
        noisy: ``x_sigma = x + sigma eps``, likewise.
        sigma: noise levels, ``[B]``.
        teacher: the teacher's estimate ``x_T`` of the clean image from ``noisy``.
        fake: the fake score network's, ``x_F``. As scores, ``x_F - x_T = sigma^2 (s_F - s_T)``.
        divergence: f.
        ratio: density ratios ``r(x_sigma)``, teacher over student, ``[B]``.
        scale: a number, ``1 / mean h``.
    """

    images: Tensor
    noisy: Tensor
    sigma: Tensor
    teacher: Tensor
    fake: Tensor
    divergence: Divergence
    ratio: Tensor
    scale: Tensor

    @property
    def h(self) -> Tensor:
        """The weights ``h(r)`` with mean 1, ``[B]``."""
        return self.divergence.h(self.ratio) * self.scale


class Objective(Named):
    """A loss of the student's samples.

    The weight of a noise level is one of

    - ``"dmd"``: ``1 / mean |x - x_T|``, which DMD, SiD and f-distill train images with: all levels count alike;
    - ``"score"``: 1 on scores, so ``1 / sigma^2`` on a difference of estimates and ``1 / sigma^4`` on a product of two.
      Only with it does a small student seek modes as the divergence says.

    Attributes:
        differentiates_networks: whether gradients flow from the estimates to ``noisy``, through both networks.
        differentiates_ratio: whether they flow through the density ratio.
    """

    differentiates_networks: ClassVar[bool] = False
    differentiates_ratio: ClassVar[bool] = False
    weight: LevelWeight

    def __post_init__(self) -> None:
        check_choice("weight", self.weight, "dmd", "score")

    @abstractmethod
    def loss(self, batch: StudentBatch) -> Tensor:
        """The loss of each sample, a mean over its pixels, ``[B]``."""

    def level_weight(self, batch: StudentBatch, factors: int) -> Tensor:
        """The weight of each sample's noise level in a product of so many differences of estimates, ``[B]``."""
        if self.weight == "score":
            return batch.sigma ** (-2 * factors)
        return 1 / (pixel_mean((batch.images - batch.teacher).detach().abs()) + EPSILON)


@dataclass(frozen=True)
class VSD(Objective):
    """Variational score distillation: DMD2 with the reverse KL, f-distill with any divergence (2502.15681, eq. 7).

    ``1/2 mean ||x - sg[x - w (x_F - x_T)]||^2`` with ``w = h / (mean |x - x_T| + 1e-6)``, the gradient of which in x is
    ``w (x_F - x_T)``.

    Args:
        weight: of noise levels.
    """

    name = "vsd"
    weight: LevelWeight = "dmd"

    def loss(self, batch: StudentBatch) -> Tensor:
        w = like_images(batch.h.detach() * self.level_weight(batch, 1), batch.images)
        target = (batch.images - w * (batch.fake - batch.teacher)).detach()
        return 0.5 * pixel_mean((batch.images - target).square())


@dataclass(frozen=True)
class SIM(Objective):
    """Score implicit matching (Luo et al. 2024): ``h <x_T - x_F, x_F - x>``, differentiated through both networks.

    Args:
        weight: of noise levels.
    """

    name = "sim"
    differentiates_networks = True
    weight: LevelWeight = "dmd"

    def loss(self, batch: StudentBatch) -> Tensor:
        match = pixel_mean((batch.teacher - batch.fake) * (batch.fake - batch.images))
        return batch.h.detach() * self.level_weight(batch, 2) * match


@dataclass(frozen=True)
class SiD(Objective):
    """Score identity distillation (Zhou et al. 2024): ``h <x_T - x_F, (x_T - x) - alpha (x_T - x_F)>``.

    Args:
        alpha: 1.2 in the paper for its best results; 1 is :class:`SIM`.
        weight: of noise levels.
    """

    name = "sid"
    differentiates_networks = True
    alpha: float = 1.2
    weight: LevelWeight = "dmd"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(alpha=self.alpha)

    def loss(self, batch: StudentBatch) -> Tensor:
        # x_T - x = (x_T - x_F) + (x_F - x), so that alpha = 1 leaves the very terms of SIM.
        gap = batch.teacher - batch.fake
        match = pixel_mean(gap * (batch.fake - batch.images)) + (1 - self.alpha) * pixel_mean(gap.square())
        return batch.h.detach() * self.level_weight(batch, 2) * match


@dataclass(frozen=True)
class UniInstruct(Objective):
    """Uni-Instruct (arXiv 2505.20755): descends ``E_q[h(r) ||D||^2]``, ``D = s_F - s_T``, whose integral over noise
    levels is the divergence of the clean distributions.

    The exact gradient is that of ``-2 h <D, s_F - s(x_sigma | x)>``, through h too, plus
    ``(h - r h') grad ||D||^2 + r^2 h'' ||D||^2 D``, each times the gradient of x_sigma.

    Args:
        weight: of noise levels.
        drop_fgm: leave out the middle term, as the paper's experiments do.
    """

    name = "uni"
    differentiates_networks = True
    differentiates_ratio = True
    weight: LevelWeight = "dmd"
    drop_fgm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(drop_fgm=self.drop_fgm)

    def loss(self, batch: StudentBatch) -> Tensor:
        gap = batch.fake - batch.teacher
        r, scale = batch.ratio.detach(), batch.scale
        loss = -2 * batch.h * pixel_mean(gap * (batch.fake - batch.images))
        if not self.drop_fgm:
            loss = loss + batch.divergence.fgm_weight(r) * scale * pixel_mean(gap.square())
        steepness = batch.divergence.di_weight(r) * scale * gap.detach().square().flatten(1).sum(dim=1) / batch.sigma**2
        loss = loss + steepness * pixel_mean(gap.detach() * batch.noisy)
        return self.level_weight(batch, 2) * loss


def pixel_mean(values: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B]``."""
    return values.flatten(1).mean(dim=1)


def gan_losses(logits: Tensor) -> Tensor:
    """The student's share in a GAN that does not saturate, of each sample ``[B]``, in at least float32."""
    return torch.nn.functional.softplus(-logits.to(torch.promote_types(logits.dtype, torch.float32)))

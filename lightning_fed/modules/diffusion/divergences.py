"""f-divergences from a teacher's samples to a student's, and the weights that their gradients put on a sample.

Shapes: all functions are elementwise on the density ratio ``r = p / q``, teacher over student.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_fed.modules.diffusion.named import Named


class Divergence(Named):
    """``D_f(p || q) = E_q[f(p / q)]`` for a convex f with ``f(1) = 0``.

    Its gradient in the student's parameters weights the difference of the two scores with ``h(r) = f''(r) r^2``
    (f-distill, arXiv 2502.15681, theorem 1). The two further weights are those of Uni-Instruct's exact gradient
    (arXiv 2505.20755).

    ======================= =========================== =============== ===========================================
    name                    f(r)                        h(r)            what it does
    ======================= =========================== =============== ===========================================
    ``reverse_kl``          -log r                      1               seeks modes; the update of DMD2
    ``softened_reverse_kl`` (r+1) log(1/2 + 1/(2r))     1/(1+r)         seeks modes
    ``jensen_shannon``      r log r - (r+1) log((r+1)/2)  r/(1+r)       in between, with a small variance
    ``squared_hellinger``   1 - sqrt(r)                 sqrt(r)/4       in between
    ``jeffreys``            (r-1) log r                 1+r             covers modes, large variance
    ``forward_kl``          r log r                     r               covers modes, large variance
    ``pearson_chi2``        (r-1)^2                     2 r^2           of no use without clipping
    ``neyman_chi2``         (1-r)^2 / r                 2/r             infinite where the student's tails are heavier
    ======================= =========================== =============== ===========================================

    Attributes:
        is_unweighted: h is constant, so that neither the ratio nor its normalisation matters.
    """

    is_unweighted: ClassVar[bool] = False

    @abstractmethod
    def f(self, r: Tensor) -> Tensor:
        """The generator f."""

    @abstractmethod
    def h(self, r: Tensor) -> Tensor:
        """``f''(r) r^2``."""

    @abstractmethod
    def h_slope(self, r: Tensor) -> Tensor:
        """``h'(r)``."""

    @abstractmethod
    def h_curvature(self, r: Tensor) -> Tensor:
        """``h''(r)``."""

    def fgm_weight(self, r: Tensor) -> Tensor:
        """``h - r h'``: of the gradient of the squared difference of scores."""
        return self.h(r) - r * self.h_slope(r)

    def di_weight(self, r: Tensor) -> Tensor:
        """``r^2 h''``: of the difference of scores, times its square."""
        return r**2 * self.h_curvature(r)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p)."""

    name = "reverse_kl"
    is_unweighted = True

    def f(self, r: Tensor) -> Tensor:
        return -r.log()

    def h(self, r: Tensor) -> Tensor:
        return torch.ones_like(r)

    def h_slope(self, r: Tensor) -> Tensor:
        return torch.zeros_like(r)

    def h_curvature(self, r: Tensor) -> Tensor:
        return torch.zeros_like(r)


@dataclass(frozen=True)
class SoftenedReverseKL(Divergence):
    """Twice KL(m || p) with ``m = (p + q) / 2``."""

    name = "softened_reverse_kl"

    def f(self, r: Tensor) -> Tensor:
        return (r + 1) * (0.5 + 0.5 / r).log()

    def h(self, r: Tensor) -> Tensor:
        return 1 / (1 + r)

    def h_slope(self, r: Tensor) -> Tensor:
        return -((1 + r) ** -2)

    def h_curvature(self, r: Tensor) -> Tensor:
        return 2 * (1 + r) ** -3


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """KL(p || m) + KL(q || m) with ``m = (p + q) / 2``."""

    name = "jensen_shannon"

    def f(self, r: Tensor) -> Tensor:
        return r * r.log() - (r + 1) * ((r + 1) / 2).log()

    def h(self, r: Tensor) -> Tensor:
        return r / (1 + r)

    def h_slope(self, r: Tensor) -> Tensor:
        return (1 + r) ** -2

    def h_curvature(self, r: Tensor) -> Tensor:
        return -2 * (1 + r) ** -3


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """``1 - integral sqrt(p q)``."""

    name = "squared_hellinger"

    def f(self, r: Tensor) -> Tensor:
        return 1 - r.sqrt()

    def h(self, r: Tensor) -> Tensor:
        return r.sqrt() / 4

    def h_slope(self, r: Tensor) -> Tensor:
        return r**-0.5 / 8

    def h_curvature(self, r: Tensor) -> Tensor:
        return -(r**-1.5) / 16


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """KL(p || q) + KL(q || p)."""

    name = "jeffreys"

    def f(self, r: Tensor) -> Tensor:
        return (r - 1) * r.log()

    def h(self, r: Tensor) -> Tensor:
        return 1 + r

    def h_slope(self, r: Tensor) -> Tensor:
        return torch.ones_like(r)

    def h_curvature(self, r: Tensor) -> Tensor:
        return torch.zeros_like(r)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q)."""

    name = "forward_kl"

    def f(self, r: Tensor) -> Tensor:
        return r * r.log()

    def h(self, r: Tensor) -> Tensor:
        return r

    def h_slope(self, r: Tensor) -> Tensor:
        return torch.ones_like(r)

    def h_curvature(self, r: Tensor) -> Tensor:
        return torch.zeros_like(r)


@dataclass(frozen=True)
class PearsonChi2(Divergence):
    """``integral (p - q)^2 / q``."""

    name = "pearson_chi2"

    def f(self, r: Tensor) -> Tensor:
        return (r - 1) ** 2

    def h(self, r: Tensor) -> Tensor:
        return 2 * r**2

    def h_slope(self, r: Tensor) -> Tensor:
        return 4 * r

    def h_curvature(self, r: Tensor) -> Tensor:
        return torch.full_like(r, 4.0)


@dataclass(frozen=True)
class NeymanChi2(Divergence):
    """``integral (p - q)^2 / p``."""

    name = "neyman_chi2"

    def f(self, r: Tensor) -> Tensor:
        return (1 - r) ** 2 / r

    def h(self, r: Tensor) -> Tensor:
        return 2 / r

    def h_slope(self, r: Tensor) -> Tensor:
        return -2 * r**-2

    def h_curvature(self, r: Tensor) -> Tensor:
        return 4 * r**-3

"""The curvature of a loss in its weights: top Hessian eigenvalue, trace, and the loss along a line.

Nothing here forms the Hessian H: it is only multiplied with vectors, by double backward (Pearlmutter 1994). No
``.grad`` is touched, and weights are afterwards what they were.

P = numbers in all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[], Tensor]


class Hessian:
    """The Hessian of a mean of losses, as a matrix ``[P, P]`` that can only be multiplied: ``hessian @ vector``.

    Of one loss the graph is kept, which costs memory once and saves a forward and a backward pass in every product. Of
    several, each product evaluates each anew, so that memory is that of one.

    Args:
        losses: each evaluates a scalar at the present weights, the same one every time: whoever has dropout fixes its
            mask.
        parameters: those without ``requires_grad`` are left out; those that the losses do not depend on count as zero.

    Raises:
        ValueError: if there is no loss, or no parameter.
    """

    def __init__(self, losses: Sequence[Loss], parameters: Iterable[nn.Parameter]) -> None:
        self.losses = list(losses)
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.losses or not self.parameters:
            raise ValueError(
                f"a Hessian needs losses ({len(self.losses)} given) and parameters with requires_grad "
                f"({len(self.parameters)} given)."
            )
        first = self.parameters[0]
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.device = first.device
        # In 16 bits, products would keep two or three digits, and their sums over P numbers fewer.
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self._kept: list[Tensor] | None = None

    def gradient(self) -> list[Tensor]:
        """Of the mean loss, in the shapes of the parameters."""
        gradients = [torch.zeros_like(parameter, dtype=self.dtype) for parameter in self.parameters]
        for loss in self.losses:
            torch._foreach_add_(gradients, [g.detach().to(self.dtype) for g in self._gradients(loss)])
        return [g / len(self.losses) for g in gradients]

    def __matmul__(self, vector: Tensor) -> Tensor:
        """The product with a vector ``[P]``."""
        parts = [
            part.view_as(parameter).to(parameter.dtype)
            for part, parameter in zip(vector.split([p.numel() for p in self.parameters]), self.parameters)
        ]
        product = torch.zeros_like(vector)
        for loss in self.losses:
            # What is linear in the weights has a gradient that depends on none.
            both = [(g, part) for g, part in zip(self._gradients(loss), parts) if g.requires_grad]
            if both:
                gradients, factors = zip(*both)
                keep = self._kept is not None
                rows = torch.autograd.grad(
                    gradients, self.parameters, factors, retain_graph=keep, allow_unused=True, materialize_grads=True
                )
                product += torch.cat([row.reshape(-1) for row in rows])
        return product / len(self.losses)

    def _gradients(self, loss: Loss) -> list[Tensor]:
        """Of one loss, with the graph that a second derivative needs."""
        if self._kept is not None:
            return self._kept
        # The fused kernels of attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            gradients = list(
                torch.autograd.grad(
                    loss(), self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
                )
            )
        if len(self.losses) == 1:
            self._kept = gradients
        return gradients


# ---------------------------------------------------------------------------------------------------------- eigenvalues


class Eigenpair(NamedTuple):
    """An eigenvalue of H, as well as it was found.

    Attributes:
        value: Rayleigh's quotient ``v' H v``.
        vector: v, ``[P]``, of length 1.
        residual: ``||H v - value v||``; some eigenvalue lies within this distance of ``value``.
        products: with H, that were computed to find it.
        converged: the stopping rule was met.
    """

    value: float
    vector: Tensor
    residual: float
    products: int
    converged: bool


def top_eigenvalue(
    hessian: Hessian,
    iterations: int = 100,
    tolerance: float = 0.01,
    which: Literal["algebraic", "magnitude"] = "algebraic",
    seed: int = 0,
) -> Eigenpair:
    """The largest eigenvalue by power iteration, ``v <- H v / ||H v||``.

    That finds the one of largest magnitude. If it is negative (as happens early in training), or if there seem to be
    two of opposite signs, the largest algebraic one is found in a second search, on ``H + ||H|| I``, which has the
    same order and no negative eigenvalues.

    It stops when ``||H v - value v|| <= tolerance |value|``. A Rayleigh quotient errs by no more than
    ``residual^2 / gap`` (gap: distance to the next eigenvalue), and eigenvalues that lie close together leave a small
    residual. The usual rule, little change from one iteration to the next, is met at once by two eigenvalues a and -a,
    at any number between them.

    Args:
        hessian: H.
        iterations: at most, in each search (PyHessian's default; Yao et al. 2020).
        tolerance: of the stopping rule. With 0.01, eigenvalues of trained networks were too small by 0.01 to 0.7 %.
        which: the largest number, or the largest absolute value.
        seed: of the start vectors, which are drawn on the CPU: the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    found = power_iteration(hessian, 0.0, iterations, tolerance, generator)
    if which == "magnitude" or (found.value >= 0 and found.converged) or not math.isfinite(found.value):
        return found
    norm = math.hypot(found.value, found.residual)
    shifted = power_iteration(hessian, norm, iterations, tolerance, generator)
    best = shifted if shifted.value >= found.value else found
    return best._replace(products=found.products + shifted.products)


def power_iteration(
    hessian: Hessian, shift: float, iterations: int, tolerance: float, generator: torch.Generator
) -> Eigenpair:
    """The eigenvalue of H for which that of ``H + shift I`` has the largest magnitude."""
    v = torch.randn(hessian.size, generator=generator).to(hessian.device, hessian.dtype)
    v /= v.norm()
    for products in range(1, iterations + 1):
        product = hessian @ v
        value = v @ product
        residual = (product - value * v).norm()
        found = Eigenpair(float(value), v, float(residual), products, False)
        if found.residual <= tolerance * abs(found.value):
            return found._replace(converged=True)
        product += shift * v
        norm = product.norm()
        if not math.isfinite(found.value) or not norm > 0:
            break
        v = product / norm
    return found


# --------------------------------------------------------------------------------------------------------------- trace


class TraceEstimate(NamedTuple):
    """An estimate and its standard error."""

    value: float
    error: float


def trace(hessian: Hessian, samples: int = 20, seed: int = 0) -> TraceEstimate:
    """Hutchinson's estimate: the mean of ``z' H z`` over vectors of random signs, exact where H is diagonal.

    Args:
        hessian: H.
        samples: number of vectors, at least 2; a product each. The standard deviation of one is
            ``sqrt(2 sum_{i != j} H_ij^2)``.
        seed: of the signs, which are drawn on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(samples):
        signs = torch.randint(0, 2, (hessian.size,), generator=generator, dtype=torch.int8)
        z = (2 * signs - 1).to(hessian.device, hessian.dtype)
        values.append((z @ (hessian @ z)).double())
    found = torch.stack(values)
    return TraceEstimate(float(found.mean()), float(found.std()) / math.sqrt(samples))


# -------------------------------------------------------------------------------------------------- lines and steps


@torch.no_grad()
def loss_along(
    losses: Sequence[Loss], parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], radii: Iterable[float]
) -> list[float]:
    """The mean loss at ``w + radius * direction`` for each radius. Afterwards w is what it was, to the bit.

    Args:
        losses: as of :class:`Hessian`.
        parameters: w.
        direction: a tensor for each of w.
        radii: in units of the direction's length.
    """
    w = [parameter.detach() for parameter in parameters]
    start = [tensor.clone() for tensor in w]
    found = []
    try:
        for radius in radii:
            torch._foreach_copy_(w, [s + (radius * e).to(s.dtype) for s, e in zip(start, direction)])
            found.append(float(torch.stack([loss().detach() for loss in losses]).double().mean()))
    finally:
        torch._foreach_copy_(w, start)
    return found


def stability_threshold(lr: float, momentum: float = 0.0, nesterov: bool = False) -> float:
    """The eigenvalue above which gradient descent on a quadratic diverges: 2 / lr, and more with momentum.

    ``2 (1 + m) / lr``, with Nesterov's momentum ``2 (1 + m) / (lr (1 + 2 m))`` (Cohen et al. 2021, appendix B).

    Args:
        lr: learning rate, more than zero.
        momentum: m, of ``torch.optim.SGD`` without dampening.
        nesterov: likewise.
    """
    return 2 * (1 + momentum) / lr / (1 + 2 * momentum if nesterov else 1)

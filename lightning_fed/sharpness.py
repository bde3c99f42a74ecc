"""The equations of sharpness-aware minimization: where to look for the worst point around a model.

The one place of these equations: the callback :class:`~lightning_fed.callbacks.SharpnessAware`, the local rule of
federated strategies, and a ``training_step`` with manual optimization use them.

w weights, g gradient, T what a weight is measured by, e the step to the worst point, q the dual exponent of p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_fed.checks import check_counts, check_kinds, check_numbers


def ascent(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rho: float,
    p: float = 2.0,
    adaptive: Sequence[bool] | None = None,
    eta: float = 0.01,
    apart: bool = False,
) -> list[Tensor]:
    """The step from ``w`` to the worst point of a ball around it, to first order in the loss.

    SAM (Foret et al. 2021, equation 2; 1/p + 1/q = 1): ``e = rho sign(g) |g|^(q-1) / (||g||_q^q)^(1/p)``, which is
    ``rho g / ||g||_2`` for p = 2. ASAM (Kwon et al. 2021, equation 9) measures a weight by its size, ``T = |w| + eta``:
    ``e = rho T u / ||u||_2`` with ``u = T g``. The norm is one over all tensors. Where it is zero or not finite, there
    is no direction, and e is zero; nothing waits for a GPU to find that out.

    Args:
        weights: w, a list of tensors.
        gradients: g, a tensor for each of w.
        rho: radius of the ball.
        p: the ball's norm, in (1, inf].
        adaptive: which tensors are measured by their size; None is none of them, which is SAM.
        eta: of ASAM.
        apart: the first dimension of each tensor numbers models, each of which takes a step of its own.
    """
    q = 1.0 if p == float("inf") else p / (p - 1)
    adaptive = [False] * len(weights) if adaptive is None else adaptive
    u = [(w.abs() + eta) * g if measured else g for w, g, measured in zip(weights, gradients, adaptive)]
    if apart:
        norms = [torch.linalg.vector_norm(tensor.unsqueeze(-1).flatten(1), q, dim=1) for tensor in u]
    else:
        norms = (
            list(torch._foreach_norm(u, q)) if q in (1, 2) else [torch.linalg.vector_norm(tensor, q) for tensor in u]
        )
    norm = torch.linalg.vector_norm(torch.stack(norms), q, dim=0)
    has_direction = torch.isfinite(norm) & (norm > 0)
    if p == 2 and not apart:
        steps = list(torch._foreach_mul(u, rho / norm))
    elif p == 2:
        steps = [tensor * beside(rho / norm, tensor) for tensor in u]
    else:
        steps = [rho * tensor.sign() * (tensor.abs() / beside(norm.to(tensor), tensor)) ** (q - 1) for tensor in u]
    steps = [(w.abs() + eta) * e if measured else e for w, e, measured in zip(weights, steps, adaptive)]
    return [torch.where(beside(has_direction, e), e, 0.0) for e in steps]


def beside(number: Tensor, tensor: Tensor) -> Tensor:
    """A number, or one for each entry of a tensor's first dimension, in a shape that broadcasts against the tensor."""
    return number if number.dim() == 0 else number.view(-1, *[1] * (tensor.dim() - 1))


def is_measured_by_size(name: str) -> bool:
    """Whether ASAM rescales the parameter of this name: those called weights, as in its authors' code."""
    return "weight" in name


@contextmanager
@torch.no_grad()
def perturbed(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    rho: float,
    p: float = 2.0,
    adaptive: bool = False,
    eta: float = 0.01,
) -> Iterator[None]:
    """Inside, the parameters are at the worst point that their ``.grad`` shows; afterwards they are back, to the bit.

    This is SAM for a module with manual optimization::

        self.manual_backward(self.loss(batch))
        with perturbed(self.named_parameters(), rho=0.05), untraced(self):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
        optimizer.step()

    ``untraced`` (:mod:`lightning_fed.second_pass`) keeps logs, metrics and BatchNorm statistics those of the first
    pass. Gradients must not be scaled for fp16; parameters without a gradient stay.

    Args:
        named_parameters: those that may move, with their names.
        rho: radius of the ball.
        p: the ball's norm, in (1, inf].
        adaptive: ASAM.
        eta: of ASAM.

    Raises:
        ValueError: if a setting is out of range.
    """
    check_ball(rho, p, eta)
    moved = [(name, w) for name, w in named_parameters if w.grad is not None]
    if not moved or rho == 0:
        yield
        return
    w = [parameter.detach() for _, parameter in moved]
    g = [parameter.grad for _, parameter in moved if parameter.grad is not None]
    by_size = [adaptive and is_measured_by_size(name) for name, _ in moved]
    start = [tensor.clone() for tensor in w]
    try:
        torch._foreach_add_(w, ascent(w, g, rho, p, by_size, eta))  # w + e
        yield
    finally:
        torch._foreach_copy_(w, start)


class RhoSteps:
    """A radius that changes at given optimizer steps, for ``SharpnessAware(rho_schedule=...)``.

    Long-tailed recognition with large radii uses such a schedule (Rangwani et al. 2022: .05, .1, .5, .5).

    Args:
        values: the radii.
        milestones: the optimizer steps at which the second, third, ... radius begins.

    Raises:
        ValueError: if there is not one radius more than milestones, milestones do not grow, or a radius is negative.
    """

    def __init__(self, values: list[float], milestones: list[int]) -> None:
        check_kinds((list, tuple), values=values, milestones=milestones)
        if len(values) != len(milestones) + 1:
            raise ValueError(
                f"{len(values)} values and {len(milestones)} milestones: there must be one radius more than milestones."
            )
        for milestone in milestones:
            check_counts(milestones=milestone)
        if sorted(set(milestones)) != list(milestones):
            raise ValueError(f"milestones={milestones} must grow.")
        for value in values:
            check_numbers("[0, inf)", values=value)
        self.values, self.milestones = values, milestones

    def __call__(self, step: int) -> float:
        return self.values[sum(step >= milestone for milestone in self.milestones)]


def check_ball(rho: float, p: float = 2.0, eta: float = 0.0) -> None:
    """Refuse what is no ball.

    Raises:
        ValueError: naming the setting.
    """
    check_numbers("[-inf, inf]", rho=rho, p=p, eta=eta)
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho={rho} must not be negative or infinite: it is SAM's radius (the paper's is 0.05).")
    if not p > 1:
        raise ValueError(f"p={p} must be more than 1, the norm of SAM's ball: 2, or inf for a step along the sign.")
    if not 0 <= eta < math.inf:
        raise ValueError(
            f"eta={eta} must not be negative or infinite: ASAM adds it to the size of a weight (the paper's is 0.01)."
        )

"""What a client does at a local step beyond the optimizer of the user: SAM, a proximal term.

A rule sees one client, one minibatch and the client's own row; it knows nothing of ranks, rounds or the Trainer.
Shapes: P = numbers in a row.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class LocalGradient:
    """The gradient of one client's minibatch, just computed.

    Attributes:
        client: whose it is.
        row: the client's parameters ``[P]``; the module's parameters are views into it.
        parameters: the trainable parameters, whose ``.grad`` holds this minibatch's gradient (and no other's).
        recompute: evaluate the same minibatch again at the present ``row`` and put its gradient into ``.grad``. Logs,
            metrics and buffers stay as they are, and the same dropout masks are drawn.
    """

    client: int
    row: Tensor
    parameters: Sequence[nn.Parameter]
    recompute: Callable[[], None]


class LocalRule(ABC):
    """A change to the local step. Both hooks default to nothing."""

    def after_backward(self, gradient: LocalGradient) -> None:
        """Replace a minibatch's gradient; called once a minibatch, before accumulation. Automatic optimization only."""

    def before_optimizer_step(self, client: int, parameters: Sequence[tuple[nn.Parameter, slice]]) -> None:
        """Add to the accumulated, unscaled gradients, before clipping; called once an optimizer step.

        Args:
            client: who steps.
            parameters: those that the optimizer is going to step, each with its place in the row.
        """

    @property
    def needs_automatic_optimization(self) -> bool:
        return type(self).after_backward is not LocalRule.after_backward


class SharpnessAware(LocalRule):
    """SAM: the gradient at the worst point of a ball around the client's model (Foret et al. 2021, equations 2 and 3).

    Args:
        rho: radius of the ball, in the norm of the whole row. 0.05 is the default of the SAM paper.

    Raises:
        ValueError: if ``rho`` is negative.
    """

    def __init__(self, rho: float = 0.05) -> None:
        if rho < 0:
            raise ValueError(f"rho={rho} must not be negative: it is the radius of SAM's ball (the paper's is 0.05).")
        self.rho = rho

    @torch.no_grad()
    def after_backward(self, gradient: LocalGradient) -> None:
        moved: list[Tensor] = [parameter for parameter in gradient.parameters if parameter.grad is not None]
        grads = [parameter.grad for parameter in moved if parameter.grad is not None]
        if not grads or self.rho == 0:
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        # An overflow of scaled fp16 gradients has no direction; the loss scaler is going to drop this step anyway.
        scale = torch.where(torch.isfinite(norm) & (norm > 0), self.rho / norm, 0.0)
        ascent: list[Tensor] = [torch.where(scale > 0, grad * scale.to(grad), 0.0) for grad in grads]

        y = gradient.row.clone()
        torch._foreach_add_(moved, ascent)  # y + e,  e = rho g / ||g||
        gradient.recompute()  # g~ = grad F(y + e)
        gradient.row.copy_(y)


class Proximal(LocalRule):
    """FedProx: ``mu / 2 ||y - x||^2`` added to the local loss (Li et al. 2020, equation 2).

    Args:
        mu: weight of the term.
        anchor: returns ``x`` ``[P]``, the model that the round began with.

    Raises:
        ValueError: if ``mu`` is negative.
    """

    def __init__(self, mu: float, anchor: Callable[[], Tensor]) -> None:
        if mu < 0:
            raise ValueError(f"mu={mu} must not be negative: it is the weight of FedProx's proximal term.")
        self.mu = mu
        self.anchor = anchor

    @torch.no_grad()
    def before_optimizer_step(self, client: int, parameters: Sequence[tuple[nn.Parameter, slice]]) -> None:
        anchor = self.anchor()
        for y, place in parameters:
            if y.grad is not None:
                y.grad.add_(y - anchor[place].view_as(y), alpha=self.mu)  # g + mu (y - x)

"""What a client does at a local step beyond the optimizer of the user: SAM, a proximal term.

A rule sees one client, one minibatch and the client's own row; it knows nothing of ranks, rounds or the Trainer. A rule
that works on waves also sees M clients at once, whose tensors have one dimension more, the first.
Shapes: P = numbers in a row, M = clients of a wave.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_fed.checks import check_numbers
from lightning_fed.sharpness import ascent, beside, check_ball


@dataclass
class LocalGradient:
    """The gradient of one client's minibatch, just computed; or those of a wave.

    Attributes:
        clients: whose it is.
        row: the client's parameters ``[P]``, or ``[M, P]`` of a wave; the module's parameters are views into it.
        parameters: the trainable parameters, whose ``.grad`` holds this minibatch's gradient (and no other's).
        recompute: evaluate the same minibatch again at the present ``row`` and put its gradient into ``.grad``. Logs,
            metrics and buffers stay as they are, and the same dropout masks are drawn.
    """

    clients: Sequence[int]
    row: Tensor
    parameters: Sequence[nn.Parameter]
    recompute: Callable[[], None]

    @property
    def is_of_wave(self) -> bool:
        return self.row.dim() == 2


class LocalRule(ABC):
    """A change to the local step. Both hooks default to nothing.

    Attributes:
        works_on_waves: both hooks may be given a wave, and treat its clients apart (``clients_per_step``).
    """

    works_on_waves: bool = False

    def after_backward(self, gradient: LocalGradient) -> None:
        """Replace a minibatch's gradient; called once a minibatch, before accumulation. Automatic optimization only."""

    def before_optimizer_step(self, clients: Sequence[int], parameters: Sequence[tuple[nn.Parameter, slice]]) -> None:
        """Add to the accumulated, unscaled gradients, before clipping; called once an optimizer step.

        Args:
            clients: who steps: one, or a wave.
            parameters: those that the optimizer is going to step, each with its place in the row.
        """

    @property
    def needs_automatic_optimization(self) -> bool:
        return type(self).after_backward is not LocalRule.after_backward


class SharpnessAwareRule(LocalRule):
    """SAM: the gradient at the worst point of a ball around the client's model (Foret et al. 2021, equations 2 and 3).

    The callback :class:`~lightning_fed.callbacks.SharpnessAware` makes such a rule from its settings.

    Args:
        rho: radius of the ball, in the norm of the whole row. 0.05 is the default of the SAM paper.
        p: the ball's norm.
        adaptive: parameters that are measured by their size (ASAM, Kwon et al. 2021); others as in SAM.
        eta: of ASAM.
        moves: the parameters that may move; None is all.
        falls_back: take the plain gradient, and count it, where the one at the worst point is not finite. Not for
            scaled fp16 gradients: their overflows are the loss scaler's to see.

    Raises:
        ValueError: if ``rho`` is negative, or another setting is out of range.
    """

    works_on_waves = True

    def __init__(
        self,
        rho: float = 0.05,
        p: float = 2.0,
        adaptive: Collection[nn.Parameter] = (),
        eta: float = 0.01,
        moves: Collection[nn.Parameter] | None = None,
        falls_back: bool = False,
    ) -> None:
        check_ball(rho, p, eta)
        self.rho, self.p, self.eta, self.falls_back = rho, p, eta, falls_back
        self.adaptive, self.moves = set(adaptive), None if moves is None else set(moves)
        self.fallbacks = 0

    @torch.no_grad()
    def after_backward(self, gradient: LocalGradient) -> None:
        plain = [parameter.grad for parameter in gradient.parameters]
        found = [(w, g) for w, g in zip(gradient.parameters, plain) if g is not None]
        found = [(w, g) for w, g in found if self.moves is None or w in self.moves]
        if not found or self.rho == 0:
            return
        w: list[Tensor] = [parameter for parameter, _ in found]
        by_size = [parameter in self.adaptive for parameter, _ in found]
        # Without a direction nothing moves, as when scaled fp16 gradients overflow: the scaler drops that step anyway.
        e = ascent(w, [g for _, g in found], self.rho, self.p, by_size, self.eta, apart=gradient.is_of_wave)

        y = gradient.row.clone()
        torch._foreach_add_(w, e)  # y + e
        gradient.recompute()  # g~ = grad F(y + e)
        gradient.row.copy_(y)
        if self.falls_back and not is_finite(gradient.parameters):
            self._fall_back(gradient, plain)

    def _fall_back(self, gradient: LocalGradient, plain: Sequence[Tensor | None]) -> None:
        """Take the plain gradient, of those clients whose other one is not finite."""
        if not gradient.is_of_wave:
            self.fallbacks += 1
            for parameter, g in zip(gradient.parameters, plain):
                parameter.grad = g
            return
        found = [(parameter, g) for parameter, g in zip(gradient.parameters, plain) if parameter.grad is not None]
        finite = [torch.isfinite(p.grad).unsqueeze(-1).flatten(1).all(1) for p, _ in found]  # type: ignore[arg-type]
        bad = ~torch.stack(finite).all(0)
        self.fallbacks += int(bad.sum())
        for parameter, g in found:
            parameter.grad = torch.where(beside(bad, parameter), g, parameter.grad)  # type: ignore[arg-type]


def is_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all gradients are finite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())


class Proximal(LocalRule):
    """FedProx: ``mu / 2 ||y - x||^2`` added to the local loss (Li et al. 2020, equation 2).

    Args:
        mu: weight of the term.
        anchor: returns ``x`` ``[P]``, the model that the round began with.

    Raises:
        ValueError: if ``mu`` is negative.
    """

    works_on_waves = True

    def __init__(self, mu: float, anchor: Callable[[], Tensor]) -> None:
        check_numbers(mu=mu)
        if mu < 0:
            raise ValueError(f"mu={mu} must not be negative: it is the weight of FedProx's proximal term.")
        self.mu = mu
        self.anchor = anchor

    @torch.no_grad()
    def before_optimizer_step(self, clients: Sequence[int], parameters: Sequence[tuple[nn.Parameter, slice]]) -> None:
        anchor = self.anchor()
        for y, place in parameters:
            if y.grad is not None:
                x = anchor[place]
                x = x.view(y.shape if x.numel() == y.numel() else y.shape[1:])
                y.grad.add_(y - x, alpha=self.mu)  # g + mu (y - x)

"""The joint step of algorithms whose gradients meet before any optimizer steps.

Shapes: C = clients on this rank, P = trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from lightning_fed.federation.rounds import restore_buffers

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy


def state_dtype(rows: Tensor) -> torch.dtype:
    """Of what is accumulated over many rounds: float32 for rows of less, in which small differences would vanish."""
    return torch.promote_types(rows.dtype, torch.float32)


class GradientStep:
    """Gathers the clients' gradients, and steps the optimizers along what the algorithm makes of them.

    The optimizer, the scheduler, clipping and Lightning's hooks are the user's: they see the algorithm's directions
    where they would see gradients.

    Args:
        strategy: whose ``directions`` are asked for.
    """

    def __init__(self, strategy: FederatedStrategy) -> None:
        self.strategy = strategy
        self.bank = strategy.bank
        rows = self.bank.rows.matrix
        self.gradients = torch.zeros(rows.shape, dtype=state_dtype(rows), device=rows.device)
        self._direction = torch.empty_like(self.bank.rows.bound)

    @torch.no_grad()
    def gather(self, clients: Sequence[int]) -> None:
        """Take the gradient of the bound client, or of the bound wave, unscaled, into its row.

        Args:
            clients: who is bound.
        """
        slots = [self.bank.slot(client) for client in clients]
        for first, stop in runs(slots):
            self._flatten(slice(first, stop), self.gradients[slots[first] : slots[first] + stop - first])
        self.bank.clear_gradients()

    def _flatten(self, members: slice, out_MP: Tensor) -> None:
        """The unscaled gradients of some of those who are bound."""
        flat = []
        for parameter, template in zip(self.bank.parameters, self.bank.rows.templates):
            if parameter.grad is None:
                flat.append(out_MP.new_zeros((len(out_MP), template.numel())))
            else:
                flat.append(parameter.grad.reshape(-1, template.numel())[members].to(out_MP))
        torch.cat(flat, dim=1, out=out_MP)
        scaler = self.bank.scaler
        if scaler is not None and scaler._scale is not None:
            out_MP.div_(scaler._scale.to(out_MP.device))  # which is a single client's

    @torch.no_grad()
    def step(self, loss: Tensor | None, lightning: Callable[[Callable[[], Tensor | None]], None]) -> None:
        """Step every client's optimizer, or the one optimizer of the one model that all clients share.

        Args:
            loss: what the closure returns.
            lightning: steps the optimizer of the bound client with such a closure, the way Lightning does.
        """
        self.bank.put_away()  # the algorithm may change rows
        directions = self.strategy.directions(self.gradients, self.strategy.exchange)
        if directions is None:
            restore_buffers(self.strategy)
            if self.bank.scaler is None:
                return
            # The loss scaler skips a step along infinity, and lowers its scale.
            directions = self.gradients.new_full((1, 1), torch.inf).expand_as(self.gradients)
        for client in self.bank.clients[:1] if self.strategy.one_model else self.bank.clients:
            self.bank.bind_client(client)
            self._put(directions[self.bank.slot(client)])
            with torch.enable_grad():
                lightning(lambda: loss)
            self.bank.clear_gradients()

    def _put(self, direction_P: Tensor) -> None:
        """Make a copy of a direction the bound client's gradient: clipping changes it in place."""
        self._direction.copy_(direction_P)
        scaler = self.bank.scaler
        if scaler is not None and scaler._scale is not None:
            self._direction.mul_(scaler._scale)  # which is going to be divided out again
        for parameter, view in zip(self.bank.parameters, self._views(self._direction)):
            parameter.grad = view

    def _views(self, vector_P: Tensor) -> tuple[Tensor, ...]:
        return _unflatten_dense_tensors(vector_P, self.bank.rows.templates)


def runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where rows that are neighbours begin and end in a list of rows."""
    first = 0
    for stop in range(1, len(slots) + 1):
        if stop == len(slots) or slots[stop] != slots[stop - 1] + 1:
            yield first, stop
            first = stop

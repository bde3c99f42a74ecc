"""What neighbours know of each other's rows when only compressed differences travel.

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_fed.federation.compressed_channel import CompressedChannel, blocks
from lightning_fed.federation.exchange import Exchange


class PublicCopies:
    """The copies ``x_hat_i`` that client i and its neighbours have of its row, and how far the neighbours' are away.

    With the sum ``sum_j w_ij x_hat_j - x_hat_i`` three vectors a client are enough, whatever its degree (Koloskova,
    Stich, Jaggi 2019, section 4): it grows by ``sum_j w_ij q_j - q_i`` with every message.

    Args:
        channel: of the messages ``q_i``.
        weights_NN: W, doubly stochastic; the same in all steps.
        start_CP: the copies at the start, equal for all clients and known to all, for example 0; they are changed.

    Attributes:
        copies: ``x_hat_i`` ``[C, P]``.
        pull: ``sum_j w_ij x_hat_j - x_hat_i`` ``[C, P]``.
    """

    def __init__(self, channel: CompressedChannel, weights_NN: np.ndarray, start_CP: Tensor) -> None:
        self.channel = channel
        self.weights = weights_NN
        self.copies = start_CP
        # In float64: what rounding adds to its mean over clients would stay, and move the mean row in every later step.
        self.pull = torch.zeros_like(start_CP, dtype=torch.float64)

    def publish(self, rows: Tensor, exchange: Exchange, step: int) -> None:
        """Send ``q_i = C(x_i - x_hat_i)`` to the neighbours; a collective call."""

        def differences(place: tuple[slice, slice], out: Tensor) -> Tensor:
            return torch.sub(rows[place], self.copies[place], out=out)

        # x_hat_i <- x_hat_i + q_i;  pull_i <- pull_i - q_i + sum_j w_ij q_j
        own = (self.copies, 1.0), (self.pull, -1.0)
        sent = self.channel.send(differences, self.weights, exchange, step, own)  # q_i = C(x_i - x_hat_i)
        mine = slice(exchange.clients.start, exchange.clients.stop)
        sent.add_received_(self.pull, self.weights[mine])

    def mix_(self, rows: Tensor, gamma: float) -> None:
        """``x_i <- x_i + gamma (sum_j w_ij x_hat_j - x_hat_i)``, in place."""
        # In blocks, because the sums are float64 before they are rounded.
        for few in blocks(len(rows), self.pull[0].nbytes, rows.device):
            rows[few].add_(self.pull[few], alpha=gamma)

    def measure(self, exchange: Exchange) -> dict[str, float]:
        """How much the last messages have left out, and what they cost; a collective call."""
        return self.channel.measure(exchange)

    def client_matrices(self, name: str) -> dict[str, Tensor]:
        """For a checkpoint; ``name`` is that of the rows."""
        copies = {f"{name} public": self.copies, f"{name} pull": self.pull}
        return {**copies, **self.channel.client_matrices(f"{name} compressor")}

"""The mean of what all clients have, from compressed messages: EControl and its relatives.

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_fed.compression import Compressor, Identity, Layer
from lightning_fed.federation.compressed_channel import CompressedChannel, Weighted, row_norms
from lightning_fed.federation.exchange import Exchange

ErrorFeedbackName = Literal["econtrol", "ef", "ef21", "none"]
FirstEstimate = Literal["exact", "zero", "compressed"]

# For the scaled sign and low rank, which keep a few per cent to more than half of vectors as they occur.
UNTYPICAL_ETA = 0.03


class CompressedMean:
    """Estimates the mean of the clients' vectors ``g_i`` (gradients), from one compressed message each a step.

    ========== ======================== ========================== ============== =====================================
    method     message ``D_i``          error ``e_i``              ``h_i``        estimate
    ========== ======================== ========================== ============== =====================================
    econtrol   ``C(eta e_i + g_i-h_i)`` ``e_i += g_i - h_i - D_i`` ``h_i += D_i`` ``h += mean D``; Gao, Islamov, Stich
    ef21       ``C(g_i - h_i)``                                    ``h_i += D_i`` ``h += mean D``; Richtarik et al. 2021
    ef         ``C(e_i + g_i)``         ``e_i += g_i - D_i``                      ``mean D``; Seide et al. 2014
    none       ``C(g_i)``                                                         ``mean D``
    ========== ======================== ========================== ============== =====================================

    So EF21 is EControl with ``eta = 0``, and EF is EControl with ``eta = 1`` whose ``h`` stays 0.

    Args:
        compressor: C.
        method: see the table.
        eta: of EControl; None: the compressor's delta, or ``UNTYPICAL_ETA`` if that says little. Much larger values
            diverge: with Top-1 %, on digits, 0.03 trains as well as 0.01, 0.1 badly, and 0.3 not at all.
        first_estimate: ``h_i`` after the first step: ``"exact"``, g_i is sent as it is; ``"compressed"``, C(g_i), with
            no error kept; ``"zero"``, the first step is as all others, from ``h_i = 0``.
        layers: of a row.
        like_CP: tells C, dtype and device.
        exchange: of this rank.
        seed: of the federation.

    Attributes:
        errors: ``e_i`` ``[C, P]``, if the method has them.
        estimates: ``h_i`` ``[C, P]``, if the method has them.
        mean: ``h`` ``[P]``, the last estimate; the mean of ``h_i`` if the method has them.
        steps: communications so far.
        skipped: of which somebody's vector was not finite, so that all have left it out.
    """

    def __init__(
        self,
        compressor: Compressor,
        method: ErrorFeedbackName,
        eta: float | None,
        first_estimate: FirstEstimate,
        layers: Sequence[Layer],
        like_CP: Tensor,
        exchange: Exchange,
        seed: int,
    ) -> None:
        self.channel = CompressedChannel(compressor, layers, like_CP, seed)
        self._exact = CompressedChannel(Identity(), layers, like_CP, seed)
        if eta is None:
            eta = self.channel.delta if self.channel.delta_is_typical else UNTYPICAL_ETA
        self._eta = {"econtrol": eta, "ef": 1.0}.get(method, 0.0)
        self._first_estimate = first_estimate
        self.errors = torch.zeros_like(like_CP) if method in ("econtrol", "ef") else None
        self.estimates = torch.zeros_like(like_CP) if method in ("econtrol", "ef21") else None
        self.mean = torch.zeros_like(like_CP[0])
        self.steps = self.skipped = 0
        num_clients = exchange.layout.num_clients
        self._weights = np.full((1, num_clients), 1 / num_clients)

    def estimate(self, g: Tensor, exchange: Exchange) -> Tensor | None:
        """The estimate of ``mean_i g_i``, ``[P]``, the same bits on every rank; a collective call.

        Args:
            g: of this rank's clients ``[C, P]``; it is used up.
            exchange: of this rank.

        Returns:
            None if a number of any client is not finite: then no state has changed on any rank.
        """
        is_finite = all_finite(g, exchange)
        first = self.estimates is not None and self.steps == 0
        channel = self._exact if first and self._first_estimate == "exact" else self.channel

        difference = g if self.estimates is None else g.sub_(self.estimates)  # g - h_i

        def messages(place: tuple[slice, slice], out: Tensor) -> Tensor:
            if self.errors is None:
                return difference[place]
            return torch.add(difference[place], self.errors[place], alpha=self._eta, out=out)  # eta e_i + g - h_i

        sent = channel.send(messages, exchange.everyone, exchange, self.steps + self.skipped)  # D = C(...)
        if not is_finite():
            sent.discard()
            self.skipped += 1
            return None
        own: list[Weighted] = []
        if self.errors is not None and not (first and self._first_estimate == "compressed"):
            self.errors += difference
            own.append((self.errors, -1.0))  # e_i <- e_i + g - h_i - D
        if self.estimates is None:
            self.mean.zero_()
        else:
            own.append((self.estimates, 1.0))  # h_i <- h_i + D
        sent.add_received_(self.mean.unsqueeze(0), self._weights, own)  # h <- h + mean_i D_i
        self.steps += 1
        return self.mean

    def measure(self, exchange: Exchange) -> dict[str, float]:
        """How much the last messages have left out, and what they cost; a collective call."""
        numbers = self.channel.measure(exchange)
        if self.errors is not None:
            numbers["error_norm"] = float(exchange.gather_rows(row_norms(self.errors)).mean())
        return numbers

    def client_matrices(self) -> dict[str, Tensor]:
        """``e_i``, ``h_i`` and the compressor's warm starts."""
        matrices = {"error": self.errors, "estimate": self.estimates}
        kept = {name: matrix for name, matrix in matrices.items() if matrix is not None}
        return {**kept, **self.channel.client_matrices("compressor")}

    def state(self) -> dict[str, Any]:
        """What is equal on all ranks: ``h`` and the counts."""
        return {"mean": self.mean, "steps": self.steps, "skipped": self.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.mean.copy_(state["mean"])
        self.steps, self.skipped = state["steps"], state["skipped"]


def all_finite(vectors_CP: Tensor, exchange: Exchange) -> Callable[[], bool]:
    """Begin to ask all ranks whether all numbers are finite; the result waits for the answer, the same everywhere.

    Vectors that are not become 0, so that they can be packed; nobody is going to use them. The question is a decision
    of the engine, and does not count as communication of the algorithm.
    """
    # The sum of finite numbers may overflow; such a step is no use either.
    finite = torch.isfinite(vectors_CP.sum(dim=1))
    vectors_CP[~finite] = 0
    shared = exchange.share(finite.unsqueeze(1).to(torch.uint8), exchange.everyone)
    return lambda: bool(shared.receive().all())

"""Bounded updates: what a client's round has changed is brought to a norm of at most C, in place on its row.

A robust federation bounds what one client can do; a private one needs the bound to hold exactly, for every client and
every number format, because its noise is in proportion to C.

Shapes: P = numbers in a row, d = numbers in a layer, L = layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_fed.checks import check_choice, check_numbers
from lightning_fed.compression import Layer

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy

Clipping = Literal["whole", "layers", "layers_by_size"]

# What is clipped at a time: float64 copies are little beside the rows.
NUMBERS_PER_BLOCK = 2**20
# Norms are aimed at C less this part of it: more than float64 loses when it adds up the squares of a row.
MARGIN = 2.0**-40


class UpdateClipping:
    """Clips ``u = x_k - x``, the update of client k in a round that it began with the row x.

    ``"whole"`` is ``u * min(1, C / ||u||)`` (McMahan et al. 2018, "flat clipping"). The other two leave u unchanged if
    ``||u|| < C``, and else set *every* layer to a norm of its own, which enlarges layers that were below it:
    ``C / sqrt(L)`` for ``"layers"``, ``C sqrt(d_l / d)`` for ``"layers_by_size"`` (Pelikan et al. 2023). A layer is a
    parameter tensor; one that has not moved at all stays where it is.

    The norm of what is left is never above C: norms are added up in float64, and numbers are rounded to the rows'
    dtype *towards* x, so no entry of an update grows in rounding.

    Args:
        max_norm: C, above 0.
        clipping: which of the three.
        layers: of a row, in order.

    Raises:
        ValueError: if C is not a positive number, or there is no such clipping.
    """

    def __init__(self, max_norm: float, clipping: Clipping, layers: Sequence[Layer]) -> None:
        check_numbers("(0, inf)", max_norm=max_norm)
        check_choice("clipping", clipping, "whole", "layers", "layers_by_size")
        sizes = [layer.size for layer in layers if layer.size]
        width = sum(sizes)
        if clipping == "whole":
            sizes, shares = [width], [1.0]
        elif clipping == "layers":
            shares = [1 / len(sizes)] * len(sizes)
        else:
            shares = [size / width for size in sizes]
        ends = accumulate(sizes)
        self._spans = [slice(end - size, end) for size, end in zip(sizes, ends)]
        self._bound = max_norm * (1 - MARGIN)
        self._bounds = [self._bound * math.sqrt(share) for share in shares]

    @torch.no_grad()
    def clip_(self, row_P: Tensor, start_P: Tensor) -> None:
        """Clip one client's update in place.

        Args:
            row_P: x_k, finite.
            start_P: x, of the same dtype and device.
        """
        norms = [norm_of_difference(row_P[span], start_P[span]) for span in self._spans]
        if math.hypot(*norms) <= self._bound:
            return
        for span, norm, bound in zip(self._spans, norms, self._bounds):
            if norm:
                scale_update_(row_P[span], start_P[span], bound / norm)


def contributing_slots(strategy: FederatedStrategy) -> list[int]:
    """The row numbers of this rank's clients that take part in the present round, but for those that were dropped."""
    clients = np.setdiff1d(strategy.exchange.share_of(strategy.cohort), strategy.dropped)
    return [strategy.bank.slot(client) for client in clients.tolist()]


def norm_of_difference(row_P: Tensor, start_P: Tensor) -> float:
    """``||x_k - x||`` in float64."""
    parts = blocks(row_P, start_P)
    return math.hypot(*(float(torch.linalg.vector_norm(row.double() - start.double())) for row, start in parts))


def scale_update_(row_P: Tensor, start_P: Tensor, factor: float) -> None:
    """``x_k <- x + factor (x_k - x)``, in place, each number rounded towards x."""
    for row, start in blocks(row_P, start_P):
        origin = start.double()
        update = (row.double() - origin) * factor
        row.copy_(origin + update)
        too_far = (row.double() - origin).abs() > update.abs()
        row.copy_(torch.where(too_far, torch.nextafter(row, start), row))


def blocks(row_P: Tensor, start_P: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The two vectors, a stretch at a time."""
    return zip(row_P.split(NUMBERS_PER_BLOCK), start_P.split(NUMBERS_PER_BLOCK))

"""Random entries of a vector.

Shapes: C = rows, P = numbers in a row, K = entries that travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_fed.checks import check_flags
from lightning_fed.compression.compressor import Scope, SparseVector, Sparsifier, join, split

SORTED_SHARE = 0.02  # of a block; from this share on it is faster to mark the entries in the block


class RandK(Sparsifier):
    """K entries of each block, drawn uniformly without replacement; K = max(1, round(ratio d)).

    Only the K values travel, in the rows' dtype: sender and receivers draw the same indices from the message's seed.
    They must run the same version of NumPy, which may change its streams between versions.

    Without scaling, ``E||C(v) - v||^2 = (1 - K/d) ||v||^2``, so delta is K/d.

    Args:
        ratio: K/d, in (0, 1].
        scope: see :class:`~lightning_fed.compression.compressor.Compressor`.
        unbiased: multiply by d/K, so that ``E C(v) = v``. The variance is then ``(d/K - 1) ||v||^2``: not contractive,
            and not for error feedback; delta is given as 0.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(self, ratio: float, scope: Scope = "model", unbiased: bool = False) -> None:
        super().__init__(ratio, scope)
        check_flags(unbiased=unbiased)
        self.unbiased = unbiased

    @property
    def is_contractive(self) -> bool:
        return not self.unbiased

    @property
    def delta(self) -> float:
        return 0.0 if self.unbiased else super().delta

    @property
    def message_bytes(self) -> int:
        return self.num_kept * self.dtype.itemsize

    def pack(self, rows_CP: Tensor, seeds: Sequence[int]) -> Tensor:
        indices = torch.from_numpy(np.stack([self._draw(seed) for seed in seeds])).to(rows_CP.device)
        values_CK = rows_CP.gather(1, indices)
        if self.unbiased:
            for values, kept, size in zip(values_CK.split(self.kept, dim=1), self.kept, self.blocks):
                values.mul_(size / kept)
        return join(values_CK)

    def unpack(self, message_B: Tensor, seed: int) -> SparseVector:
        indices = torch.from_numpy(self._draw(seed)).to(message_B.device)
        return SparseVector(indices, split(message_B, (self.dtype, self.num_kept))[0])

    def _draw(self, seed: int) -> np.ndarray:
        """The indices of one message, ascending; int64 ``[K]``."""
        draw = np.random.default_rng(seed)
        starts = np.cumsum([0, *self.blocks])
        return np.concatenate(
            [start + _subset(draw, *block) for start, block in zip(starts, zip(self.blocks, self.kept))]
        )


def _subset(draw: np.random.Generator, size: int, count: int) -> np.ndarray:
    """``count`` distinct numbers below ``size``, ascending, in about O(count)."""
    if count < SORTED_SHARE * size:
        return np.sort(draw.choice(size, count, replace=False, shuffle=False))
    fewer = min(count, size - count)
    marked = np.zeros(size, dtype=bool)
    missing = fewer
    # No number is favoured and there are never too many, so every set of this size is equally likely in the end.
    while missing:
        marked[draw.integers(size, size=missing)] = True
        missing = fewer - int(np.count_nonzero(marked))
    return np.flatnonzero(marked if fewer == count else ~marked)

"""Few bits a number: the sign, or one of some levels drawn at random.

Shapes: C = rows, P = numbers in a row, G = stretches of a row with one number of their own each (blocks or buckets),
D = numbers in a stretch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from lightning_fed.checks import check_counts, check_flags, given
from lightning_fed.compression.bit_packing import pack_bits, packed_size, unpack_bits
from lightning_fed.compression.compressor import Compressor, DenseVector, Scope, join, split

SUMMED = 4096  # numbers that are added up at once


class ScaledSign(Compressor):
    """``(||v||_1 / d) sign(v)`` of each block of d entries, where sign(0) = +1 (Karimireddy et al. 2019).

    ``||C(v) - v||^2 = (1 - ||v||_1^2 / (d ||v||_2^2)) ||v||^2``, so delta is 1/d in the worst case, of a single
    non-zero entry; ``||C(v) - v||^2`` is about ``(1 - 2/pi) ||v||^2`` for normally distributed ones. The message: the
    signs of the whole row, eight a byte, then a scale for each block in the rows' dtype.

    Args:
        scope: see :class:`~lightning_fed.compression.compressor.Compressor`.
    """

    def prepare(self, num_rows: int) -> None:
        # The eight signs that a byte stands for, which is faster to look up than to compute.
        bits = unpack_bits(torch.arange(256, dtype=torch.uint8)[:, None], 1, 8)
        self._signs = bits.to(self.device, self.dtype).mul_(2).sub_(1)

    @property
    def delta_is_typical(self) -> bool:
        return False

    @property
    def delta(self) -> float:
        return 1 / max(self.blocks)

    @property
    def message_bytes(self) -> int:
        return packed_size(self.width, 1) + len(self.blocks) * self.dtype.itemsize

    def pack(self, rows_CP: Tensor, seeds: Sequence[int]) -> Tensor:
        runs = _runs(self.blocks)
        means = [_sums(block_CGD.abs()) / block_CGD.shape[2] for block_CGD in _by_run(rows_CP, runs)]
        return join(pack_bits((rows_CP >= 0).to(torch.uint8), 1), torch.cat(means, dim=1).to(self.dtype))

    def unpack(self, message_B: Tensor, seed: int) -> DenseVector:
        fields = (torch.uint8, packed_size(self.width, 1)), (self.dtype, len(self.blocks))
        packed, scales = split(message_B, *fields)
        signs = self._signs.index_select(0, packed.to(torch.int32)).view(-1)[: self.width]
        return DenseVector(_multiply_runs_(signs, scales, _runs(self.blocks)))


class Quantize(Compressor):
    """Stochastic rounding to ``2^bits - 1`` even levels between plus and minus a norm (QSGD, Alistarh et al. 2017).

    Each block is cut into buckets, of which the 2-norm travels in the rows' dtype, then the levels as a stream of
    ``bits`` bits each. With ``s = 2^(bits-1) - 1`` levels on either side of zero, rounding v / ||v|| of a bucket of d
    entries to a neighbouring level, without bias, has the variance ``omega ||v||^2`` at most, where

    * ``omega = sqrt(d)/s - 1`` if ``sqrt(d) >= 2 s``, else ``d / (4 s^2)``: the worst case exactly in the first regime,
      and always below ``min(d/s^2, sqrt(d)/s)``, which QSGD's Lemma 3.1 proves for the same levels;
    * ``omega = d - 1``, always attained, for ``bits=1``, which has the two levels plus and minus the norm.

    Error feedback needs a contraction, which an unbiased quantizer becomes when divided by 1 + omega: its delta is
    ``1 / (1 + omega)``. More bits or smaller buckets raise it, at the price of bytes.

    Args:
        bits: of an entry, 1 to 8.
        scope: see :class:`~lightning_fed.compression.compressor.Compressor`.
        bucket_size: d, at most; the last bucket of a block may be smaller. 512 is the size of QSGD's experiments with 4
            bits. None: each block is one bucket.
        unbiased: leave out the division, so that ``E C(v) = v``: not contractive, and not for error feedback; delta is
            given as 0.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self, bits: int = 4, scope: Scope = "model", bucket_size: int | None = 512, unbiased: bool = False
    ) -> None:
        super().__init__(scope)
        check_counts(bits=bits, **given(bucket_size=bucket_size))
        check_flags(unbiased=unbiased)
        if bits > 8:
            raise ValueError(f"bits={bits!r} of Quantize must be an integer from 1 to 8: it is what an entry costs.")
        self.bits = bits
        self.bucket_size = bucket_size
        self.unbiased = unbiased
        self._buckets: list[int] = []

    def prepare(self, num_rows: int) -> None:
        self._buckets = []  # a new list: the one of the compressor that was copied is not ours
        for size in self.blocks:
            bucket = self.bucket_size or max(size, 1)
            self._buckets += [bucket] * (size // bucket) + [size % bucket] * (size % bucket > 0)
        self._runs = _runs(self._buckets)
        shrink = [1.0 if self.unbiased else 1 / (1 + self.omega(size)) for size in self._buckets]
        self._shrink = torch.tensor(shrink, dtype=self._exact).to(self.device)

    @property
    def is_contractive(self) -> bool:
        return not self.unbiased

    @property
    def delta(self) -> float:
        return 0.0 if self.unbiased else 1 / (1 + max(map(self.omega, self._buckets)))

    @property
    def message_bytes(self) -> int:
        return len(self._buckets) * self.dtype.itemsize + packed_size(self.width, self.bits)

    def omega(self, size: int) -> float:
        """Largest variance of the unbiased rounding of a bucket of ``size`` entries, in units of ``||v||^2``."""
        if self.bits == 1:
            return size - 1
        # An entry a between two levels has the variance (a - lower)(upper - a), which is at most a/s - a^2 up to
        # a = 1/(2s) and at most 1/(4s^2) beyond: concave in a^2, so worst if all entries are equal.
        ratio = math.sqrt(size) / (self._intervals / 2)
        return ratio - 1 if ratio >= 2 else ratio**2 / 4

    def pack(self, rows_CP: Tensor, seeds: Sequence[int]) -> Tensor:
        runs = self._runs
        exact = rows_CP.to(self._exact)
        draws_CP = torch.stack([_uniform(seed, self.width, self._exact) for seed in seeds]).to(rows_CP.device)
        norms, codes = [], []
        for values_CGD, draws_CGD in zip(_by_run(exact, runs), _by_run(draws_CP, runs)):
            norms.append(_norms(values_CGD).to(self.dtype))
            codes.append(self._round(values_CGD, norms[-1][..., None], draws_CGD).flatten(1))
        return join(torch.cat(norms, dim=1), pack_bits(torch.cat(codes, dim=1), self.bits))

    def unpack(self, message_B: Tensor, seed: int) -> DenseVector:
        fields = (self.dtype, len(self._buckets)), (torch.uint8, packed_size(self.width, self.bits))
        norms, packed = split(message_B, *fields)
        codes = unpack_bits(packed, self.bits, self.width).to(self._exact)
        levels = codes.mul_(2).sub_(self._intervals).div_(self._intervals)
        if not self.unbiased:
            norms = norms * self._shrink
        return DenseVector(_multiply_runs_(levels, norms, self._runs).to(self.dtype))

    @property
    def _exact(self) -> torch.dtype:
        """Of the arithmetic: bfloat16 cannot count to 508."""
        return torch.float32 if self.dtype.itemsize < 4 else self.dtype

    @property
    def _intervals(self) -> int:
        """Between the lowest and the highest level; even from two bits on, so that zero is a level."""
        return max(2**self.bits - 2, 1)

    def _round(self, values: Tensor, norms: Tensor, draws: Tensor) -> Tensor:
        """Codes from 0 to ``_intervals``: those of the level below or above, uint8, with the right mean."""
        half = self._intervals / 2
        position = torch.where(norms > 0, values / norms, 0.0).mul_(half).add_(half).clamp_(0, self._intervals)
        lower = position.floor()
        # Not floor(position + draw): that sum may round up to the next integer, and a zero would not stay a zero.
        return lower.to(torch.uint8).add_(draws < position - lower)


def _uniform(seed: int, count: int, dtype: torch.dtype) -> Tensor:
    """In [0, 1), float32 or float64 ``[count]``; not drawn where the rows are, so that it does not matter where."""
    # Not torch.Generator, which takes twice the time and only the lower 32 bits of the seed on a CPU.
    exact = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(np.random.default_rng(seed).random(count, dtype=exact))


def _norms(values_CGD: Tensor) -> Tensor:
    """2-norms ``[C, G]``; of numbers whose squares leave the range of their dtype, too."""
    largest = values_CGD.abs().amax(dim=2)
    scaled = values_CGD / torch.where(largest > 0, largest, 1.0)[..., None]
    return _sums(scaled.square_()).sqrt() * largest


def _sums(values_CGD: Tensor) -> Tensor:
    """Sums ``[C, G]`` of non-negative numbers that do not depend on C or on the number of threads.

    torch adds up a single long vector in as many parts as there are threads, but one of several vectors in one part:
    so no sum here is long.
    """
    while values_CGD.shape[2] > SUMMED:
        whole = values_CGD.shape[2] // SUMMED * SUMMED
        parts = values_CGD[..., :whole].unflatten(2, (-1, SUMMED)).sum(dim=3)
        values_CGD = torch.cat([parts, values_CGD[..., whole:]], dim=2)
    return values_CGD.sum(dim=2)


def _runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours of equal size together: (how many, size)."""
    return [(len(list(equal)), size) for size, equal in groupby(sizes)]


def _by_run(rows_CP: Tensor, runs: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The rows cut into runs, each ``[C, G, D]``; views."""
    parts = rows_CP.split([count * size for count, size in runs], dim=1)
    return [part.unflatten(1, run) for part, run in zip(parts, runs)]


def _multiply_runs_(row_P: Tensor, factors_G: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Multiply each stretch of a row with its own factor, in place."""
    counts = [count for count, _ in runs]
    for values_1GD, factors in zip(_by_run(row_P[None], runs), factors_G.split(counts)):
        values_1GD.mul_(factors[:, None])
    return row_P

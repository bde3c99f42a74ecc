"""The largest entries of a vector.

Shapes: C = rows, P = numbers in a row, K = entries that travel, N = candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_fed.compression.compressor import SparseVector, Sparsifier, join, split

STRETCH = 65_536  # entries of a row that share the upper bits of their index
SAMPLED_WIDTH = 32_768  # rows from this width on are worth a sample
SAMPLED_SHARE, LARGEST_SAMPLE = 1 / 8, 32_768
STRIDE = 2_654_435_761  # Knuth's multiplicative hash: a prime, so its multiples fall nowhere twice
HEAP_SHARE = 64  # torch.topk keeps a heap of k numbers on a CPU if k is at most N / 64, and sorts otherwise
CACHED = 131_072  # entries that stay in a processor's cache from one pass to the next


class TopK(Sparsifier):
    """The K entries of largest magnitude of each block, K = max(1, round(ratio d)).

    delta is K/d: ``||C(v) - v||^2 <= (1 - K/d) ||v||^2``. The message: K values in the rows' dtype, the lower 16 bits
    of their ascending indices, and for each stretch of 65,536 entries how many of the indices lie in it (int32).

    Args:
        ratio: K/d, in (0, 1].
        scope: see :class:`~lightning_fed.compression.compressor.Compressor`.

    Raises:
        ValueError: if a setting is out of its range.
    """

    @property
    def message_bytes(self) -> int:
        return self.num_kept * (self.dtype.itemsize + 2) + 4 * self._num_stretches

    def pack(self, rows_CP: Tensor, seeds: Sequence[int]) -> Tensor:
        blocks = rows_CP.split(self.blocks, dim=1)
        starts = np.cumsum([0, *self.blocks])
        chosen = [top_k_indices(block, k) + int(start) for block, k, start in zip(blocks, self.kept, starts)]
        indices_CK = torch.cat(chosen, dim=1) if len(chosen) > 1 else chosen[0]
        ends = torch.arange(1, self._num_stretches + 1, device=rows_CP.device) * STRETCH
        below = torch.searchsorted(indices_CK, ends.expand(len(rows_CP), -1).contiguous())
        counts = below.diff(dim=1, prepend=below.new_zeros(len(rows_CP), 1))
        low = (indices_CK % STRETCH).to(torch.uint16)
        return join(rows_CP.gather(1, indices_CK), low, counts.to(torch.int32))

    def unpack(self, message_B: Tensor, seed: int) -> SparseVector:
        fields = (self.dtype, self.num_kept), (torch.uint16, self.num_kept), (torch.int32, self._num_stretches)
        values, low, counts = split(message_B, *fields)
        indices = low.to(torch.int64)
        if self._num_stretches > 1:
            starts = torch.arange(self._num_stretches, device=message_B.device) * STRETCH
            # Told how many there will be, a GPU need not wait for the sum of the counts.
            indices += starts.repeat_interleave(counts, output_size=self.num_kept)
        return SparseVector(indices, values)

    @property
    def _num_stretches(self) -> int:
        return math.ceil(self.width / STRETCH)


def top_k_indices(rows_CP: Tensor, k: int) -> Tensor:
    """Where the k entries of largest magnitude are in each row.

    Exact, and the same on every device: of equal magnitudes those of lower index are taken first. Long rows are not
    sorted: a sample tells a magnitude that a few more than k entries exceed, and the choice is made among these. A
    sample that misleads costs time, never the result.

    Args:
        rows_CP: finite numbers.
        k: 1 to P.

    Returns:
        int64 ``[C, k]``, ascending.
    """
    if rows_CP.shape[1] < SAMPLED_WIDTH:
        width = rows_CP.shape[1]
        return _places(largest(rows_CP.abs(), k).flatten()).view(-1, k) % width
    return torch.stack([_top_k_of_long(row, k) for row in rows_CP])


def largest(sizes_CN: Tensor, k: int) -> Tensor:
    """The k largest of each row, of equal ones the first: bool ``[C, N]``."""
    threshold = kth_largest(sizes_CN, k)[:, None]
    chosen = sizes_CN >= threshold
    if int(chosen.count_nonzero()) == k * len(sizes_CN):
        return chosen
    above, ties = sizes_CN > threshold, sizes_CN == threshold
    missing = k - above.sum(dim=1, keepdim=True)
    return above | (ties & (ties.cumsum(dim=1) <= missing))


def kth_largest(sizes_CN: Tensor, k: int) -> Tensor:
    """The k-th largest number of each row, ``[C]``."""
    few = HEAP_SHARE * k <= sizes_CN.shape[1] < SAMPLED_WIDTH
    if few or not _on_cpu(sizes_CN):
        return sizes_CN.topk(k, dim=1, sorted=False).values.amin(dim=1)
    # torch.kthvalue takes quadratic time if the numbers descend. NumPy's selection is linear, but knows no bfloat16.
    numbers = sizes_CN.float() if sizes_CN.dtype.itemsize < 4 else sizes_CN
    place = sizes_CN.shape[1] - k
    return torch.from_numpy(np.partition(numbers.numpy(), place, axis=1)[:, place].copy()).to(sizes_CN.dtype)


def _top_k_of_long(row_P: Tensor, k: int) -> Tensor:
    threshold = _sampled_threshold(row_P, k)
    above, sizes = _above(row_P, threshold)
    if len(above) >= k:
        return above[largest(sizes[None], k)[0]]
    ties = _first_equal(row_P, threshold, k - len(above))
    if len(above) + len(ties) < k:  # the sample promised too much
        threshold = kth_largest(row_P.abs()[None], k)[0]
        above, _ = _above(row_P, threshold)
        ties = _first_equal(row_P, threshold, k - len(above))
    chosen = torch.zeros(row_P.shape, dtype=torch.bool, device=row_P.device)
    chosen[above] = True
    chosen[ties] = True
    return _places(chosen)


def _sampled_threshold(row_P: Tensor, k: int) -> Tensor:
    """A magnitude that probably at least k entries exceed, and not many more, unless there are many equal ones."""
    size = min(int(SAMPLED_SHARE * len(row_P)), LARGEST_SAMPLE)
    expected = size * k / len(row_P)
    rank = math.ceil(expected + 4 * math.sqrt(expected)) + 4  # four standard deviations, and something for the few
    if rank >= size:
        return row_P.new_tensor(-1)
    places = torch.arange(size, device=row_P.device) * STRIDE % len(row_P)
    return kth_largest(row_P[places].abs()[None], rank)[0]


def _above(row_P: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Indices, ascending, and magnitudes of the entries that are larger than the threshold."""
    indices, sizes = [], []
    for start, stretch in _stretches(row_P):
        magnitudes = stretch.abs()
        places = _places(magnitudes > threshold)
        sizes.append(magnitudes[places])
        indices.append(places.add_(start))
    return torch.cat(indices), torch.cat(sizes)


def _first_equal(row_P: Tensor, threshold: Tensor, count: int) -> Tensor:
    """Indices of the first ``count`` entries of just this magnitude; of fewer, if there are fewer."""
    indices: list[Tensor] = []
    for start, stretch in _stretches(row_P):
        indices.append(_places(stretch.abs() == threshold)[:count].add_(start))
        count -= len(indices[-1])
        if count == 0:
            break
    return torch.cat(indices)


def _stretches(row_P: Tensor) -> list[tuple[int, Tensor]]:
    """Pieces of a row with their starts: on a CPU such as its cache holds, on a GPU, where calls cost more, one."""
    length = CACHED if _on_cpu(row_P) else len(row_P)
    return [(number * length, stretch) for number, stretch in enumerate(row_P.split(length))]


def _places(mask_N: Tensor) -> Tensor:
    """Indices of what is True; on a CPU with NumPy, which is a few times faster than torch."""
    return torch.from_numpy(np.flatnonzero(mask_N.numpy())) if _on_cpu(mask_N) else mask_N.nonzero()[:, 0]


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"

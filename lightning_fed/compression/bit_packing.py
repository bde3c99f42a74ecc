"""Small integers as a stream of bits without gaps.

Shapes: n = numbers, b = bits of a number.

Number i takes the bits ``i b .. (i + 1) b - 1`` of the stream, its lowest bit first; bit j of the stream is bit
``j mod 8`` of byte ``j // 8``, counted from the lowest. The last byte is filled up with zeros.

Eight numbers, a byte each, are one 64-bit word, and packed they are its lowest b bytes: a few shifts of words move
them all together. This takes a little-endian machine, as all are that PyTorch supports.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 8  # numbers in a word


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack numbers of ``bits`` bits.

    Args:
        codes: uint8 ``[..., n]``, all below ``2 ** bits``; left as they are.
        bits: of each number, 1 to 8.

    Returns:
        uint8 ``[..., ceil(n bits / 8)]``.
    """
    count = codes.shape[-1]
    if bits == 8 or count == 0:
        return codes.clone()
    words = _words(codes)
    for gap, low, high in _steps(bits):
        words = (words & low) | ((words >> gap) & high)  # close the gap between two neighbours
    groups = words.view(torch.uint8).unflatten(-1, (-1, GROUP))[..., :bits]
    return groups.flatten(-2)[..., : packed_size(count, bits)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_bits`: the ``count`` numbers, uint8 ``[..., n]``."""
    if bits == 8 or count == 0:
        return packed.clone()
    groups = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = _words(pad(groups, (0, GROUP - bits)).flatten(-2))
    for gap, low, high in reversed(_steps(bits)):
        words = (words & low) | ((words & high) << gap)
    return words.view(torch.uint8)[..., :count]


def _words(numbers: Tensor) -> Tensor:
    """Bytes as int64, filled up with zeros; a copy, because words need an aligned start."""
    filled = pad(numbers, (0, -numbers.shape[-1] % GROUP))
    return filled.clone(memory_format=torch.contiguous_format).view(torch.int64)


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """Masks with which pairs of numbers, then of pairs, then of fours, become neighbours: (gap, low, high) of each."""
    steps = []
    for width in (8, 16, 32):
        filled = bits * width // 8
        low = sum((2**filled - 1) << start for start in range(0, 64, 2 * width))
        steps.append((width - filled, low, low << filled))
    return steps

"""Bit streams against NumPy's own packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fed.compression.bit_packing import pack_bits, packed_size, unpack_bits


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """The same bytes, one bit at a time."""
    each = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(each.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


@given(bits=st.integers(1, 8), data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_numbers_take_the_bytes_of_their_bits_and_come_back(bits: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    codes = np.array(numbers, dtype=np.uint8)
    packed = pack_bits(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(len(codes), bits) == -(-len(codes) * bits // 8)
    np.testing.assert_array_equal(packed.numpy(), stream(codes, bits))
    assert unpack_bits(packed, bits, len(codes)).tolist() == numbers


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_packed_each_for_itself(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 1001), dtype=np.uint8)
    packed = pack_bits(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(packed.numpy(), stream(codes, bits))
    np.testing.assert_array_equal(unpack_bits(packed, bits, 1001).numpy(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_lowest_bits_come_first(bits: int) -> None:
    assert pack_bits(torch.tensor([1, 0], dtype=torch.uint8), bits)[0] == 1
    assert pack_bits(torch.tensor([0, 1], dtype=torch.uint8), bits).tolist()[bits // 8] == 1 << bits % 8


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_slices_at_odd_addresses_are_packed_and_left_alone(bits: int) -> None:
    memory = torch.ones(101, dtype=torch.uint8)
    packed = pack_bits(memory[3:], bits)
    np.testing.assert_array_equal(packed.numpy(), stream(memory[3:].numpy(), bits))
    shifted = torch.cat([packed.new_zeros(1), packed])[1:]
    unpack_bits(shifted, bits, 98).zero_()
    packed.zero_()
    assert torch.equal(unpack_bits(shifted, bits, 98), memory[3:]) and memory.sum() == 101

"""Compressors, for any vectors and layers: message sizes, contraction with the stated delta, the same bits again."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lightning_fed.compression import Compressor, Identity, Layer, LowRank, Quantize, RandK, ScaledSign, TopK

Scope = str
MAKE: dict[str, Callable[[float, Scope], Compressor]] = {
    "Identity": lambda ratio, scope: Identity(),
    "TopK": lambda ratio, scope: TopK(ratio, scope),  # type: ignore[arg-type]
    "RandK": lambda ratio, scope: RandK(ratio, scope),  # type: ignore[arg-type]
    "ScaledSign": lambda ratio, scope: ScaledSign(scope),  # type: ignore[arg-type]
    "Quantize": lambda ratio, scope: Quantize(1 + round(7 * ratio), scope, 4),  # type: ignore[arg-type]
    "LowRank": lambda ratio, scope: LowRank(1),
}
RANDOM = ("RandK", "Quantize")
DRAWS = 60
# What numbers keep of their precision: the bytes that travel are rounded to float32.
ROUNDING = 1e-4

shapes = st.sampled_from([(1,), (3,), (2, 3), (4, 2), (2, 2, 2), (5, 1)])
layers_of = st.lists(shapes, min_size=1, max_size=4).map(
    lambda found: [Layer(f"layer{number}", torch.Size(shape)) for number, shape in enumerate(found)]
)
ratios, scopes, seeds = st.floats(0.01, 1.0), st.sampled_from(["model", "layer"]), st.integers(0, 2**62)
# Squares of larger or smaller ones leave the range of float32, in which some norms are taken.
numbers = st.floats(-(2.0**40), 2.0**40, width=32).filter(lambda number: number == 0 or abs(number) > 2.0**-40)


def draw_rows(data: st.DataObject, layers: list[Layer], count: int = 2) -> Tensor:
    width = sum(layer.size for layer in layers)
    return torch.from_numpy(data.draw(hnp.arrays(np.float32, (count, width), elements=numbers), label="rows"))


def dense(compressor: Compressor, message: Tensor, seed: int) -> Tensor:
    row = torch.zeros(compressor.width, dtype=torch.float64)
    found = torch.zeros(compressor.width, dtype=compressor.dtype)
    compressor.unpack(message, seed).add_to_(found)
    return row + found


@pytest.mark.parametrize("name", MAKE)
@given(data=st.data(), layers=layers_of, ratio=ratios, scope=scopes, seed=seeds)
def test_messages_have_the_size_that_is_told_and_the_same_bits_from_the_same_seed(
    name: str, data: st.DataObject, layers: list[Layer], ratio: float, scope: Scope, seed: int
) -> None:
    rows = draw_rows(data, layers)
    before = rows.clone()
    first = MAKE[name](ratio, scope).bind(layers, rows)
    messages = first.pack(rows, [seed, seed + 1])
    assert messages.dtype == torch.uint8 and messages.shape == (2, first.message_bytes)
    assert torch.equal(MAKE[name](ratio, scope).bind(layers, rows).pack(rows, [seed, seed + 1]), messages)
    receiver = MAKE[name](ratio, scope).bind(layers, rows[:1])
    for message, number in zip(messages, (seed, seed + 1)):
        there = dense(receiver, message, number)
        assert torch.isfinite(there).all() and torch.equal(there, dense(first, message, number))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=25)
@given(data=st.data(), layers=layers_of, ratio=ratios, scope=scopes, seed=seeds)
def test_contraction_with_the_stated_delta(
    name: str, data: st.DataObject, layers: list[Layer], ratio: float, scope: Scope, seed: int
) -> None:
    row = draw_rows(data, layers, 1)
    size = float(row.double().square().sum())
    assume(size > 0)
    draws = DRAWS if name in RANDOM else 1
    bound = MAKE[name](ratio, scope).bind(layers, row.expand(draws, -1))
    assert bound.is_contractive and 0 <= bound.delta <= 1 and (bound.delta > 0 or name == "LowRank")
    several = [seed + number for number in range(draws)]
    messages = bound.pack(row.expand(draws, -1).contiguous(), several)
    lost = [float((dense(bound, *sent) - row[0]).square().sum()) / size for sent in zip(messages, several)]
    error = 5 * float(np.std(lost)) / math.sqrt(draws)
    assert np.mean(lost) <= 1 - bound.delta + error + ROUNDING


@given(data=st.data(), layers=layers_of, ratio=ratios, scope=scopes)
def test_top_k_keeps_the_largest_exactly(data: st.DataObject, layers: list[Layer], ratio: float, scope: Scope) -> None:
    row = draw_rows(data, layers, 1)
    bound = MAKE["TopK"](ratio, scope).bind(layers, row)
    kept = dense(bound, bound.pack(row, [0])[0], 0)
    where, start = kept != 0, 0
    assert torch.equal(kept[where], row[0].double()[where])
    for size in bound.blocks:
        block, chosen = row[0, start : start + size].abs(), where[start : start + size]
        assert int(chosen.sum()) <= max(1, round(ratio * size))
        if chosen.any() and not chosen.all():
            assert block[chosen].min() >= block[~chosen].max()
        start += size


@given(data=st.data(), layers=layers_of, ratio=ratios, scope=scopes, seed=seeds)
def test_adding_with_a_weight_is_adding_the_weighted_vector(
    data: st.DataObject, layers: list[Layer], ratio: float, scope: Scope, seed: int
) -> None:
    row = draw_rows(data, layers, 1)
    for name in MAKE:
        bound = MAKE[name](ratio, scope).bind(layers, row)
        message = bound.pack(row, [seed])[0]
        weighted = torch.zeros(bound.width)
        bound.unpack(message, seed).add_to_(weighted, weight=-0.5)
        assert torch.equal(weighted.double(), -0.5 * dense(bound, message, seed)), name

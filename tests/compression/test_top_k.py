"""The selection of the largest entries against a full sort."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_fed.compression import Layer, SparseVector, TopK, top_k
from lightning_fed.compression.top_k import top_k_indices

LONG = 200_003


def by_sorting(rows: np.ndarray, k: int) -> np.ndarray:
    """By magnitude, then by index."""
    order = np.argsort(-np.abs(rows.astype(np.float64)), axis=1, kind="stable")
    return np.sort(order[:, :k], axis=1)


def check(rows: np.ndarray, k: int) -> None:
    indices = top_k_indices(torch.from_numpy(rows), k)
    assert indices.dtype == torch.int64
    np.testing.assert_array_equal(indices.numpy(), by_sorting(rows, k))


few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, 3e38])
any_values = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(
    rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 300)), elements=few_values | any_values),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_short_rows_with_ties(rows: np.ndarray, data: st.DataObject) -> None:
    check(rows, data.draw(st.integers(1, rows.shape[1])))


@given(
    rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(40, 400)), elements=few_values | any_values),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_way_of_long_rows_on_rows_with_ties(rows: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, rows.shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "SAMPLED_WIDTH", 1)
        patch.setattr(top_k, "CACHED", 64)
        check(rows, k)


def normal(draw: np.random.Generator) -> np.ndarray:
    return draw.standard_normal(LONG, dtype=np.float32)


LONG_ROWS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": normal,
    "zeros": lambda draw: np.zeros(LONG, np.float32),
    "equal": lambda draw: np.full(LONG, -3, np.float32),
    "heavy tails": lambda draw: draw.standard_cauchy(LONG).astype(np.float32) ** 3,
    "few non-zero": lambda draw: np.where(draw.random(LONG) < 3e-4, normal(draw), np.float32(0)),
    "few levels": lambda draw: draw.integers(-3, 4, LONG).astype(np.float32),
    "ascending": lambda draw: np.sort(normal(draw)),
    "descending": lambda draw: -np.sort(-np.abs(normal(draw))),
    "double": lambda draw: draw.standard_normal(LONG),
}


@pytest.mark.parametrize("k", [1, 200, 20_000, 150_000, LONG])
@pytest.mark.parametrize("name", LONG_ROWS)
def test_long_rows(name: str, k: int) -> None:
    check(LONG_ROWS[name](np.random.default_rng(k))[None], k)


@pytest.mark.parametrize("name", LONG_ROWS)
def test_the_way_of_other_devices_than_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_k, "_on_cpu", lambda tensor: False)
    row = LONG_ROWS[name](np.random.default_rng(0))
    for k in (200, 150_000):
        check(row[None], k)
    check(row[:3000].reshape(3, -1), 100)


@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_a_row_that_misleads_the_sample(rest: float) -> None:
    sampled = np.arange(top_k.LARGEST_SAMPLE) * top_k.STRIDE % LONG
    row = np.full(LONG, rest, np.float32)
    row[sampled[:24_000]] = np.linspace(5, 6, 24_000, dtype=np.float32)
    for k in (100, 24_000, 30_000):
        check(row[None], k)
        check((1 / (1 + row))[None], k)


def test_ties_below_the_sampled_threshold() -> None:
    row = np.zeros(LONG, np.float32)
    row[np.arange(top_k.LARGEST_SAMPLE) * top_k.STRIDE % LONG] = np.linspace(5, 6, top_k.LARGEST_SAMPLE)
    for k in (top_k.LARGEST_SAMPLE // 2, top_k.LARGEST_SAMPLE + 1, LONG - 5):
        check(row[None], k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1000, LONG])
def test_half_precision_has_many_ties(dtype: torch.dtype, width: int) -> None:
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = by_sorting(rows.double().numpy(), width // 3)
    np.testing.assert_array_equal(top_k_indices(rows, width // 3).numpy(), expected)


def test_rows_are_left_alone_and_need_not_be_contiguous() -> None:
    table = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    before = table.clone()
    np.testing.assert_array_equal(top_k_indices(table.T, 9).numpy(), by_sorting(before.T.numpy(), 9))
    assert torch.equal(table, before)


def test_stretches_of_a_long_row_may_be_empty() -> None:
    row = torch.zeros(1, 5 * 65_536 + 3)
    places = [65_535, 65_536, 65_537, 3 * 65_536, 3 * 65_536 + 65_535, 5 * 65_536 + 2]
    row[0, places] = torch.arange(1.0, 7.0)
    bound = TopK(len(places) / row.numel()).bind([Layer("all", row[0].shape)], row)
    message = bound.pack(row, [0])[0]
    assert len(message) == 6 * (4 + 2) + 4 * 6
    assert message[36:].view(torch.int32).tolist() == [1, 2, 0, 2, 0, 1]
    vector = bound.unpack(message, 0)
    assert isinstance(vector, SparseVector)
    assert vector.indices.tolist() == places and vector.values.tolist() == [1, 2, 3, 4, 5, 6]

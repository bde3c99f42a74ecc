"""Compressors: their bytes, what comes back, and what the theory says about it.

What comes back is compared with transcriptions in NumPy that read the documented wire format byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fed.compression import (
    Compressor,
    DenseVector,
    Identity,
    Layer,
    LowRank,
    Quantize,
    RandK,
    ScaledSign,
    SparseVector,
    TopK,
    quantization,
)

LAYERS = [Layer("conv", torch.Size([6, 2, 3, 3])), Layer("bias", torch.Size([7])), Layer("head", torch.Size([12, 9]))]
SIZES = [108, 7, 108]
WIDTH = 223
SEEDS = [11, 2**62 + 5, 3]

Make = Callable[[], Compressor]
CASES: dict[str, Make] = {
    "Identity": Identity,
    "TopK": lambda: TopK(0.1),
    "TopK by layers": lambda: TopK(0.1, scope="layer"),
    "TopK whole": lambda: TopK(1.0),
    "RandK": lambda: RandK(0.1),
    "RandK by layers": lambda: RandK(0.1, scope="layer"),
    "RandK few": lambda: RandK(0.01),
    "RandK most": lambda: RandK(0.9),
    "RandK unbiased": lambda: RandK(0.3, scope="layer", unbiased=True),
    "ScaledSign": ScaledSign,
    "ScaledSign by layers": lambda: ScaledSign(scope="layer"),
    "Quantize": lambda: Quantize(bucket_size=50),
    "Quantize by layers": lambda: Quantize(bits=3, scope="layer", bucket_size=50),
    "Quantize one bucket": lambda: Quantize(bits=8, bucket_size=None),
    "Quantize one bit": lambda: Quantize(bits=1, bucket_size=16),
    "Quantize unbiased": lambda: Quantize(bits=2, unbiased=True, bucket_size=50),
    "LowRank": lambda: LowRank(2),
}
BYTES: dict[str, Callable[[int], int]] = {
    "Identity": lambda item: 223 * item,
    "TopK": lambda item: 22 * (item + 2) + 4,
    "TopK by layers": lambda item: (11 + 1 + 11) * (item + 2) + 4,
    "TopK whole": lambda item: 223 * (item + 2) + 4,
    "RandK": lambda item: 22 * item,
    "RandK by layers": lambda item: (11 + 1 + 11) * item,
    "RandK few": lambda item: 2 * item,
    "RandK most": lambda item: 201 * item,
    "RandK unbiased": lambda item: (32 + 2 + 32) * item,
    "ScaledSign": lambda item: 28 + item,
    "ScaledSign by layers": lambda item: 28 + 3 * item,
    "Quantize": lambda item: 5 * item + 112,
    "Quantize by layers": lambda item: (3 + 1 + 3) * item + 84,
    "Quantize one bucket": lambda item: item + 223,
    "Quantize one bit": lambda item: 14 * item + 28,
    "Quantize unbiased": lambda item: 5 * item + 56,
    "LowRank": lambda item: (2 * (6 + 18) + 7 + 2 * (12 + 9)) * item,
}

each_case = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random_rows(count: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows whose entries are of very different sizes, a few of them zero."""
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    rows[:, ::17] = 0
    return rows.to(dtype)


def one_layer(size: int) -> list[Layer]:
    return [Layer("all", torch.Size([size]))]


def dense(compressor: Compressor, message: Tensor, seed: int) -> Tensor:
    """C(v), added to a row of zeros."""
    row = torch.zeros(compressor.width, dtype=compressor.dtype)
    compressor.unpack(message, seed).add_to_(row)
    return row


def send(compressor: Compressor, rows: Tensor, seeds: list[int]) -> np.ndarray:
    messages = compressor.pack(rows, seeds)
    return torch.stack([dense(compressor, *sent) for sent in zip(messages, seeds)]).double().numpy()


def draws(compressor: Compressor, row: Tensor, count: int) -> np.ndarray:
    """C(v) for as many seeds, ``[count, P]``."""
    return send(compressor, row.expand(count, -1), np.random.default_rng(1).integers(2**62, size=count).tolist())


# -------------------------------------------------------------------------------------------------- of every compressor


@each_dtype
@each_case
def test_bytes(name: str, dtype: torch.dtype) -> None:
    rows = random_rows(dtype=dtype)
    bound = CASES[name]().bind(LAYERS, rows)
    messages = bound.pack(rows, SEEDS)
    assert messages.dtype == torch.uint8
    assert messages.shape == (3, bound.message_bytes) == (3, BYTES[name](dtype.itemsize))


@each_dtype
@each_case
def test_a_message_does_not_depend_on_the_rows_packed_with_it(name: str, dtype: torch.dtype) -> None:
    rows = random_rows(dtype=dtype)
    together = CASES[name]().bind(LAYERS, rows)
    alone = [CASES[name]().bind(LAYERS, rows[:1]) for _ in rows]
    for _ in range(3):  # a warm start goes along
        messages = together.pack(rows, SEEDS)
        for row, seed, message, single in zip(rows, SEEDS, messages, alone):
            assert torch.equal(single.pack(row[None], [seed])[0], message)


@each_case
def test_a_message_does_not_depend_on_the_number_of_threads(name: str) -> None:
    layers = [Layer("w", torch.Size([400, 300])), Layer("b", torch.Size([400]))]
    rows = torch.randn(3, 120_400, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    if name == "LowRank":
        layers = LAYERS  # whose products are too small to be shared among threads
        rows = random_rows()
    try:
        torch.set_num_threads(1)
        expected = CASES[name]().bind(layers, rows).pack(rows, SEEDS)
        torch.set_num_threads(3)
        assert torch.equal(CASES[name]().bind(layers, rows[:1]).pack(rows[:1], SEEDS[:1]), expected[:1])
        assert torch.equal(CASES[name]().bind(layers, rows).pack(rows, SEEDS), expected)
    finally:
        torch.set_num_threads(threads)


@each_case
def test_unpacking_depends_on_the_message_alone(name: str) -> None:
    rows = random_rows()
    bound = CASES[name]().bind(LAYERS, rows)
    messages = bound.pack(rows, SEEDS)
    first = [dense(bound, *sent) for sent in zip(messages, SEEDS)]
    bound.pack(rows.flip(1), [7, 8, 9])
    receiver = CASES[name]().bind(LAYERS, rows[:1])
    shifted = torch.cat([messages.new_zeros(3, 1), messages], dim=1)[:, 1:]
    for message, seed, expected in zip(shifted, SEEDS, first):
        assert torch.equal(dense(bound, message, seed), expected)
        assert torch.equal(dense(receiver, message, seed), expected)


@each_case
def test_packing_leaves_the_rows_as_they_are(name: str) -> None:
    rows = random_rows()
    CASES[name]().bind(LAYERS, rows).pack(rows, SEEDS)
    assert torch.equal(rows, random_rows())


@each_case
def test_zeros_come_back_as_zeros(name: str) -> None:
    rows = torch.zeros(2, WIDTH)
    assert not send(CASES[name]().bind(LAYERS, rows), rows, [0, 1]).any()


@each_case
def test_a_vector_of_one_entry(name: str) -> None:
    rows = torch.tensor([[-2.5], [0.0], [1e-30]])
    bound = CASES[name]().bind(one_layer(1), rows)
    assert bound.pack(rows, SEEDS).shape == (3, bound.message_bytes)
    if bound.is_contractive:
        lost = np.square(send(bound, rows, SEEDS) - rows.double().numpy())
        assert (lost <= (1 - bound.delta) * np.square(rows.double().numpy()) * (1 + 1e-6)).all()


@each_case
def test_weights(name: str) -> None:
    rows = random_rows()
    bound = CASES[name]().bind(LAYERS, rows)
    vector = bound.unpack(bound.pack(rows, SEEDS)[0], SEEDS[0])
    row = rows[1].clone()
    vector.add_to_(row, weight=-0.5)
    once = torch.zeros(WIDTH)
    vector.add_to_(once)
    torch.testing.assert_close(row, rows[1] - 0.5 * once)
    sparse = name.startswith(("TopK", "RandK"))
    assert isinstance(vector, SparseVector if sparse else DenseVector)


@each_case
def test_binding_leaves_the_settings_alone(name: str) -> None:
    compressor = CASES[name]()
    rows = random_rows()
    first = compressor.bind(LAYERS, rows)
    again = compressor.bind(LAYERS, rows)
    assert torch.equal(first.pack(rows, SEEDS), again.pack(rows, SEEDS))
    assert compressor.width == 0 and compressor.state is None
    assert repr(first) == repr(compressor) and str(eval(repr(compressor))) == repr(compressor)


@each_case
def test_contraction(name: str) -> None:
    rows = random_rows(1, torch.float64)
    bound = CASES[name]().bind(LAYERS, rows)
    if not bound.is_contractive:
        assert bound.delta == 0 and "unbiased" in name
        return
    lost = np.square(draws(bound, rows[0], 400) - rows.numpy()) if name != "LowRank" else None
    if lost is None:
        lost = np.square(send(bound, rows, [0]) - rows.numpy())
    lost = lost.sum(axis=1)
    standard_error = lost.std() / math.sqrt(len(lost))
    assert lost.mean() <= (1 - bound.delta) * float(rows.square().sum()) * (1 + 1e-9) + 4 * standard_error


@each_case
def test_half_precision(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        rows = random_rows(dtype=dtype)
        bound = CASES[name]().bind(LAYERS, rows)
        assert bound.message_bytes == BYTES[name](2)
        assert np.isfinite(send(bound, rows, SEEDS)).all()


def test_half_precision_decodes_all_levels_exactly() -> None:
    rows = torch.linspace(-1, 1, WIDTH, dtype=torch.bfloat16)[None]
    bound = Quantize(8, bucket_size=None).bind(one_layer(WIDTH), rows)
    message = torch.cat([torch.tensor([3.0], dtype=torch.bfloat16).view(torch.uint8), torch.arange(WIDTH).byte()])
    expected = 3.0 * (2 * np.arange(WIDTH) / 254 - 1) / (1 + bound.omega(WIDTH))
    # Half a unit of the last of bfloat16's eight bits is 2^-9 of the number, at most 2^-8 of what is below it.
    np.testing.assert_allclose(dense(bound, message, 0).double().numpy(), expected, rtol=2**-8, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- sparse ones


def kept_largest(row: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(row)
    places = np.argsort(-np.abs(row), kind="stable")[:k]
    out[places] = row[places]
    return out


@each_dtype
def test_top_k_keeps_the_largest(dtype: torch.dtype) -> None:
    rows = random_rows(dtype=dtype)
    expected = rows.double().numpy()
    whole = send(TopK(0.1).bind(LAYERS, rows), rows, SEEDS)
    np.testing.assert_array_equal(whole, [kept_largest(row, 22) for row in expected])
    blocks = np.split(expected, [108, 115], axis=1)
    by_layers = [np.concatenate([kept_largest(b[i], k) for b, k in zip(blocks, (11, 1, 11))]) for i in range(3)]
    np.testing.assert_array_equal(send(TopK(0.1, scope="layer").bind(LAYERS, rows), rows, SEEDS), by_layers)


def test_top_k_is_a_projection() -> None:
    rows = random_rows()
    bound = TopK(0.1, scope="layer").bind(LAYERS, rows)
    once = send(bound, rows, SEEDS)
    np.testing.assert_array_equal(send(bound, torch.from_numpy(once).float(), SEEDS), once)


def test_top_k_loses_most_where_all_are_equal() -> None:
    rows = torch.ones(1, WIDTH)
    bound = TopK(0.1).bind(LAYERS, rows)
    assert ((send(bound, rows, [0]) - 1) ** 2).sum() == pytest.approx((1 - bound.delta) * WIDTH)


def test_delta_of_sparse_ones_is_that_of_the_worst_block() -> None:
    rows = random_rows()
    for kind in (TopK, RandK):
        assert kind(0.1).bind(LAYERS, rows).delta == 22 / 223
        assert kind(0.1, scope="layer").bind(LAYERS, rows).delta == 11 / 108
        assert kind(0.004).bind(LAYERS, rows).delta == 1 / 223
        assert kind(1.0).bind(LAYERS, rows).delta == 1


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5, 0.8, 1.0])
def test_rand_k_draws_distinct_entries_without_preference(ratio: float) -> None:
    size, count = 50, 2000
    row = torch.arange(1.0, size + 1)
    bound = RandK(ratio).bind(one_layer(size), row[None])
    sent = draws(bound, row, count)
    assert ((sent == 0) | (sent == row.numpy())).all()
    kept = round(ratio * size)
    assert ((sent != 0).sum(axis=1) == kept).all()
    share = kept / size
    often = (sent != 0).mean(axis=0)
    assert np.abs(often - share).max() <= 4.5 * math.sqrt(share * (1 - share) / count)
    pairs = (sent != 0).astype(float).T @ (sent != 0) / count
    together = share * (kept - 1) / (size - 1)
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    assert np.abs(off_diagonal - together).max() <= 5.5 * math.sqrt(together * (1 - together) / count)


def test_rand_k_sends_ascending_entries_of_every_layer() -> None:
    rows = random_rows()
    bound = RandK(0.1, scope="layer").bind(LAYERS, rows)
    messages = bound.pack(rows, SEEDS)
    all_indices = []
    for row, message, seed in zip(rows, messages, SEEDS):
        vector = bound.unpack(message, seed)
        assert isinstance(vector, SparseVector)
        assert (vector.indices.diff() > 0).all()
        assert np.histogram(vector.indices.numpy(), [0, 108, 115, 223])[0].tolist() == [11, 1, 11]
        assert torch.equal(message.view(torch.float32), row[vector.indices])
        assert torch.equal(vector.values, row[vector.indices])
        all_indices.append(vector.indices.tolist())
    assert all_indices[0] != all_indices[1] != all_indices[2]


@pytest.mark.parametrize("make", [lambda: RandK(0.3, "layer", unbiased=True), lambda: Quantize(2, "model", 60, True)])
def test_unbiased_ones_are_right_on_average(make: Make) -> None:
    row = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64) * (-1) ** torch.arange(WIDTH)
    bound = make().bind(LAYERS, row[None])
    assert not bound.is_contractive
    sent = draws(bound, row, 1500)
    error = sent.std(axis=0) / math.sqrt(len(sent))
    assert (np.abs(sent.mean(axis=0) - row.numpy()) <= 4.5 * error + 1e-12).all()


def test_unbiased_rand_k_is_scaled_by_layer() -> None:
    rows = random_rows(1)
    plain = send(RandK(0.3, "layer").bind(LAYERS, rows), rows, [4])[0]
    unbiased = send(RandK(0.3, "layer", unbiased=True).bind(LAYERS, rows), rows, [4])[0]
    np.testing.assert_allclose(unbiased, plain * np.repeat([108 / 32, 7 / 2, 108 / 32], SIZES), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- quantized ones


def bits_of(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    stream = np.unpackbits(data, bitorder="little")[: bits * count].reshape(count, bits)
    return (stream * 2 ** np.arange(bits)).sum(axis=1)


@each_dtype
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_scaled_sign(scope: Any, dtype: torch.dtype) -> None:
    rows = random_rows(dtype=dtype)
    rows[0, 0] = -0.0
    bound = ScaledSign(scope).bind(LAYERS, rows)
    messages = bound.pack(rows, SEEDS).numpy()
    sizes = [WIDTH] if scope == "model" else SIZES
    numpy_type = rows.numpy().dtype
    for row, message, sent in zip(rows.numpy(), messages, send(bound, rows, SEEDS)):
        scales = message[28:].copy().view(numpy_type)
        means = [np.abs(part).mean() for part in np.split(row, np.cumsum(sizes)[:-1])]
        np.testing.assert_allclose(scales, means, rtol=1e-6)
        signs = 2.0 * bits_of(message[:28], 1, WIDTH) - 1
        np.testing.assert_array_equal(signs, np.where(row >= 0, 1, -1))
        np.testing.assert_array_equal(sent, signs * np.repeat(scales, sizes))


def test_scaled_sign_loses_most_with_one_entry() -> None:
    rows = torch.zeros(1, WIDTH, dtype=torch.float64)
    rows[0, 115] = 3.0
    for scope, largest in (("model", WIDTH), ("layer", 108)):
        bound = ScaledSign(scope).bind(LAYERS, rows)
        assert bound.delta == 1 / largest
        lost = np.square(send(bound, rows, [0]) - rows.numpy()).sum()
        assert lost == pytest.approx((1 - bound.delta) * 9)


def cut(sizes: list[int], bucket: int | None) -> list[int]:
    """Lengths of the buckets."""
    return [min(bucket or size, size - start) for size in sizes for start in range(0, size, bucket or size)]


@each_dtype
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize(("bits", "bucket"), [(1, 16), (2, None), (3, 50), (4, 7), (5, 1), (8, 512)])
def test_quantize_decodes_its_message(bits: int, bucket: int | None, scope: Any, dtype: torch.dtype) -> None:
    rows = random_rows(dtype=dtype)
    bound = Quantize(bits, scope, bucket, unbiased=True).bind(LAYERS, rows)
    shrunk = Quantize(bits, scope, bucket).bind(LAYERS, rows)
    messages = bound.pack(rows, SEEDS)
    assert torch.equal(messages, shrunk.pack(rows, SEEDS))
    buckets = cut([WIDTH] if scope == "model" else SIZES, bucket)
    intervals = max(2**bits - 2, 1)
    shrink = np.repeat([1 / (1 + shrunk.omega(size)) for size in buckets], buckets)
    for row, message, seed in zip(rows.numpy(), messages, SEEDS):
        head = len(buckets) * dtype.itemsize
        norms = message.numpy()[:head].copy().view(row.dtype)
        exact_norms = [np.linalg.norm(part) for part in np.split(row, np.cumsum(buckets)[:-1])]
        np.testing.assert_allclose(norms, exact_norms, rtol=1e-6)
        codes = bits_of(message.numpy()[head:], bits, WIDTH)
        norm = np.repeat(norms.astype(np.float64), buckets)
        with np.errstate(invalid="ignore"):
            position = np.where(norm > 0, (row / norm + 1) / 2, 0.5) * intervals
        assert codes.min() >= 0 and codes.max() <= intervals
        assert (np.abs(codes - position) < 1 + 1e-4).all()
        decoded = (2 * codes / intervals - 1) * norm
        np.testing.assert_allclose(dense(bound, message, seed).numpy(), decoded, rtol=1e-5)
        np.testing.assert_allclose(dense(shrunk, message, seed).numpy(), decoded * shrink, rtol=1e-5)
        if bits > 1:
            assert not dense(shrunk, message, seed).numpy()[row == 0].any()


def test_quantize_rounds_up_as_often_as_it_should() -> None:
    row = torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64) * 5
    bound = Quantize(3, unbiased=True).bind(one_layer(3), row[None])
    sent = draws(bound, row, 2000)
    assert sorted({round(value, 9) for value in sent[:, 0]}) == [round(5 / 3, 9), round(10 / 3, 9)]
    assert sorted({round(value, 9) for value in sent[:, 1]}) == [-5, round(-10 / 3, 9)]
    assert not sent[:, 2].any()
    assert (sent[:, 0] > 2).mean() == pytest.approx(0.8, abs=4.5 * math.sqrt(0.16 / 2000))
    assert (sent[:, 1] < -4).mean() == pytest.approx(0.4, abs=4.5 * math.sqrt(0.24 / 2000))


def test_quantize_leaves_levels_alone_whatever_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.tensor([[0.0, 0.0, -4.0, 0.0]])
    for draw in (0.0, 1 - 2**-24):
        monkeypatch.setattr(quantization, "_uniform", lambda seed, count, dtype, draw=draw: torch.full((count,), draw))
        np.testing.assert_array_equal(send(Quantize(4, unbiased=True).bind(one_layer(4), row), row, [0]), row.numpy())


@pytest.mark.parametrize(("bits", "size"), [(1, 1), (1, 40), (2, 4), (2, 64), (3, 50), (4, 1), (4, 100), (4, 512)])
def test_the_variance_of_quantize_is_below_omega(bits: int, size: int) -> None:
    quantize = Quantize(bits, bucket_size=None, unbiased=True)
    omega = quantize.omega(size)
    levels = max(2**bits - 2, 1) / 2
    if bits > 1:
        assert omega <= min(size / levels**2, math.sqrt(size) / levels)
    vectors = [np.ones(size), np.arange(size) + 1.0, np.eye(size)[0] + 1e-3, np.random.default_rng(0).normal(size=size)]
    for vector in vectors:
        row = torch.from_numpy(vector / np.linalg.norm(vector))
        lost = np.square(draws(quantize.bind(one_layer(size), row[None]), row, 500) - row.numpy()).sum(axis=1)
        slack = 4 * lost.std() / math.sqrt(500) + 1e-9
        assert lost.mean() <= omega + slack
        if vector is vectors[0] and (bits == 1 or math.sqrt(size) >= 2 * levels):
            assert lost.mean() >= omega - slack


def test_omega_and_delta_of_quantize() -> None:
    rows = random_rows()
    assert Quantize(1).omega(40) == 39
    assert Quantize(2).omega(64) == 7 and Quantize(2).omega(4) == 1
    assert Quantize(3).omega(9) == pytest.approx(0.25) and Quantize(4).omega(784) == 3
    assert Quantize(2, bucket_size=64).bind(LAYERS, rows).delta == 1 / 8
    assert Quantize(2, "layer", bucket_size=None).bind(LAYERS, rows).delta == pytest.approx(1 / math.sqrt(108))


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_quantize_of_numbers_whose_squares_leave_the_range(scale: float) -> None:
    rows = random_rows() * scale
    sent = send(Quantize(8, bucket_size=50).bind(LAYERS, rows), rows, SEEDS) / scale
    np.testing.assert_allclose(
        sent, send(Quantize(8, bucket_size=50).bind(LAYERS, rows / scale), rows / scale, SEEDS), rtol=0, atol=0.2
    )
    assert sent.any()


# ------------------------------------------------------------------------------------------------------------- low rank


def matrices(row: np.ndarray) -> list[np.ndarray]:
    return [row[:108].reshape(6, 18), row[115:].reshape(12, 9)]


def test_low_rank_is_the_product_of_its_factors() -> None:
    rows = random_rows(dtype=torch.float64)
    bound = LowRank(2).bind(LAYERS, rows)
    assert bound.state is not None
    start = bound.state.clone()
    assert start.shape == (3, 2 * (18 + 9)) and torch.equal(start[0], start[2])
    for message, row, sent, q in zip(bound.pack(rows, SEEDS), rows.numpy(), [*range(3)], start.numpy()):
        numbers = message.view(torch.float64).numpy()
        out = dense(bound, message, 0).numpy()
        np.testing.assert_array_equal(numbers[48:55], row[108:115])
        np.testing.assert_array_equal(out[108:115], row[108:115])
        for matrix, result, factors, q0 in zip(
            matrices(row), matrices(out), [numbers[:48], numbers[55:]], [q[:36].reshape(18, 2), q[36:].reshape(9, 2)]
        ):
            basis, factor = factors[: 2 * len(matrix)].reshape(-1, 2), factors[2 * len(matrix) :].reshape(-1, 2)
            np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-12)
            expected = np.linalg.qr(matrix @ q0)[0]
            np.testing.assert_allclose(expected @ expected.T @ matrix, basis @ factor.T, atol=1e-9)
            np.testing.assert_allclose(factor, matrix.T @ basis, atol=1e-9)
            np.testing.assert_allclose(result, basis @ factor.T, atol=1e-12)
        kept = np.concatenate(
            [m.T @ f.reshape(-1, 2) for m, f in zip(matrices(row), [numbers[:12], numbers[91 - 36 :][:24]])]
        )
        np.testing.assert_allclose(bound.state[sent].numpy(), kept.ravel(), atol=1e-9)


def test_low_rank_never_expands() -> None:
    rows = random_rows(dtype=torch.float64)
    bound = LowRank(2).bind(LAYERS, rows)
    assert bound.delta == 0 and bound.is_contractive
    sent, original = send(bound, rows, SEEDS), rows.numpy()
    lost = np.square(sent - original).sum(axis=1)
    np.testing.assert_allclose(lost, np.square(original).sum(axis=1) - np.square(sent).sum(axis=1), rtol=1e-9)
    assert (lost > 0).all()


def test_low_rank_of_the_same_matrix_becomes_its_best_approximation() -> None:
    rows = random_rows(2, dtype=torch.float64)
    bound = LowRank(2).bind(LAYERS, rows)
    errors = []
    for _ in range(60):
        sent = send(bound, rows, SEEDS[:2])
        errors.append(np.square(sent - rows.numpy()).sum())
    for row, out in zip(rows.numpy(), sent):
        for matrix, result in zip(matrices(row), matrices(out)):
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            np.testing.assert_allclose(result, left[:, :2] * values[:2] @ right[:2], atol=1e-6)
    assert errors[-1] < 0.9 * errors[0] and all(b <= a + 1e-9 for a, b in pairwise(errors))


def test_low_rank_recovers_from_zeros_in_its_first_matrix_rows() -> None:
    rows = torch.zeros(1, WIDTH, dtype=torch.float64)
    bound = LowRank(2).bind(LAYERS, rows)
    assert bound.state is not None
    start = bound.state.clone()
    send(bound, rows, [0])
    assert torch.equal(bound.state, start)
    rows[0, 115 + 90 :] = 1.0  # the last two rows of the last matrix, of rank one
    np.testing.assert_allclose(send(bound, rows, [0]), rows.numpy(), atol=1e-12)


def test_what_low_rank_would_not_shorten_travels_whole() -> None:
    layers = [Layer("square", torch.Size([4, 4])), Layer("thin", torch.Size([3, 4])), Layer("scalar", torch.Size([]))]
    rows = torch.randn(1, 29, generator=torch.Generator().manual_seed(0))
    bound = LowRank(2).bind(layers, rows)
    assert bound.message_bytes == 4 * 29
    np.testing.assert_array_equal(send(bound, rows, [0]), rows.double().numpy())


def test_low_rank_warm_starts_belong_to_the_rows_it_was_bound_to() -> None:
    rows = random_rows()
    bound = LowRank(2).bind(LAYERS, rows)
    with pytest.raises(ValueError, match="bound to 3 rows and keeps a warm start of each, but got 2"):
        bound.pack(rows[:2], SEEDS[:2])


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_rank_above_a_side_is_refused_by_name() -> None:
    rows = random_rows()
    LowRank(6).bind(LAYERS, rows)
    message = r"rank=7 of LowRank is larger than a side of layer 'conv' of shape \(6, 2, 3, 3\), .* rank of at most 6"
    with pytest.raises(ValueError, match=message):
        LowRank(7).bind(LAYERS, rows)
    with pytest.raises(ValueError, match=r"layer 'thin' of shape \(3, 4\), .* at most 3, or another compressor"):
        LowRank(4).bind([Layer("thin", torch.Size([3, 4]))], torch.zeros(1, 12))

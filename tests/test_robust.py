"""Robust rules against their equations in float64 NumPy, and against rows that are far away.

The transcriptions between the two rules see the rows themselves, and know neither torch nor this package.
Shapes: K = rows, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fed.federation.exchange import LoopbackExchange
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.robust_mixing import COLUMNS, robust_average, robust_mix_
from lightning_fed.robust import CoordinateMedian, GeometricMedian, Krum, NearestNeighborAverage, RobustMix, TrimmedMean

# ------------------------------------------------------------------------------------------------------- the papers


def median(X: np.ndarray) -> np.ndarray:
    """Yin et al. 2018, Definition 1."""
    return np.median(X, axis=0)


def trimmed_mean(X: np.ndarray, f: int) -> np.ndarray:
    """The same, Definition 2: column by column, without the f smallest and the f largest."""
    return np.array([np.mean(np.sort(column)[f : len(column) - f]) for column in X.T])


def weiszfeld(X: np.ndarray, iterations: int, nu: float, a: np.ndarray | None = None) -> np.ndarray:
    """Pillutla et al. 2022, Algorithm 2, on the points themselves."""
    a = np.full(len(X), 1 / len(X)) if a is None else a
    z = a @ X
    for _ in range(iterations):
        b = a / np.maximum(nu, np.linalg.norm(X - z, axis=1))
        z = b @ X / b.sum()
    return z


def krum(X: np.ndarray, f: int, m: int = 1) -> np.ndarray:
    """Blanchard et al. 2017: the sum over the K - f - 2 closest others."""
    scores = []
    for i in range(len(X)):
        others = sorted(float(np.sum((X[i] - X[j]) ** 2)) for j in range(len(X)) if j != i)
        scores.append(sum(others[: len(X) - f - 2]))
    return X[np.argsort(scores)[:m]].mean(axis=0)


def nearest(X: np.ndarray, f: int, own: int) -> np.ndarray:
    """Farhadkhani et al. 2023: the mean of the K - f nearest to the own row."""
    order = sorted(range(len(X)), key=lambda j: float(np.linalg.norm(X[j] - X[own])))
    return X[order[: len(X) - f]].mean(axis=0)


# -------------------------------------------------------------------------------------------------------- the tests

RULES: dict[str, tuple[RobustMix, Callable[[np.ndarray], np.ndarray]]] = {
    "median": (CoordinateMedian(), median),
    "trimmed mean": (TrimmedMean(3), lambda X: trimmed_mean(X, 3)),
    "geometric median": (GeometricMedian(), lambda X: weiszfeld(X, 100, 1e-6)),
    "four iterations": (GeometricMedian(4, 0.5), lambda X: weiszfeld(X, 4, 0.5)),
    "krum": (Krum(3), lambda X: krum(X, 3)),
    "multi-krum": (Krum(3, selected=4), lambda X: krum(X, 3, 4)),
}


def at_server(rule: RobustMix, X: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    exchange = LoopbackExchange(Layout(len(X)))
    weights = np.full(len(X), 1 / len(X)) if weights is None else weights
    return robust_average(rule, torch.from_numpy(X.copy()), weights, exchange).numpy()


def in_gossip(rule: RobustMix, X: np.ndarray, W: np.ndarray | None = None) -> np.ndarray:
    rows = torch.from_numpy(X.copy())
    W = np.full((len(X), len(X)), 1 / len(X)) if W is None else W
    robust_mix_(rule, rows, W, LoopbackExchange(Layout(len(X))))
    return rows.numpy()


def points(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width))


@pytest.mark.parametrize("rows", [9, 12])
@pytest.mark.parametrize("width", [7, COLUMNS + 905])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_papers(name: str, width: int, rows: int) -> None:
    rule, paper = RULES[name]
    X = points(rows, width)
    np.testing.assert_allclose(at_server(rule, X), paper(X), rtol=0, atol=1e-10)
    np.testing.assert_allclose(in_gossip(rule, X), np.tile(paper(X), (rows, 1)), rtol=0, atol=1e-10)


def test_nearest_neighbors_are_those_of_the_own_row() -> None:
    X = points(9, 30)
    np.testing.assert_allclose(
        in_gossip(NearestNeighborAverage(3), X), [nearest(X, 3, own) for own in range(9)], rtol=0, atol=1e-10
    )


def test_the_geometric_median_weighs_rows_by_their_shares() -> None:
    X, a = points(9, 30), np.arange(1, 10) / 45
    np.testing.assert_allclose(at_server(GeometricMedian(), X, a), weiszfeld(X, 100, 1e-6, a), rtol=0, atol=1e-10)
    for rule in (CoordinateMedian(), Krum(3)):
        np.testing.assert_array_equal(at_server(rule, X, a), at_server(rule, X))


def test_clients_combine_what_they_hear_and_those_who_hear_nobody_keep_their_rows() -> None:
    X, W = points(8, 30), np.eye(8)
    for i in range(7):  # a ring of seven in which the weights differ, one edge is directed, and nobody hears of 7
        W[i, [i, (i + 1) % 7, (i + 2) % 7]] = 0.2, 0.7, 0.1
    W[0, 0] = 0  # one's own row counts in any case
    mixed = in_gossip(CoordinateMedian(), X, W)
    for i in range(7):
        np.testing.assert_allclose(mixed[i], median(X[[i, (i + 1) % 7, (i + 2) % 7]]), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(mixed[7], X[7])
    mixed = in_gossip(NearestNeighborAverage(1), X, W)
    for i in range(7):
        np.testing.assert_allclose(mixed[i], nearest(X[[i, (i + 1) % 7, (i + 2) % 7]], 1, 0), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(mixed[7], X[7])


@pytest.mark.parametrize("far", [1e6, 1e18, 1e200])
@pytest.mark.parametrize("name", [*RULES, "nearest"])
def test_hostile_rows_far_away_leave_the_result_near(name: str, far: float) -> None:
    if name == "four iterations":
        far, bound = min(far, 1e2), 5.0  # too few to forget the mean with which it begins
    else:
        bound = 1.0
    rule = NearestNeighborAverage(3) if name == "nearest" else RULES[name][0]
    X, hostile = points(12, 40), [0, 5, 11]
    rest = np.setdiff1d(np.arange(12), hostile)
    honest = X[rest].mean(axis=0)
    spread = np.linalg.norm(X[rest] - honest, axis=1).max()
    for rows in (np.full((3, 40), far), far * points(3, 40, seed=1)):
        X[hostile] = rows
        results = in_gossip(rule, X)[rest]
        assert np.isfinite(results).all()
        assert np.linalg.norm(results - honest, axis=1).max() <= bound * spread


def test_the_plain_mean_is_moved_as_far_as_one_likes() -> None:
    X = points(12, 40)
    X[0] = 1e6
    assert np.linalg.norm(X.mean(axis=0)) > 1e5


@pytest.mark.parametrize("name", RULES)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(9, 14), width=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_the_order_of_clients_does_not_matter(name: str, seed: int, rows: int, width: int) -> None:
    X, order = points(rows, width, seed), np.random.default_rng(seed).permutation(rows)
    np.testing.assert_allclose(at_server(RULES[name][0], X[order]), at_server(RULES[name][0], X), rtol=0, atol=1e-10)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(7, 12))
@settings(max_examples=25, deadline=None)
def test_the_order_of_clients_does_not_matter_for_nearest_neighbors(seed: int, rows: int) -> None:
    X, order = points(rows, 8, seed), np.random.default_rng(seed).permutation(rows)
    rule = NearestNeighborAverage(3)
    np.testing.assert_allclose(in_gossip(rule, X[order]), in_gossip(rule, X)[order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(1), GeometricMedian(), Krum(1), Krum(1, 2)])
def test_equal_rows_stay(rule: RobustMix) -> None:
    X = np.tile(points(1, 20), (5, 1))
    np.testing.assert_allclose(at_server(rule, X), X[0], rtol=0, atol=1e-15)


def test_a_majority_of_equal_rows_is_their_geometric_median() -> None:
    X = points(9, 20)
    X[:5] = X[0]
    np.testing.assert_allclose(at_server(GeometricMedian(), X), X[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_few_bits_are_combined_in_many(dtype: torch.dtype) -> None:
    X = torch.from_numpy(points(9, 300)).to(dtype)
    for rule, paper in RULES.values():
        result = robust_average(rule, X.clone(), np.full(9, 1 / 9), LoopbackExchange(Layout(9)))
        assert result.dtype == dtype
        expected = torch.from_numpy(paper(X.double().numpy()))
        torch.testing.assert_close(result, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMean(0), "byzantine=0 must be"),
        (lambda: Krum(1.5), "byzantine=1.5 must be"),
        (lambda: Krum(1, selected=0), "selected=0 must be"),
        (lambda: NearestNeighborAverage(-1), "byzantine=-1 must be"),
        (lambda: GeometricMedian(iterations=0), "iterations=0 must be"),
        (lambda: GeometricMedian(smoothing=0.0), "smoothing=0.0 must be"),
    ],
)
def test_a_setting_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "enough"),
    [
        (CoordinateMedian(), 3),
        (GeometricMedian(), 3),
        (TrimmedMean(2), 5),
        (Krum(2), 7),
        (Krum(2, selected=8), 10),
        (NearestNeighborAverage(2), 5),
    ],
)
def test_too_few_rows_are_refused(rule: RobustMix, enough: int) -> None:
    message = rf"robust={type(rule).__name__}.* at least {enough} clients, but only {enough - 1} come together: "
    if not rule.is_centered:
        at_server(rule, points(enough, 3))
        with pytest.raises(ValueError, match=message + "let more clients take part"):
            at_server(rule, points(enough - 1, 3))
    in_gossip(rule, points(enough, 3))
    with pytest.raises(ValueError, match=message + "use a topology of larger degree"):
        in_gossip(rule, points(enough - 1, 3))

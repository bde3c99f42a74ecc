"""Pairs of noise levels against the formulas of their papers, transcribed in plain Python."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_fed.modules.diffusion.noise_pairs import (
    DoublingPairs,
    EasyPairs,
    FixedPairs,
    NoisePairs,
    increasing_grid,
)

LOW, HIGH = 0.002, 80.0
DOUBLE = torch.empty(0, dtype=torch.float64)


def plain_grid(levels: int, rho: float = 7.0) -> list[float]:
    """sigma_i = (sigma_min^(1/rho) + (i - 1) / (N - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho."""
    low, high = LOW ** (1 / rho), HIGH ** (1 / rho)
    return [(low + i / (levels - 1) * (high - low)) ** rho for i in range(levels)]


def plain_probabilities(grid: list[float]) -> list[float]:
    def cumulative(sigma: float) -> float:
        return math.erf((math.log(sigma) + 1.1) / (math.sqrt(2) * 2.0))

    weights = [cumulative(upper) - cumulative(lower) for lower, upper in pairwise(grid)]
    return [weight / sum(weights) for weight in weights]


def index_of(levels: torch.Tensor, grid: list[float]) -> list[int]:
    return torch.searchsorted(torch.tensor(grid, dtype=torch.float64) * (1 - 1e-9), levels, right=True).sub(1).tolist()


# --------------------------------------------------------------------------------------------------------- the schedule


def test_the_levels_double_every_50k_of_400k_steps() -> None:
    pairs, total = DoublingPairs(), 400_000
    starts = [50_000 * stage for stage in range(8)]
    assert [pairs.resolution(k, total) for k in starts] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert [pairs.resolution(k - 1, total) for k in starts[1:]] == [11, 21, 41, 81, 161, 321, 641]
    assert pairs.resolution(total - 1, total) == pairs.resolution(10**9, total) == pairs.finest == 1281


@pytest.mark.parametrize(
    ("smallest", "largest", "total", "changes"),
    [
        (10, 160, 3000, {0: 11, 599: 11, 600: 21, 1200: 41, 1800: 81, 2400: 161, 2999: 161}),
        (10, 100, 1000, {0: 11, 231: 21, 462: 41, 693: 81, 924: 101}),  # K' = floor(1000 / (log2 10 + 1)) = 231
        (3, 20, 3, {0: 4, 1: 7, 2: 13, 3: 21}),  # fewer steps than stages: one each
        (5, 5, 100, {0: 6, 99: 6}),
    ],
)
def test_other_lengths_and_ends(smallest: int, largest: int, total: int, changes: dict[int, int]) -> None:
    pairs = DoublingPairs(smallest, largest)
    assert {step: pairs.resolution(step, total) for step in changes} == changes


def test_the_easy_stages_are_of_equal_length() -> None:
    pairs = EasyPairs()
    assert [pairs.resolution(k, 800) for k in range(0, 800, 100)] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert pairs.resolution(99, 800) == 2
    assert pairs.resolution(5000, 800) == pairs.finest == 256
    assert EasyPairs(q=256, stages=1).resolution(0, 800) == EasyPairs(q=256, stages=1).resolution(799, 800) == 256


def test_fixed_pairs_never_change() -> None:
    assert FixedPairs().resolution(0, 10) == FixedPairs().resolution(9, 10) == FixedPairs().finest == 18


# ------------------------------------------------------------------------------------------------------------ the draws


@pytest.mark.parametrize("levels", [2, 11, 161, 1281])
def test_the_grid_is_that_of_karras(levels: int) -> None:
    grid = increasing_grid(levels, LOW, HIGH)
    torch.testing.assert_close(grid, torch.tensor(plain_grid(levels), dtype=torch.float64), rtol=1e-12, atol=0)
    assert grid[0] == pytest.approx(LOW, rel=1e-14)
    assert grid[-1] == pytest.approx(HIGH, rel=1e-14)


@pytest.mark.parametrize("levels", [2, 11, 161, 1281])
def test_the_law_of_the_index(levels: int) -> None:
    grid = plain_grid(levels)
    ours = DoublingPairs().probabilities(torch.tensor(grid, dtype=torch.float64))
    expected = torch.tensor(plain_probabilities(grid), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("pairs", [DoublingPairs(), FixedPairs()])
def test_pairs_are_neighbours_drawn_by_their_law(pairs: DoublingPairs | FixedPairs) -> None:
    torch.manual_seed(0)
    draws, grid = 20_000, plain_grid(11)
    drawn = pairs.draw(draws, 11, LOW, HIGH, DOUBLE)
    index = index_of(drawn.lower, grid)
    assert index_of(drawn.upper, grid) == [i + 1 for i in index]
    torch.testing.assert_close(drawn.lower, torch.tensor([grid[i] for i in index]).double(), rtol=1e-6, atol=0)
    law = plain_probabilities(grid) if isinstance(pairs, DoublingPairs) else [0.1] * 10
    for i, probability in enumerate(law):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(index.count(i) - draws * probability) <= 5 * deviation + 1e-9
    weight = 1 / (drawn.upper - drawn.lower) if isinstance(pairs, DoublingPairs) else torch.ones(draws).double()
    torch.testing.assert_close(drawn.weight, weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("q", [2, 256])
@pytest.mark.parametrize("stage", [0, 1, 5])
def test_easy_pairs_follow_their_formula(q: int, stage: int) -> None:
    torch.manual_seed(0)
    pairs = EasyPairs(q, stages=8)
    drawn = pairs.draw(20_000, q ** (stage + 1), LOW, HIGH, DOUBLE)
    for b, a, weight in zip(*(values[:500].tolist() for values in (drawn.upper, drawn.lower, drawn.weight))):
        expected = b * max(0.0, 1 - (1 + 8 / (1 + math.exp(b))) / q ** (stage + 1))
        assert a == pytest.approx(expected if expected > LOW else 0.0, rel=1e-12)
        assert weight == pytest.approx(1 / (b - a), rel=1e-9)
    inside = drawn.upper[drawn.upper > LOW].log()
    assert float(inside.mean()) == pytest.approx(-1.1, abs=0.1)
    assert float(inside.std()) == pytest.approx(2.0, abs=0.1)
    # The boundary condition's factors would have the wrong sign below sigma_min.
    assert drawn.upper.min() == LOW
    assert not ((drawn.lower > 0) & (drawn.lower <= LOW)).any()


@pytest.mark.parametrize("pairs", [DoublingPairs(), FixedPairs(), EasyPairs()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_come_from_the_default_generator_in_the_given_type(pairs: NoisePairs, dtype: torch.dtype) -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(pairs.draw(64, pairs.finest, LOW, HIGH, torch.empty(0, dtype=dtype)))

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[1], other[1])
    for values in first:
        assert values.dtype == dtype
        assert values.shape == (64,)
        assert values.isfinite().all()
    assert (first[0] < first[1]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", [DoublingPairs(), FixedPairs(), EasyPairs()])
def test_draws_on_a_gpu_use_its_generator(pairs: NoisePairs) -> None:
    before = torch.get_rng_state()
    drawn = pairs.draw(8, pairs.finest, LOW, HIGH, torch.empty(0, device="cuda"))
    assert all(values.is_cuda for values in drawn)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize("pairs", [DoublingPairs(5, 40, -1.0, 1.5), FixedPairs(40), EasyPairs(4, 3, -0.4, 1.0)])
def test_plain_values_mean_the_same_object(pairs: NoisePairs) -> None:
    assert NoisePairs.of(pairs.plain(), "pairs") == pairs
    assert NoisePairs.of(pairs.name, "pairs") == type(pairs)()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("doublin", "did you mean 'doubling'"),
        ({"name": "doubling", "smallest": 0}, "smallest=0"),
        ({"name": "doubling", "smallest": 20, "largest": 10}, "smallest=20, largest=10"),
        ({"name": "doubling", "std": 0.0}, "std=0.0"),
        ({"name": "fixed", "levels": 1}, "levels=1"),
        ({"name": "easy", "q": 1}, "q=1"),
        ({"name": "easy", "stages": 0}, "stages=0"),
        ({"name": "easy", "std": -1.0}, "std=-1.0"),
        ({"name": "easy", "levels": 3}, "has no \\['levels'\\]"),
    ],
)
def test_bad_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisePairs.of(settings, "pairs")

"""Cohorts are a function of (seed, round), fair, and of the promised size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_fed.federation.participation import FullParticipation, UniformSample


def test_full_participation_is_everybody() -> None:
    FullParticipation().validate(1)
    np.testing.assert_array_equal(FullParticipation().cohort(5, 4, seed=1), [0, 1, 2, 3])


def test_a_cohort_is_sorted_and_without_repetition() -> None:
    for round in range(50):
        cohort = UniformSample(6).cohort(round, 10, seed=0)
        assert len(cohort) == 6
        assert cohort.dtype == np.int64
        assert (np.diff(cohort) > 0).all()
        assert cohort[0] >= 0 and cohort[-1] < 10


def test_a_cohort_depends_on_seed_and_round_alone() -> None:
    rule = UniformSample(5)
    later_first = [rule.cohort(round, 100, seed=3) for round in (7, 2)]
    np.random.seed(0)
    for round, cohort in zip((7, 2), later_first):
        np.testing.assert_array_equal(UniformSample(5).cohort(round, 100, seed=3), cohort)
    draws = {tuple(rule.cohort(round, 100, seed)) for round in range(10) for seed in range(10)}
    assert len(draws) == 100


def test_a_pinned_cohort_stays_what_it_is() -> None:
    np.testing.assert_array_equal(UniformSample(3).cohort(0, 10, seed=0), [0, 2, 3])


def test_everybody_is_drawn_equally_often() -> None:
    rounds, size, clients = 4000, 3, 10
    drawn = np.concatenate([UniformSample(size).cohort(round, clients, seed=0) for round in range(rounds)])
    counts = np.bincount(drawn, minlength=clients)
    expected = rounds * size / clients
    deviation = np.sqrt(rounds * size / clients * (1 - size / clients))
    assert (np.abs(counts - expected) < 4 * deviation).all()


@pytest.mark.parametrize(
    ("fraction", "clients", "size"), [(0.1, 100, 10), (0.1, 3, 1), (1.0, 7, 7), (0.25, 10, 2), (0.35, 10, 4)]
)
def test_a_fraction_is_rounded_to_at_least_one_client(fraction: float, clients: int, size: int) -> None:
    rule = UniformSample(fraction=fraction)
    rule.validate(clients)
    assert len(rule.cohort(0, clients, seed=0)) == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of size=None and fraction=None"),
        ({"size": 2, "fraction": 0.5}, "exactly one of size=2 and fraction=0.5"),
        ({"size": 0}, "size=0 must be at least 1"),
        ({"fraction": 0.0}, r"fraction=0.0 must be in \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction=1.5 must be in \(0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniformSample(**settings)


def test_a_cohort_larger_than_the_federation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size=5 is larger than num_clients=4.*lower the cohort size"):
        UniformSample(5).validate(4)
    UniformSample(4).validate(4)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fed.partition import IID, ByAttribute, Dirichlet, Partitioner, QuantitySkew, Shards, label_counts

LABELS = np.random.default_rng(0).integers(0, 10, 2000)
PARTITIONERS = [
    IID(),
    Dirichlet(0.3),
    Dirichlet(0.3, balanced=True),
    Shards(2),
    QuantitySkew(0.5),
    ByAttribute((np.arange(2000) % 60).tolist()),
]


def assert_partition(parts: list[np.ndarray], num_samples: int, num_clients: int) -> None:
    """Sorted int64 arrays, one per client, that hold every sample exactly once."""
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_samples))


@settings(max_examples=60, deadline=None)
@given(
    partitioner=st.sampled_from(
        [IID(), Dirichlet(0.5, 0), Dirichlet(0.01, 0, balanced=True), Shards(1), Shards(2), QuantitySkew(0.5, 0)]
    ),
    num_samples=st.integers(60, 300),
    num_classes=st.integers(1, 12),
    num_clients=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
def test_every_sample_goes_to_exactly_one_client(partitioner, num_samples, num_classes, num_clients, seed):
    labels = np.random.default_rng(seed).integers(0, num_classes, num_samples)
    assert_partition(partitioner(labels, num_clients, seed), num_samples, num_clients)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=lambda partitioner: type(partitioner).__name__)
def test_partition_is_a_function_of_the_seed(partitioner):
    first, again, other = (partitioner(LABELS, 10, seed) for seed in (1, 1, 2))
    assert_partition(first, 2000, 10)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=lambda partitioner: type(partitioner).__name__)
def test_only_partitioners_that_need_labels_look_at_them(partitioner):
    parts, without = partitioner(LABELS, 10, 0), partitioner(np.zeros_like(LABELS), 10, 0)
    unchanged = all(np.array_equal(a, b) for a, b in zip(parts, without))
    assert unchanged is not partitioner.needs_labels


def skew(parts: list[np.ndarray]) -> float:
    """Mean over clients of the share of their most frequent class: 0.1 is no skew."""
    counts = label_counts(parts, LABELS, 10)
    return float((counts.max(axis=1) / counts.sum(axis=1)).mean())


def test_dirichlet_skew_falls_with_alpha():
    for balanced in (False, True):
        skews = [skew(Dirichlet(alpha, balanced=balanced)(LABELS, 10, 0)) for alpha in (0.05, 0.5, 1000)]
        assert skews[0] > skews[1] > skews[2]
        assert skews[2] < 0.2


def test_dirichlet_shares_of_a_class_have_the_variance_of_the_distribution():
    # Var p = (1/N)(1 - 1/N) / (alpha N + 1) for p ~ Dir(alpha 1_N).
    labels = np.zeros(100_000, dtype=np.int64)
    shares = [len(part) / 1e5 for seed in range(200) for part in Dirichlet(1.0, 0)(labels, 4, seed)]
    assert np.var(shares) == pytest.approx(0.25 * 0.75 / 5, rel=0.15)


def test_dirichlet_redraws_until_everybody_has_enough():
    sizes = [len(part) for seed in range(10) for part in Dirichlet(0.3, min_samples=50)(LABELS, 10, seed)]
    assert min(sizes) >= 50


def test_balanced_dirichlet_gives_equal_sizes():
    sizes = [len(part) for part in Dirichlet(0.1, balanced=True)(LABELS[:1003], 10, 0)]
    assert sorted(sizes) == [100] * 7 + [101] * 3


def test_shards_give_few_classes():
    labels = np.repeat(np.arange(10), 100)
    parts = Shards(2)(labels, 20, 0)
    assert {len(part) for part in parts} == {50}
    assert (label_counts(parts, labels, 10) > 0).sum(axis=1).max() <= 2


def test_quantity_skew_changes_sizes_but_not_the_mix():
    parts = QuantitySkew(0.3, min_samples=20)(LABELS, 8, 0)
    sizes = np.array([len(part) for part in parts])
    assert sizes.min() >= 20 and sizes.max() > 3 * sizes.min()
    largest = label_counts(parts, LABELS, 10)[sizes.argmax()]
    assert largest.max() < 2 * largest.min()


def test_groups_stay_together_and_balance():
    writers = np.repeat(np.arange(30), np.arange(1, 31))
    parts = ByAttribute(writers.tolist())(np.zeros(len(writers), dtype=np.int64), 5, 0)
    assert_partition(parts, len(writers), 5)
    owners = [set(writers[part]) for part in parts]
    assert sum(map(len, owners)) == 30  # no writer twice
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 2  # 465 samples, 93 a client


def test_one_group_a_client():
    parts = ByAttribute(["b", "a", "b", "c"])(np.zeros(4, dtype=np.int64), 3, 0)
    assert sorted(part.tolist() for part in parts) == [[0, 2], [1], [3]]


def test_attribute_files(tmp_path):
    values = np.arange(60) % 6
    np.save(tmp_path / "writers.npy", values)
    (tmp_path / "writers.csv").write_text("\n".join(f"writer{value}" for value in values) + "\n")
    labels = np.zeros(60, dtype=np.int64)
    expected = ByAttribute(values.tolist())(labels, 3, 0)
    for path in (str(tmp_path / "writers.npy"), tmp_path / "writers.csv"):
        assert all(np.array_equal(a, b) for a, b in zip(ByAttribute(path)(labels, 3, 0), expected))


def test_label_counts():
    counts = label_counts([np.array([0, 1]), np.array([], dtype=np.int64), np.array([2])], np.array([1, 1, 0]), 3)
    np.testing.assert_array_equal(counts, [[0, 2, 0], [0, 0, 0], [1, 0, 0]])


def test_a_partitioner_of_ones_own():
    class Alternate(Partitioner):
        def split(self, labels, num_clients, draw):
            return [np.arange(client, len(labels), num_clients) for client in range(num_clients)]

    assert_partition(Alternate()(LABELS, 7, 0), 2000, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IID()(LABELS, 0, 0), "num_clients=0 must be at least 1"),
        (lambda: IID()(LABELS, 2, -1), "seed=-1"),
        (lambda: IID()(LABELS[:, None], 2, 0), r"labels have shape \(2000, 1\)"),
        (lambda: Dirichlet(0), "alpha=0 "),
        (lambda: QuantitySkew(float("nan")), "alpha=nan"),
        (lambda: Dirichlet(min_samples=-1), "min_samples=-1"),
        (lambda: Dirichlet(0.05)(LABELS[:60], 50, 0), "alpha=0.05 over num_clients=50 .* min_samples=1 .* raise alpha"),
        (lambda: Dirichlet(min_samples=5, balanced=True)(LABELS[:40], 10, 0), "num_clients=10 .* min_samples=5 each"),
        (lambda: Shards(0), "shards_per_client=0"),
        (lambda: Shards(2)(LABELS[:10], 6, 0), "num_clients=6 x shards_per_client=2 = 12 shards"),
        (lambda: QuantitySkew(0.1, 31)(LABELS[:60], 2, 0), "alpha=0.1 over num_clients=2 .* min_samples=31"),
        (lambda: ByAttribute([1, 2])(LABELS, 2, 0), r"attribute has shape \(2,\), but there are 2000"),
        (lambda: ByAttribute([1, 2])(LABELS[:2], 3, 0), "2 different values, too few for num_clients=3"),
        (lambda: ByAttribute("absent.npy")(LABELS, 2, 0), "attribute file 'absent.npy' does not exist"),
        (lambda: label_counts([np.array([0])], np.array([3]), 3), "labels range from 3 to 3, but num_classes=3"),
    ],
)
def test_bad_setting(call, message):
    with pytest.raises(ValueError, match=message):
        call()

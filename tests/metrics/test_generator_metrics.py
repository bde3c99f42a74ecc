"""Metrics of generators against their definitions in float64, against scipy, and at values that are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from ranks import run_ranks
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_fed.data import DigitsDataModule, GaussianMixtureDataModule
from lightning_fed.metrics import (
    DigitsFeatures,
    MaximumMeanDiscrepancy,
    ModeCoverage,
    NearestMode,
    PixelFeatures,
    PrecisionRecall,
    SlicedWasserstein,
)
from lightning_fed.metrics import two_samples as two_samples_module
from lightning_fed.metrics.image_features import trained_on_digits
from lightning_fed.metrics.sliced_wasserstein import transport_cost

TWO_SAMPLES = [SlicedWasserstein, MaximumMeanDiscrepancy, PrecisionRecall]


def samples(count: int, seed: int = 0, shift: float = 0.0, dimensions: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=draw, dtype=torch.float64) + shift


def measured(metric: Any, real: Tensor, fake: Tensor, sizes: int = 17) -> dict[str, float]:
    for batch in real.split(sizes):
        metric.update(batch, real=True)
    for batch in fake.split(sizes):
        metric.update(batch, real=False)
    found = metric.compute()
    return {name: float(value) for name, value in (found if isinstance(found, dict) else {"": found}).items()}


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, which a set of any size needs several of."""
    monkeypatch.setattr(two_samples_module, "BLOCK_NUMBERS", 300)


# --------------------------------------------------------------------------------------------------- sliced Wasserstein


def test_along_each_line_it_is_scipys_distance() -> None:
    x, y = samples(31), samples(22, seed=1, shift=0.5)
    metric = SlicedWasserstein(projections=8, p=1)
    directions = metric.directions(6)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(8, dtype=torch.float64))
    costs = transport_cost(x @ directions, y @ directions, 1)
    by_scipy = [wasserstein_distance((x @ line).numpy(), (y @ line).numpy()) for line in directions.T]
    assert costs.tolist() == pytest.approx(by_scipy, rel=1e-12)
    assert measured(metric, x, y)[""] == pytest.approx(sum(by_scipy) / 8, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 8), (1, 7), (5, 1)])
def test_squared_costs_are_those_of_the_optimal_plan(n: int, m: int) -> None:
    x, y = samples(n, dimensions=1), samples(m, seed=1, dimensions=1)
    # With every point as often as the other side has points, the optimal plan is a permutation: that of the order.
    equal_x, equal_y = (side.repeat_interleave(times, 0).sort(0).values for side, times in ((x, m), (y, n)))
    assert float(transport_cost(x, y, 2)) == pytest.approx(float((equal_x - equal_y).square().mean()), rel=1e-12)


def test_a_shift_of_equal_samples_is_seen_along_each_line() -> None:
    x, shift = samples(50), torch.tensor([0.3, 0, 0, 0, 0, -0.4], dtype=torch.float64)
    metric = SlicedWasserstein(projections=500)
    expected = (shift @ metric.directions(6)).square().mean().sqrt()
    assert measured(metric, x, x + shift)[""] == pytest.approx(float(expected), rel=1e-9)
    assert float(expected) == pytest.approx(0.5 / 6**0.5, rel=0.1)  # E <theta, v>^2 = |v|^2 / d
    assert measured(SlicedWasserstein(), x, x.flip(0))[""] == pytest.approx(0, abs=1e-12)


def test_other_seeds_draw_other_lines() -> None:
    first, again, other = (SlicedWasserstein(seed=seed).directions(3) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---------------------------------------------------------------------------------------------- mean discrepancy


def naive_discrepancy(x: Tensor, y: Tensor, bandwidths: list[float]) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        squares = float((a - b).square().sum())
        return sum(torch.tensor(-squares / (2 * h * h)).exp().item() for h in bandwidths) / len(bandwidths)

    among = [[kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j] for s in (x, y)]
    between = [kernel(a, b) for a in x for b in y]
    means = [sum(values) / len(values) for values in (*among, between)]
    return means[0] + means[1] - 2 * means[2]


def test_it_is_the_unbiased_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch)
    x, y = samples(25), samples(18, seed=1, shift=0.7)
    metric = MaximumMeanDiscrepancy(bandwidths=[0.5, 2.0])
    assert measured(metric, x, y)[""] == pytest.approx(naive_discrepancy(x, y, [0.5, 2.0]), rel=1e-6)
    median = float(torch.pdist(x).median())
    by_median = naive_discrepancy(x, y, [median / 2, median, 2 * median])
    assert measured(MaximumMeanDiscrepancy(), x, y)[""] == pytest.approx(by_median, rel=1e-6)


def test_equal_distributions_have_zero_on_average_and_others_what_the_integral_gives() -> None:
    same = [measured(MaximumMeanDiscrepancy([1.0]), samples(60, s), samples(60, 100 + s))[""] for s in range(40)]
    mean, error = torch.tensor(same).mean(), torch.tensor(same).std() / 40**0.5
    assert abs(mean) < 3 * error and min(same) < 0 < max(same)
    # E exp(-|x - y|^2 / 2) of unit Gaussians at a distance c is 3^(-d/2) exp(-c^2 / 6).
    other = [measured(MaximumMeanDiscrepancy([1.0]), samples(60, s, 1.0), samples(60, 100 + s))[""] for s in range(40)]
    expected = 2 * 3**-3 * (1 - torch.tensor(-1.0).exp())  # c^2 = 6
    mean, error = torch.tensor(other).mean(), torch.tensor(other).std() / 40**0.5
    assert abs(mean - expected) < 3 * error and expected > 10 * error


def test_the_median_is_over_samples_spread_evenly() -> None:
    x = torch.cat([samples(2000), samples(2000, seed=1, shift=50.0)])
    every = torch.cat([x[:2000:4], x[2000::4]])
    found = measured(MaximumMeanDiscrepancy(), x, samples(5, 2))[""]
    median = float(torch.pdist(every).median())
    expected = measured(MaximumMeanDiscrepancy([median / 2, median, 2 * median]), x, samples(5, 2))[""]
    assert found == pytest.approx(expected, rel=2e-2)


# ---------------------------------------------------------------------------------------------- precision and recall


def naive_precision_recall(x: Tensor, y: Tensor, k: int) -> dict[str, float]:
    def radius(s: Tensor, i: int) -> float:
        return sorted(float((s[i] - s[j]).norm()) for j in range(len(s)) if j != i)[k - 1]

    radii_x, radii_y = ([radius(s, i) for i in range(len(s))] for s in (x, y))
    distance = [[float((a - b).norm()) for b in y] for a in x]
    in_x = [[distance[i][j] <= radii_x[i] for j in range(len(y))] for i in range(len(x))]
    in_y = [[distance[i][j] <= radii_y[j] for j in range(len(y))] for i in range(len(x))]
    return {
        "precision": sum(any(row[j] for row in in_x) for j in range(len(y))) / len(y),
        "recall": sum(map(any, in_y)) / len(x),
        "density": sum(map(sum, in_x)) / (k * len(y)),
        "coverage": sum(map(any, in_x)) / len(x),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_they_are_what_the_papers_define(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch)
    x, y = samples(40), 0.7 * samples(27, seed=1, shift=1.4)
    found = measured(PrecisionRecall(k), x, y)
    assert found == pytest.approx(naive_precision_recall(x, y, k), abs=1e-12)
    assert all(0 < value < 1 for value in found.values()) and len(set(found.values())) == 4


def test_equal_sets_distant_sets_and_a_generator_of_one_mode() -> None:
    x = samples(60)
    same = measured(PrecisionRecall(), x, x)
    assert same == pytest.approx({"precision": 1, "recall": 1, "density": 4 / 3, "coverage": 1})
    assert measured(PrecisionRecall(), x, x + 100) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    modes = torch.cat([x, x + 100])
    one = measured(PrecisionRecall(), modes, samples(60, seed=1))
    assert one["precision"] > 0.8 and one["recall"] <= 0.5 and one["coverage"] <= 0.5


# -------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("kind", TWO_SAMPLES)
def test_a_large_offset_costs_no_digits_and_images_are_flattened(kind: Any) -> None:
    x, y = samples(30), samples(20, seed=1, shift=0.2)
    near, far = measured(kind(), x, y), measured(kind(), x + 1e6, y + 1e6)
    assert far == pytest.approx(near, rel=1e-6)
    images = measured(kind(), x.view(30, 1, 2, 3), y.view(20, 1, 2, 3))
    assert images == pytest.approx(near, rel=1e-12)


@pytest.mark.parametrize("kind", [*TWO_SAMPLES, lambda **given: ModeCoverage(First(), 3, **given)])
def test_reset_keeps_the_real_side_if_it_is_told_to(kind: Any) -> None:
    x, y, z = samples(20), samples(20, seed=1, shift=0.5), samples(20, seed=2, shift=-0.7)
    metric = kind(reset_real=False)
    measured(metric, x, y)
    metric.reset()
    assert measured(metric, x[:0], z) == pytest.approx(measured(kind(), x, z))
    forgetful = kind()
    measured(forgetful, x, y)
    forgetful.reset()
    assert measured(forgetful, z, y) == pytest.approx(measured(kind(), z, y))
    forgetful.reset()
    assert measured(forgetful, z[:, :4], y[:, :4]) == pytest.approx(measured(kind(), z[:, :4], y[:, :4]))


class First(nn.Module):
    """As a classifier: the largest of the first three numbers."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, :3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NearestMode(torch.zeros(3), 1.0), r"means have shape \[3\]"),
        (lambda: NearestMode(torch.zeros(3, 2), 1.0)(torch.zeros(5, 3)), "points have 3 numbers"),
        (lambda: measured(SlicedWasserstein(), samples(3), samples(0)), "0 generated samples, .* needs 1 or more"),
        (lambda: measured(MaximumMeanDiscrepancy(), samples(1), samples(9)), "1 real samples, .* needs 2 or more"),
        (lambda: measured(MaximumMeanDiscrepancy(), torch.zeros(9, 2), samples(9)[:, :2]), "pass bandwidths="),
        (lambda: measured(PrecisionRecall(k=3), samples(9), samples(3)), "3 generated samples, .* needs 4 or more"),
        (lambda: measured(PrecisionRecall(), samples(9), samples(9)[:, :2]), "2 numbers, but earlier ones have 6"),
        (lambda: measured(SlicedWasserstein(), samples(9), samples(9)[:, :2]), "2 numbers, but earlier ones have 6"),
        (lambda: SlicedWasserstein().update(torch.zeros(3, 2, dtype=torch.uint8), real=True), "must be floats"),
        (lambda: SlicedWasserstein().update(torch.zeros(3), real=True), r"must be floats \[batch"),
        (lambda: ModeCoverage(First(), 3).compute(), "no generated sample"),
        (lambda: ModeCoverage(First(), 2).update(torch.eye(3), real=True), "modes 0 .. 2, but num_modes=2"),
        (lambda: ModeCoverage(nn.Flatten(0), 2).update(torch.eye(3), real=True), "must give logits"),
        (lambda: DigitsFeatures()(torch.zeros(1, 3, 8, 8)), "knows digits only"),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_bad_settings_and_samples(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------ mode coverage


def test_modes_of_a_mixture() -> None:
    data = GaussianMixtureDataModule(modes=4, eval_samples=2000)
    points, labels = data.datasets.val.tensors
    metric = ModeCoverage(NearestMode(data.means, data.std), 4)
    whole = measured(metric, points[:0], points)
    assert whole["coverage"] == 1
    # Of a Gaussian in the plane exp(-9/2) = 1.1 % is farther than 3 standard deviations.
    assert whole["inside"] == pytest.approx(1 - 0.0111, abs=3 * (0.0111 / 2000) ** 0.5)
    metric.reset()
    two = measured(metric, points, points[(labels == 1) | (labels == 2)])
    assert two["coverage"] == 0.5 and two["total_variation"] == pytest.approx(0.5, abs=0.01)
    between = torch.zeros(100, 2, 1, 1)
    metric.reset()
    assert measured(metric, points, between) == {"coverage": 0, "total_variation": 1, "inside": 0}


def test_a_mode_is_kept_from_its_least_share_on_and_due_what_real_samples_say() -> None:
    def given(*counts: int) -> Tensor:
        return torch.eye(3).repeat_interleave(torch.tensor(counts), 0)

    def found(real: Tensor, fake: Tensor, least: float = 0.25) -> dict[str, float]:
        return measured(ModeCoverage(First(), 3, least), real, fake)

    # Without real samples each is due 40 of 120.
    assert found(given(0, 0, 0), given(10, 50, 60))["coverage"] == 1
    assert found(given(0, 0, 0), given(9, 51, 60))["coverage"] == pytest.approx(2 / 3)
    assert found(given(0, 0, 0), given(9, 51, 60), least=0.2)["coverage"] == 1
    # Due 10, 20 and 90; a class without real samples does not count.
    assert found(given(1, 2, 9), given(3, 5, 112))["coverage"] == 1
    assert found(given(1, 2, 9), given(30, 70, 20))["coverage"] == pytest.approx(2 / 3)
    assert found(given(0, 1, 1), given(0, 10, 0))["coverage"] == 0.5
    assert found(given(1, 2, 9), given(2, 4, 6))["total_variation"] == pytest.approx((1 + 2 + 3) / 12 / 2)


def test_classes_of_digits_by_a_classifier() -> None:
    images, labels = DigitsDataModule().datasets.test.tensors
    classifier = DigitsFeatures().classifier
    classifier.train()
    whole = measured(ModeCoverage(classifier, 10), images, images)
    assert whole == {"coverage": 1, "total_variation": 0, "inside": 1} and not classifier.training
    some = measured(ModeCoverage(classifier, 10), images, images[labels < 3])
    assert some["coverage"] == 0.3 and some["total_variation"] == pytest.approx(0.7, abs=0.02)


# ------------------------------------------------------------------------------------------- features and Frechet


def test_digits_features_are_the_same_in_every_process_and_leave_no_trace() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    trained_on_digits.cache_clear()
    with torch.no_grad():
        first = DigitsFeatures()
    assert torch.equal(torch.get_rng_state(), before)
    trained_on_digits.cache_clear()
    torch.manual_seed(8)
    again = DigitsFeatures()
    images, labels = DigitsDataModule().datasets.test.tensors
    assert torch.equal(first(images), again(images)) and first(images).shape == (400, first.num_features)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert float((first.classifier(images).argmax(1) == labels).float().mean()) > 0.97


@pytest.mark.parametrize("extractor", [PixelFeatures(64), DigitsFeatures])
def test_torchmetrics_frechet_distance_takes_our_features(extractor: Any) -> None:
    extractor = extractor() if isinstance(extractor, type) else extractor
    train, _, test = (part.tensors[0] for part in DigitsDataModule().datasets[:3])
    metric = FrechetInceptionDistance(feature=extractor, normalize=True, reset_real_features=False)
    found = measured(metric, train, test, sizes=130)[""]
    x, y = (extractor(images).double() for images in (train, test))
    cov_x, cov_y = (torch.cov(side.T) for side in (x, y))
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), of symmetric matrices.
    values, vectors = torch.linalg.eigh(cov_x)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root = torch.linalg.eigvalsh(half @ cov_y @ half).clamp(min=0).sqrt().sum()
    closed = (x.mean(0) - y.mean(0)).square().sum() + (cov_x + cov_y).trace() - 2 * root
    assert found == pytest.approx(float(closed), rel=1e-4)
    metric.reset()
    assert measured(metric, test[:0], test.flip(0))[""] == pytest.approx(found, rel=1e-4)


# -------------------------------------------------------------------------------------------------------------- ranks


def over_ranks() -> list[dict[str, float]]:
    """Uneven batches dealt out to two ranks; the second one has no real sample."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    x, y = samples(40).float(), samples(30, seed=1, shift=0.6).float()
    found = []
    for metric in (SlicedWasserstein(), MaximumMeanDiscrepancy(), PrecisionRecall(), ModeCoverage(First(), 3)):
        real = [x[:7], x[7:]] if rank == 0 else []
        for batch in real:
            metric.update(batch, real=True)
        for batch in ([y[:4]], [y[4:15], y[15:]])[rank]:
            metric.update(batch, real=False)
        result = metric.compute()
        found.append({n: float(v) for n, v in (result if isinstance(result, dict) else {"": result}).items()})
        # Each goes on with what is its own.
        if not isinstance(metric, ModeCoverage):
            assert sum(map(len, metric.real)) == (40 if rank == 0 else 0)
            assert sum(map(len, metric.fake)) == (4 if rank == 0 else 26)
    return found


def test_two_ranks_with_uneven_batches_measure_what_one_does() -> None:
    x, y = samples(40).float(), samples(30, seed=1, shift=0.6).float()
    metrics = SlicedWasserstein(), MaximumMeanDiscrepancy(), PrecisionRecall(), ModeCoverage(First(), 3)
    alone = [measured(metric, x, y) for metric in metrics]
    for found in run_ranks(2, over_ranks):
        for one, both in zip(alone, found):
            assert both == pytest.approx(one, rel=1e-9)

"""Density ratios from logits: clipped, counted, and normalised at each noise level."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_fed.modules.diffusion.density_ratio import DensityRatio


def logits(count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with another mean at every noise level, and the positions of these levels."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(count, generator=generator)
    return torch.randn(count, generator=generator) * 0.3 + 2 * positions - 1, positions


def test_the_ratio_is_the_exponential_of_the_logit() -> None:
    found = DensityRatio(bins=0)(torch.tensor([-1.0, 0.0, 2.0]), torch.zeros(3))
    torch.testing.assert_close(found, torch.tensor([math.exp(-1), 1.0, math.exp(2)]))


@pytest.mark.parametrize("bounds", [(0.1, 20.0), (0.5, 2.0)])
def test_it_is_clipped_and_the_clipped_are_counted(bounds: tuple[float, float]) -> None:
    ratio = DensityRatio(bounds, bins=0)
    found = ratio(torch.tensor([-200.0, -5.0, 0.0, 0.1, 5.0, float("inf")]), torch.zeros(6))
    low, high = bounds
    torch.testing.assert_close(found, torch.tensor([low, low, 1.0, math.exp(0.1), high, high]))
    assert float(ratio.clipped_fraction) == pytest.approx(4 / 6)
    ratio(torch.zeros(3), torch.zeros(3))
    assert ratio.clipped_fraction == 0


def test_without_bounds_only_the_logit_is_clipped() -> None:
    ratio = DensityRatio(None, bins=0)
    found = ratio(torch.tensor([-50.0, -9.0, 9.0, 50.0]), torch.zeros(4))
    torch.testing.assert_close(found, torch.tensor([-10.0, -9.0, 9.0, 10.0]).exp())
    assert ratio.clipped_fraction == 0.5


def test_gradients_flow_inside_the_bounds_only() -> None:
    logit = torch.tensor([-5.0, 0.5, 5.0], requires_grad=True)
    DensityRatio(bins=0)(logit, torch.zeros(3)).sum().backward()
    torch.testing.assert_close(logit.grad, torch.tensor([0.0, math.exp(0.5), 0.0]))


def test_its_mean_is_one_at_every_noise_level() -> None:
    logit, positions = logits()
    ratio = DensityRatio()
    r, raw = ratio(logit, positions), ratio.clipped(logit)
    index = (positions * 10).long()
    for b in range(10):
        assert float(r[index == b].mean()) == pytest.approx(1, abs=1e-5)
        assert float(ratio.bin_means[b]) == pytest.approx(float(raw[index == b].mean()), rel=1e-5)
    assert raw[index == 9].mean() / raw[index == 0].mean() > 3  # which is what normalisation has removed


def test_the_ends_of_the_spacing_are_in_the_outer_bins() -> None:
    ratio = DensityRatio()
    ratio(torch.tensor([1.0, 2.0]), torch.tensor([-1e-7, 1.0]))
    assert float(ratio.bin_means[0]) == pytest.approx(math.e) and float(ratio.bin_means[9]) == pytest.approx(math.e**2)
    assert (ratio.bin_means[1:9] == 1).all()


def test_means_move_at_the_rate_and_stay_where_nothing_was_seen() -> None:
    ratio, positions = DensityRatio(rate=0.5), torch.full((2,), 0.35)
    r = ratio(torch.tensor([3.0, 5.0]).log(), positions)
    assert float(ratio.bin_means[3]) == pytest.approx(0.5 * 1 + 0.5 * 4)
    torch.testing.assert_close(r, torch.tensor([3.0, 5.0]) / 2.5, rtol=1e-5, atol=0)
    ratio(torch.tensor([2.0, 2.0]).log(), positions)
    assert float(ratio.bin_means[3]) == pytest.approx(0.5 * 2.5 + 0.5 * 2)
    assert (ratio.bin_means[[0, 1, 2, 4, 9]] == 1).all()
    assert [*ratio.state_dict()] == ["bin_means"]


def test_sums_are_those_of_all_ranks() -> None:
    """Two halves that know of each other's sums are the whole."""
    logit, positions = logits()
    whole = DensityRatio()
    expected, halves = whole(logit, positions), [slice(0, 150), slice(150, 400)]
    sums: list[Tensor] = []
    for half in halves:
        DensityRatio()(logit[half], positions[half], lambda values: (sums.append(values.clone()), values)[1])
    for half in halves:
        ratio = DensityRatio()
        r = ratio(logit[half], positions[half], lambda values: torch.stack(sums).sum(dim=0))
        torch.testing.assert_close(r, expected[half])
        torch.testing.assert_close(ratio.bin_means, whole.bin_means)


def test_the_second_normalisation_gives_weights_of_mean_one() -> None:
    h = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    scale = DensityRatio.scale_of(h)
    assert float((h.detach() * scale).mean()) == pytest.approx(1, abs=1e-5) and not scale.requires_grad
    both = DensityRatio.scale_of(h, lambda values: values + torch.tensor([11.0, 1.0]))
    assert float(both) == pytest.approx(4 / 20, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_before_the_exponential(dtype: torch.dtype) -> None:
    r = DensityRatio(None, bins=0)(torch.tensor([9.9375], dtype=dtype), torch.zeros(1))
    assert r.dtype == torch.float32 and float(r) == pytest.approx(math.exp(9.9375), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bounds": (2.0, 20.0)}, r"ratio_bounds=\(2.0, 20.0\)"),
        ({"bounds": (0.1, 0.9)}, r"ratio_bounds=\(0.1, 0.9\)"),
        ({"bins": -1}, "ratio_bins=-1"),
        ({"rate": 1.0}, "ratio_rate=1.0"),
    ],
)
def test_bad_settings(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DensityRatio(**settings)

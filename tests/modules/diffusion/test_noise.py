"""Noise levels: spacing, distributions and weights against their formulas, and against the schedulers of diffusers."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats

from lightning_fed.modules.diffusion import (
    EDMWeighting,
    KarrasUniform,
    LogNormal,
    NoiseDistribution,
    ScoreWeighting,
    UniformWeighting,
)
from lightning_fed.modules.diffusion.noise import karras_positions, karras_sigmas

CPU = torch.device("cpu")


def draw(noise: NoiseDistribution, size: int, seed: int = 0) -> np.ndarray:
    torch.manual_seed(seed)
    return noise.sample(size, 0.002, 80.0, CPU).numpy()


@pytest.mark.parametrize("rho", [3.0, 7.0])
def test_spacing_against_the_formula_and_its_inverse(rho: float) -> None:
    i = np.linspace(0, 1, 33)
    expected = (0.002 ** (1 / rho) + i * (80 ** (1 / rho) - 0.002 ** (1 / rho))) ** rho
    sigmas = karras_sigmas(torch.from_numpy(i), 0.002, 80.0, rho)
    np.testing.assert_allclose(sigmas, expected, rtol=1e-14)
    np.testing.assert_allclose(karras_positions(sigmas, 0.002, 80.0, rho), i, atol=1e-13)


def test_spacing_is_that_of_diffusers() -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=20.0)
    scheduler.set_timesteps(9)
    ours = karras_sigmas(torch.linspace(1, 0, 9, dtype=torch.float64), 0.01, 20.0)
    np.testing.assert_allclose(ours, scheduler.sigmas[:-1], rtol=1e-6)


def test_lognormal_levels_are_lognormal() -> None:
    logs = np.log(draw(LogNormal(-1.1, 2.0), 20_000))
    assert stats.kstest(logs, stats.norm(-1.1, 2.0).cdf).pvalue > 0.01
    assert stats.kstest(logs, stats.norm(-1.2, 1.2).cdf).pvalue < 1e-6


def test_karras_levels_are_uniform_on_the_grid_within_its_ends() -> None:
    sigmas = draw(KarrasUniform(low=0.25, high=0.5, steps=21), 20_000)
    index = karras_positions(torch.from_numpy(sigmas).double(), 0.002, 80.0).numpy() * 20
    np.testing.assert_allclose(index, index.round(), atol=1e-4)
    counts = np.bincount(index.round().astype(int), minlength=21)
    assert (counts[:5] == 0).all() and (counts[11:] == 0).all()
    assert stats.chisquare(counts[5:11]).pvalue > 0.01
    # The papers' grid of 1,000 without the two levels at each end.
    index = karras_positions(torch.from_numpy(draw(KarrasUniform(), 200_000)).double(), 0.002, 80.0).numpy() * 999
    assert (round(index.min()), round(index.max())) == (2, 997)


@pytest.mark.parametrize("noise", [LogNormal(), KarrasUniform()])
def test_levels_come_from_the_default_generator(noise: NoiseDistribution) -> None:
    np.testing.assert_array_equal(draw(noise, 9), draw(noise, 9))
    assert (draw(noise, 9) != draw(noise, 9, seed=1)).any()


def test_weights_against_their_formulas() -> None:
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    s, d = sigma.numpy(), 0.7
    np.testing.assert_allclose(EDMWeighting()(sigma, d), (s**2 + d**2) / (s * d) ** 2, rtol=1e-14)
    np.testing.assert_allclose(ScoreWeighting()(sigma, d), 1 / s**2, rtol=1e-14)
    np.testing.assert_array_equal(UniformWeighting()(sigma, d), np.ones(3))
    # EDM's makes the network's own error count alike: weight c_out^2 = 1.
    c_out = s * d / np.sqrt(s**2 + d**2)
    np.testing.assert_allclose(EDMWeighting()(sigma, d).numpy() * c_out**2, np.ones(3), rtol=1e-14)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (LogNormal, {"std": math.nan}, "std=nan"),
        (KarrasUniform, {"low": 0.5, "high": 0.5}, "low=0.5, high=0.5"),
        (KarrasUniform, {"low": -0.1}, "low=-0.1"),
        (KarrasUniform, {"high": 1.1}, "high=1.1"),
        (KarrasUniform, {"steps": 1}, "steps=1"),
    ],
)
def test_settings_out_of_range(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**settings)

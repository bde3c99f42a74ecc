"""Samplers against the closed form for a Gaussian, whose denoiser is exact, and against diffusers' own loop."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from small_denoisers import Zero, unet_config
from torch import Tensor

from lightning_fed.modules.diffusion import EDMDenoiser, load_denoiser
from lightning_fed.modules.diffusion.sampling import (
    consistency_steps,
    euler,
    flow_step,
    heun,
    initial_noise_level,
    sampling_sigmas,
)

DEVIATION, LARGEST = 0.7, 10.0


def gaussian(**settings: Any) -> EDMDenoiser:
    """The exact denoiser of ``N(0, 0.7^2)``, with so small a sigma_min that the last step to 0 is exact."""
    levels = {"sigma_data": DEVIATION, "sigma_min": 1e-5, "sigma_max": LARGEST, "time_embedding": "consistency"}
    return EDMDenoiser(Zero(), **{**levels, **settings})


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error(solver: Any, steps: int) -> float:
    """Of ``x(0) = x(sigma_max) s / sqrt(sigma_max^2 + s^2)``, the end of the probability flow."""
    z = noise(4, 1, 2, 2)
    exact = LARGEST * z * DEVIATION / math.sqrt(LARGEST**2 + DEVIATION**2)
    return float((solver(gaussian(), z, None, steps) - exact).abs().max())


@pytest.mark.parametrize(("solver", "order", "bound"), [(euler, 1, 0.1), (heun, 2, 0.005)])
def test_order_of_convergence(solver: Any, order: int, bound: float) -> None:
    errors = np.array([error(solver, steps) for steps in (64, 128, 256)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.1)
    assert errors[0] < bound


def test_one_step_of_the_flow_between_any_two_levels() -> None:
    """Heun's step with a level for each sample, against its formula for ``dx / dsigma = sigma x / (sigma^2 + s^2)``."""
    x, sigma, following = noise(3, 1, 2, 2), np.array([5.0, 1.0, 0.1]), np.array([4.0, 0.5, 0.01])
    slope = sigma / (sigma**2 + DEVIATION**2)
    there = following / (following**2 + DEVIATION**2) * (1 + (following - sigma) * slope)
    expected = 1 + (following - sigma) * (slope + there) / 2
    levels = torch.from_numpy(sigma), torch.from_numpy(following)
    found = flow_step(gaussian(), x, *levels)
    np.testing.assert_allclose(found / x, expected.reshape(3, 1, 1, 1).repeat(2, 2).repeat(2, 3), rtol=1e-12)
    first_order = flow_step(gaussian(), x, *levels, second_order=False)
    np.testing.assert_allclose((first_order / x)[:, 0, 0, 0], 1 + (following - sigma) * slope, rtol=1e-12)


@pytest.mark.parametrize(("solver", "steps", "evaluations"), [(heun, 18, 35), (euler, 18, 18), (heun, 1, 1)])
def test_evaluations(solver: Any, steps: int, evaluations: int) -> None:
    denoiser = gaussian()
    solver(denoiser, noise(1, 1, 2, 2), None, steps)
    assert denoiser.network.evaluations == evaluations


@pytest.mark.parametrize("solver", [euler, heun])
def test_one_step_is_the_denoiser_itself(solver: Any) -> None:
    denoiser, z = gaussian(), noise(2, 1, 2, 2)
    torch.testing.assert_close(solver(denoiser, z, None, 1), denoiser(LARGEST * z, LARGEST), rtol=1e-12, atol=1e-12)


def test_levels_and_the_initial_one_are_those_of_diffusers() -> None:
    denoiser, scheduler = EDMDenoiser(Zero()), diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(7)
    np.testing.assert_allclose(sampling_sigmas(denoiser, 7), scheduler.sigmas, rtol=1e-6)
    assert sampling_sigmas(denoiser, 7)[-1] == 0
    assert initial_noise_level(denoiser) == scheduler.init_noise_sigma
    consistency = EDMDenoiser(Zero(), time_embedding="consistency")
    assert initial_noise_level(consistency) == diffusers.CMStochasticIterativeScheduler().init_noise_sigma
    with pytest.raises(ValueError, match="steps=0 of a sampler must be at least 1"):
        sampling_sigmas(denoiser, 0)


def test_consistency_steps_against_the_algorithm() -> None:
    """With the exact denoiser as the model: each step shrinks, and adds the noise of the next level."""
    denoiser = gaussian(sigma_min=0.002, boundary=True)
    z = noise(2, 1, 2, 2)
    found = consistency_steps(denoiser, z, sigmas=(0.8, 0.2), source=torch.Generator().manual_seed(5))
    source = torch.Generator().manual_seed(5)
    later = [torch.randn(2, 1, 2, 2, generator=source).double() for _ in range(2)]

    def model(x: Tensor, sigma: float) -> Tensor:
        return x * DEVIATION**2 / ((sigma - 0.002) ** 2 + DEVIATION**2)

    x = model(LARGEST * z, LARGEST)
    for sigma, drawn in zip((0.8, 0.2), later):
        x = model(x + math.sqrt(sigma**2 - 0.002**2) * drawn, sigma)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=0)


def test_classes_reach_the_network() -> None:
    torch.manual_seed(0)
    denoiser, z = load_denoiser(unet_config(num_class_embeds=3)), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for draw in (lambda label: euler(denoiser, z, label, 2), lambda label: heun(denoiser, z, label, 2)):
            assert not torch.equal(draw(torch.tensor([0, 1])), draw(torch.tensor([0, 2])))
            assert torch.equal(draw(torch.tensor([0, 1]))[0], draw(torch.tensor([0, 2]))[0])

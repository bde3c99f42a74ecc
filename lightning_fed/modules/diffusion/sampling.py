"""From noise to images with a denoiser: solvers of the probability flow, and consistency models' steps.

Shapes: B = samples, C, H, W = channels, height and width of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_fed.modules.diffusion.denoiser import EDMDenoiser, like_images
from lightning_fed.modules.diffusion.noise import karras_sigmas


def sampling_sigmas(denoiser: EDMDenoiser, steps: int) -> list[float]:
    """The decreasing noise levels ``sigma_max .. sigma_min, 0`` of a solver with so many steps, ``[steps + 1]``.

    Raises:
        ValueError: if ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} of a sampler must be at least 1.")
    positions = torch.linspace(1, 0, steps, dtype=torch.float64)
    return [*karras_sigmas(positions, denoiser.sigma_min, denoiser.sigma_max).tolist(), 0.0]


def initial_noise_level(denoiser: EDMDenoiser) -> float:
    """The deviation of what sampling starts from.

    ``sigma_max``; but for the time embedding of EDM ``sqrt(sigma_max^2 + 1)``, as diffusers' scheduler for it has it.
    """
    return denoiser.sigma_max if denoiser.time_embedding == "consistency" else (denoiser.sigma_max**2 + 1) ** 0.5


def euler(denoiser: EDMDenoiser, noise: Tensor, class_labels: Tensor | None, steps: int) -> Tensor:
    """Euler's method on the probability flow ``dx / dsigma = (x - D(x; sigma)) / sigma``, one evaluation a step.

    With one step it is ``D`` itself, at ``sigma_max``.
    """
    return _solve(denoiser, noise, class_labels, steps, second_order=False)


def heun(denoiser: EDMDenoiser, noise: Tensor, class_labels: Tensor | None, steps: int) -> Tensor:
    """Heun's method on the probability flow (Karras et al. 2022, algorithm 1), ``2 steps - 1`` evaluations."""
    return _solve(denoiser, noise, class_labels, steps, second_order=True)


def _solve(denoiser: EDMDenoiser, noise: Tensor, class_labels: Tensor | None, steps: int, second_order: bool) -> Tensor:
    sigmas = sampling_sigmas(denoiser, steps)
    x = initial_noise_level(denoiser) * noise
    for sigma, following in pairwise(sigmas):
        x = flow_step(denoiser, x, sigma, following, class_labels, second_order and following > 0)
    return x


def flow_step(
    denoiser: EDMDenoiser,
    x: Tensor,
    sigma: Tensor | float,
    following: Tensor | float,
    class_labels: Tensor | None = None,
    second_order: bool = True,
) -> Tensor:
    """One step of the probability flow from noise level sigma to the following one.

    Args:
        denoiser: D.
        x: ``[B, C, H, W]`` at sigma.
        sigma: a number, or ``[B]``.
        following: a smaller noise level, of the same form; not 0 with ``second_order``.
        class_labels: ``[B]`` or None.
        second_order: Heun's correction.
    """
    level, smaller = (_like(value, x) for value in (sigma, following))
    slope = (x - denoiser(x, sigma, class_labels)) / level
    euler_point = x + (smaller - level) * slope
    if not second_order:
        return euler_point
    slope_there = (euler_point - denoiser(euler_point, following, class_labels)) / smaller
    return x + (smaller - level) * (slope + slope_there) / 2


def consistency_steps(
    denoiser: EDMDenoiser,
    noise: Tensor,
    class_labels: Tensor | None = None,
    sigmas: Sequence[float] = (),
    source: torch.Generator | None = None,
) -> Tensor:
    """Multistep sampling of a consistency model (Song et al. 2023, algorithm 1).

    ``x <- D(sigma_max z; sigma_max)``, then at each further level
    ``x <- D(x + sqrt(sigma^2 - sigma_min^2) z; sigma)``.

    Args:
        denoiser: D.
        noise: the first z, ``[B, C, H, W]``.
        class_labels: ``[B]`` or None.
        sigmas: the further noise levels, decreasing.
        source: of their noise, on the CPU; None for the default generator.
    """
    x = denoiser(initial_noise_level(denoiser) * noise, denoiser.sigma_max, class_labels)
    for sigma in sigmas:
        z = torch.randn(noise.shape, generator=source).to(noise)
        x = denoiser(x + (sigma**2 - denoiser.sigma_min**2) ** 0.5 * z, sigma, class_labels)
    return x


def _like(sigma: Tensor | float, x: Tensor) -> Tensor:
    level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return like_images(level, x) if level.ndim else level

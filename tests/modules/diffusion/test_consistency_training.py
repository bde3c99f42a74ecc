"""Consistency training against a transcription of its papers."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import torch
from federations import silent_trainer
from small_consistency import (
    CHANNELS,
    DATA,
    HIGH,
    LOW,
    NUMBERS,
    SIDE,
    Linear,
    Records,
    batches_of,
    linear_images,
    unet,
)
from torch import Tensor, nn

from lightning_fed.modules.diffusion import EDMDenoiser
from lightning_fed.modules.diffusion.consistency_training import ConsistencyTraining, pseudo_huber
from lightning_fed.modules.diffusion.noise_pairs import NoisePair

# ------------------------------------------------------------------------------------------- the paper, in plain NumPy


def plain_f(w: np.ndarray, v: np.ndarray, x: np.ndarray, sigma: np.ndarray, boundary: bool = True) -> np.ndarray:
    """The consistency function (Song et al. 2023, eq. 5) or EDM's denoiser around :class:`Linear`, ``[B, D]``."""
    offset = sigma - LOW if boundary else sigma
    c_skip = DATA**2 / (offset**2 + DATA**2)
    c_out = DATA * offset / np.sqrt(DATA**2 + sigma**2)
    c_in = 1 / np.sqrt(sigma**2 + DATA**2)
    time = 250 * np.log(sigma) if boundary else np.log(sigma) / 4
    output = (c_in * x) @ w + np.sin(time / 100) * v
    return c_skip * x + c_out * output


def plain_gradient(
    w: np.ndarray, v: np.ndarray, x: np.ndarray, noise: np.ndarray, a: np.ndarray, b: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The losses ``[B]``, and the gradient of their mean by the chain rule, with the target held fixed."""
    target = plain_f(w, v, x + a * noise, a)
    error = plain_f(w, v, x + b * noise, b) - target
    c = 0.00054 * np.sqrt(NUMBERS)
    root = np.sqrt((error**2).sum(axis=1, keepdims=True) + c**2)
    by_output = weight * error / root * DATA * (b - LOW) / np.sqrt(DATA**2 + b**2) / len(x)
    gradient_w = ((x + b * noise) / np.sqrt(b**2 + DATA**2)).T @ by_output
    gradient_v = (np.sin(250 * np.log(b) / 100) * by_output).sum(axis=0)
    return (weight * (root - c))[:, 0], gradient_w, gradient_v


def plain_grid(levels: int) -> np.ndarray:
    low, high = LOW ** (1 / 7), HIGH ** (1 / 7)
    return (low + np.arange(levels) / (levels - 1) * (high - low)) ** 7


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_follows_the_transcription(accumulate: int) -> None:
    torch.manual_seed(0)
    network = Linear()
    steps = 6 // accumulate
    module = Records(network, sigma_data=DATA, pairs={"name": "doubling", "smallest": 4, "largest": 16}, ema_decay=0.9)
    w, v = (nn.Parameter(value.detach().double()) for value in (network.w, network.v))
    start = w.detach().clone()
    trainer = silent_trainer("auto", precision="64-true", max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, batches_of(linear_images()))
    optimizer = torch.optim.RAdam([w, v], lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    assert module.levels == [5, 5, 9, 9, 17, 17]  # of 6 steps, or of 3 steps of two batches
    assert trainer.global_step == steps
    for index, (images, pair, noise, losses) in enumerate(module.steps):
        x, z = (value.flatten(1).numpy() for value in (images, noise))
        grid = plain_grid(module.levels[index])
        place = np.abs(grid[:-1, None] - pair.lower.numpy()).argmin(axis=0)
        a, b = grid[place][:, None], grid[place + 1][:, None]
        plain = plain_gradient(w.detach().numpy(), v.detach().numpy(), x, z, a, b, 1 / (b - a))
        np.testing.assert_allclose(losses.numpy(), plain[0], rtol=1e-10)
        for parameter, gradient in zip((w, v), plain[1:]):
            share = torch.from_numpy(gradient) / accumulate
            parameter.grad = share if parameter.grad is None else parameter.grad + share
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(network.w, w, rtol=0, atol=1e-12)
    torch.testing.assert_close(network.v, v, rtol=0, atol=1e-12)
    assert not torch.allclose(start, w, rtol=0, atol=1e-5)
    assert not torch.equal(module.generator.network.w, network.w)  # samples come from the average, targets do not


def test_distillation_takes_a_step_of_heun_on_the_teachers_flow() -> None:
    torch.manual_seed(0)
    student, teacher = Linear().double(), Linear().double()
    module = ConsistencyTraining(student, EDMDenoiser(teacher, sigma_data=DATA), pairs="fixed")
    x, z, grid = linear_images(5).double(), torch.randn(5, CHANNELS, SIDE, SIDE).double(), plain_grid(18)
    place = np.array([0, 3, 9, 13, 16])
    a, b = grid[place][:, None], grid[place + 1][:, None]
    pair = NoisePair(torch.from_numpy(a[:, 0]), torch.from_numpy(b[:, 0]), torch.ones(5).double())

    (ws, vs), (wt, vt) = ((net.w.detach().numpy(), net.v.detach().numpy()) for net in (student, teacher))
    xb = (x + torch.from_numpy(b).view(5, 1, 1, 1) * z).flatten(1).numpy()
    slope = (xb - plain_f(wt, vt, xb, b, boundary=False)) / b
    guess = xb + (a - b) * slope
    xa = xb + (a - b) * (slope + (guess - plain_f(wt, vt, guess, a, boundary=False)) / a) / 2
    error = plain_f(ws, vs, xb, b) - plain_f(ws, vs, xa, a)
    c = 0.00054 * np.sqrt(NUMBERS)
    expected = np.sqrt((error**2).sum(axis=1) + c**2) - c

    np.testing.assert_allclose(module.loss(x, pair, z).detach().numpy(), expected, rtol=1e-10)
    module.loss(x, pair, z).sum().backward()
    assert student.w.grad is not None
    assert module.teacher is not None
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_a_lower_level_of_zero_means_the_clean_image() -> None:
    torch.manual_seed(0)
    network = Linear().double()
    module = ConsistencyTraining(network, sigma_data=DATA, pairs="easy", huber_c=0)
    x, z = linear_images(3).double(), torch.randn(3, CHANNELS, SIDE, SIDE).double()
    a, b = torch.tensor([0.0, 0.0, 0.3]).double(), torch.tensor([0.01, 1.5, 0.9]).double()
    losses = module.loss(x, NoisePair(a, b, 1 / (b - a)), z)
    with torch.no_grad():
        estimate = module.denoiser(x + b.view(3, 1, 1, 1) * z, b)
        last = module.denoiser(x + a.view(3, 1, 1, 1) * z, torch.tensor([1.0, 1.0, 0.3]).double())[2:]
    expected = (estimate - torch.cat([x[:2], last])).flatten(1).norm(dim=1) / (b - a)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    losses.mean().backward()
    assert network.w.grad is not None
    assert network.w.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ distance and boundary


def test_the_distance_is_exact_where_the_textbook_form_is_zero() -> None:
    target = torch.zeros(1, 1, 2, 2)
    estimate = target.clone()
    estimate[0, 0, 0, 0] = 1e-6
    e, c = Decimal(float(estimate.square().sum())), Decimal("0.03")
    exact = float((e + c * c).sqrt() - c)
    assert exact == pytest.approx(1.7e-11, rel=0.02)
    assert float(pseudo_huber(estimate, target, 0.03)) == pytest.approx(exact, rel=1e-6)
    assert float((torch.tensor(float(e)) + 0.03**2).sqrt() - 0.03) != pytest.approx(exact, rel=0.5)


def test_the_distance_is_over_the_whole_sample() -> None:
    estimate = torch.stack([torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0)])
    distance = pseudo_huber(estimate, torch.zeros_like(estimate), 2.0)
    torch.testing.assert_close(distance, torch.tensor([12 + 4.0, 48 + 4.0]).sqrt() - 2)


def test_a_distance_of_zero_has_a_finite_gradient() -> None:
    estimate = torch.ones(2, 3, requires_grad=True)
    pseudo_huber(estimate, torch.ones(2, 3), 0.0).sum().backward()
    assert torch.equal(estimate.grad, torch.zeros(2, 3))  # type: ignore[arg-type]


def test_c_is_that_of_the_paper_for_cifar() -> None:
    """For d = 3 x 32 x 32 it is 0.0299; a network that returns nothing leaves a known distance."""

    class Nothing(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return torch.zeros_like(x)

    module = ConsistencyTraining(Nothing(), sigma_data=0.5)
    noise, one = torch.randn(1, 3, 32, 32).double(), torch.ones(1).double()
    pair = NoisePair(0.002 * one, 0.0021 * one, one)
    loss = float(module.loss(torch.zeros_like(noise), pair, noise))
    skip = 0.25 / (0.0001**2 + 0.25)
    e = float(((skip * 0.0021 - 0.002) * noise).square().sum())
    assert loss == pytest.approx((e + 0.0299**2) ** 0.5 - 0.0299, rel=2e-3)


def test_the_model_is_the_identity_at_sigma_min() -> None:
    module = ConsistencyTraining(unet())
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(module.denoiser(x, 0.002), x)
        assert not torch.allclose(module.denoiser(x, 0.01), x, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- dropout


def check_dropout(device: str) -> None:
    torch.manual_seed(0)
    module = ConsistencyTraining(Linear(dropout=0.5), sigma_data=DATA).to(device)
    x, level = linear_images(8).to(device), torch.full((8,), 1.3, device=device)
    noise = torch.randn(x.shape).to(device)
    # At equal levels both passes see the same image, so only their masks could differ.
    losses = module.loss(x, NoisePair(level, level, torch.ones_like(level)), noise)
    assert torch.equal(losses, torch.zeros_like(losses))
    first, second = module.denoiser(x, level), module.denoiser(x, level)
    assert not torch.equal(first, second)

    torch.manual_seed(1)
    module.denoiser(x, level)
    after_one_pass = torch.rand(4, device=device), torch.rand(4)
    torch.manual_seed(1)
    module.loss(x, NoisePair(level / 2, level, torch.ones_like(level)), noise)
    assert torch.equal(torch.rand(4, device=device), after_one_pass[0])
    assert torch.equal(torch.rand(4), after_one_pass[1])


def test_both_passes_have_the_same_dropout_mask() -> None:
    check_dropout("cpu")


@pytest.mark.gpu
def test_both_passes_have_the_same_dropout_mask_on_a_gpu() -> None:
    check_dropout("cuda")

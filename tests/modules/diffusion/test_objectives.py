"""Objectives of a student against exact gradients: densities and scores are known, integrals are sums over a grid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from line_distributions import Mixture, Normal
from torch import Tensor

from lightning_fed.modules.diffusion.divergences import Divergence
from lightning_fed.modules.diffusion.objectives import VSD, Objective, StudentBatch, UniInstruct, gan_losses

NAMES = sorted(Divergence.members())
# A narrow student for the divergences that are infinite otherwise, and one that lies across both modes.
WIDE, NARROW = (0.3, 1.8), (1.4, 0.3)


def student_of(name: str) -> tuple[float, float]:
    return NARROW if name == "neyman_chi2" else WIDE


def parameters(values: tuple[float, float]) -> tuple[Tensor, Tensor]:
    b, a = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values)
    return b, a


def exact_batch(name: str, b: Tensor, a: Tensor, sigma: float, z: Tensor, noise: Tensor) -> StudentBatch:
    """What the student's turn would see if the fake score and the discriminator were perfect."""
    p, q = Mixture(), Normal(b, a).fixed()
    images = (b + a * z).view(-1, 1, 1, 1)
    noisy = images + sigma * noise.view(-1, 1, 1, 1)
    log_ratio = (p.log_density(noisy, sigma) - q.log_density(noisy, sigma)).flatten()
    return StudentBatch(
        images,
        noisy,
        torch.full((len(z),), sigma, dtype=torch.float64),
        p.denoised(noisy, sigma),
        q.denoised(noisy, sigma),
        Divergence.of(name, "divergence"),
        log_ratio.exp(),
        torch.ones((), dtype=torch.float64),
    )


def grid(side: float = 9.0, points: int = 241) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights of a mean over two standard normals."""
    nodes = torch.linspace(-side, side, points, dtype=torch.float64)
    z, noise = torch.meshgrid(nodes, nodes, indexing="ij")
    weights = torch.exp(-(z**2 + noise**2) / 2)
    return z.flatten(), noise.flatten(), (weights / weights.sum()).flatten()


def gradient(objective: Objective, name: str, values: tuple[float, float], sigma: float) -> list[float]:
    b, a = parameters(values)
    z, noise, weights = grid()
    losses = objective.loss(exact_batch(name, b, a, sigma, z, noise))
    return [float(g) for g in torch.autograd.grad((losses * weights).sum(), (b, a))]


def line(b: Tensor, a: Tensor, sigma: Tensor | float) -> Tensor:
    """Points where the noisy student and the noisy teacher have their mass."""
    side = max(8 * float((a.detach() ** 2 + sigma**2).sqrt()), 6.0)
    return b.detach() + torch.linspace(-side, side, 4001, dtype=torch.float64)


def divergence_at(name: str, b: Tensor, a: Tensor, sigma: Tensor | float) -> Tensor:
    """``D_f`` of the noisy distributions."""
    x = line(b, a, sigma)
    log_q = Normal(b, a).log_density(x, sigma)
    f = Divergence.of(name, "divergence").f((Mixture().log_density(x, sigma) - log_q).exp())
    return torch.trapezoid(log_q.exp() * f, x)


def rate_at(name: str, b: Tensor, a: Tensor, sigma: Tensor | float) -> Tensor:
    """``E_q[h(r) ||s_F - s_T||^2]`` of the noisy distributions."""
    x, q = line(b, a, sigma), Normal(b, a)
    log_q = q.log_density(x, sigma)
    h = Divergence.of(name, "divergence").h((Mixture().log_density(x, sigma) - log_q).exp())
    return torch.trapezoid(log_q.exp() * h * (q.score(x, sigma) - Mixture().score(x, sigma)) ** 2, x)


# --------------------------------------------------------------------------------------------- gradients of divergences


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_vsd_is_the_gradient_of_the_divergence(name: str, sigma: float) -> None:
    """f-distill, theorem 1."""
    found = gradient(VSD(weight="score"), name, student_of(name), sigma)
    b, a = parameters(student_of(name))
    expected = [float(g) for g in torch.autograd.grad(divergence_at(name, b, a, sigma), (b, a))]
    assert found == pytest.approx(expected, rel=1e-4) and min(map(abs, expected)) > 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if name != "neyman_chi2"])
def test_divergences_are_integrals_over_noise_levels(name: str) -> None:
    """Uni-Instruct, theorem 3.1: ``D_f(clean) - D_f(noisy) = integral sigma E[h ||s_F - s_T||^2] dsigma``."""
    b, a = (torch.tensor(value, dtype=torch.float64) for value in WIDE)
    nodes = torch.linspace(0, 1, 201, dtype=torch.float64)
    sigmas, slopes = 3 * nodes**2, 6 * nodes  # dense where densities are sharp
    rates = torch.stack([rate_at(name, b, a, sigma) for sigma in sigmas])
    integral = torch.trapezoid(sigmas * rates * slopes, nodes)
    difference = divergence_at(name, b, a, 0.0) - divergence_at(name, b, a, 3.0)
    assert float(integral) == pytest.approx(float(difference), abs=2e-4) and difference > 0.01


@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "pearson_chi2")])
def test_uni_instruct_is_the_gradient_of_that_rate(name: str) -> None:
    found = gradient(UniInstruct(weight="score"), name, student_of(name), 0.8)
    b, a = parameters(student_of(name))
    expected = [float(g) for g in torch.autograd.grad(rate_at(name, b, a, 0.8), (b, a))]
    assert found == pytest.approx(expected, abs=2e-4) and max(map(abs, expected)) > 5e-3
    without = gradient(UniInstruct(weight="score", drop_fgm=True), name, student_of(name), 0.8)
    if name in ("forward_kl",):
        assert without == pytest.approx(found, abs=1e-12)
    else:
        assert max(abs(x - y) for x, y in zip(without, expected)) > 1e-3


def test_the_estimate_is_unbiased() -> None:
    """Normal teacher and student, samples as in training: the mean is the closed form within three standard errors."""
    b, a, sigma, count = 0.4, 1.2, 0.7, 200_000
    torch.manual_seed(0)
    z, noise = torch.randn(2, count, dtype=torch.float64)
    teacher, student = Normal(torch.tensor(-0.3).double(), torch.tensor(0.9).double()), parameters((b, a))
    images = student[0] + student[1] * z
    noisy = images + sigma * noise
    q = Normal(*student).fixed()
    view = (-1, 1, 1, 1)
    for name, closed in {
        # KL(q || p) and KL(p || q) of normals with variances v_q = a^2 + sigma^2 and v_p.
        "reverse_kl": lambda d, a, v_p, v_q: (d / v_p, a * (1 / v_p - 1 / v_q)),
        "forward_kl": lambda d, a, v_p, v_q: (d / v_q, a * (1 / v_q - (v_p + d**2) / v_q**2)),
    }.items():
        ratio = (teacher.log_density(noisy, sigma) - q.log_density(noisy, sigma)).exp()
        batch = StudentBatch(
            images.view(view),
            noisy.view(view),
            torch.full((count,), sigma, dtype=torch.float64),
            teacher.denoised(noisy, sigma).view(view),
            q.denoised(noisy, sigma).view(view),
            Divergence.of(name, "divergence"),
            ratio.detach(),
            torch.ones((), dtype=torch.float64),
        )
        (slope,) = torch.autograd.grad(VSD(weight="score").loss(batch).sum(), images, retain_graph=True)
        expected = closed(b + 0.3, a, 0.9**2 + sigma**2, a**2 + sigma**2)
        for samples, mean in zip((slope, slope * z), expected):
            error = float(samples.std()) / math.sqrt(count)
            assert abs(float(samples.mean()) - mean) <= 3 * error and error < 0.05 * abs(mean), (name, mean)


# ------------------------------------------------------------------------------------------------------------- formulas


def random_batch(name: str = "forward_kl", **changes: Any) -> StudentBatch:
    generator = torch.Generator().manual_seed(1)
    x, x_teacher, x_fake = (torch.randn(5, 2, 4, 4, generator=generator) for _ in range(3))
    sigma, ratio = torch.rand(5, generator=generator) + 0.5, torch.rand(5, generator=generator) + 0.5
    x.requires_grad_()
    noisy = x + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    networks = {"teacher": x_teacher + 0.1 * noisy.sin(), "fake": x_fake + 0.2 * noisy.cos()}
    settings = {"divergence": Divergence.of(name, "divergence"), "ratio": ratio, "scale": torch.tensor(1.0), **networks}
    return StudentBatch(images=x, noisy=noisy, sigma=sigma, **{**settings, **changes})


def test_reverse_kl_is_the_update_of_dmd2() -> None:
    batch = random_batch("reverse_kl", ratio=torch.full((5,), 7.0))
    x, x_teacher, x_fake = batch.images, batch.teacher, batch.fake
    w = 1 / ((x - x_teacher).abs().flatten(1).mean(1) + 1e-6).view(-1, 1, 1, 1)
    dmd2 = 0.5 * ((x - (x - w * (x_fake - x_teacher)).detach()) ** 2).flatten(1).mean(1)
    found = VSD().loss(batch)
    assert torch.equal(found, dmd2)
    (gradient_found,) = torch.autograd.grad(found.mean(), x, retain_graph=True)
    assert torch.equal(gradient_found, torch.autograd.grad(dmd2.mean(), x, retain_graph=True)[0])
    # As their code has it: (p_real - p_fake) / mean |p_real|.
    p_real, p_fake = x - x_teacher, x - x_fake
    theirs = (p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient_found, (theirs / x.numel()).detach(), rtol=1e-4, atol=1e-7)


def test_sid_with_alpha_one_is_sim() -> None:
    batch = random_batch()
    sim, sid = (Objective.of(name, "objective").loss(batch) for name in ("sim", {"name": "sid", "alpha": 1.0}))
    assert torch.equal(sim, sid)
    slopes = [torch.autograd.grad(loss.mean(), batch.images, retain_graph=True)[0] for loss in (sim, sid)]
    assert torch.equal(*slopes) and slopes[0].abs().max() > 0


@pytest.mark.parametrize("alpha", [0.5, 1.2])
def test_sid_is_the_papers_formula(alpha: float) -> None:
    batch = random_batch("jensen_shannon")
    x, x_teacher, x_fake = batch.images, batch.teacher, batch.fake
    match = ((x_teacher - x_fake) * ((x_teacher - x) - alpha * (x_teacher - x_fake))).flatten(1).mean(1)
    w = batch.h / ((x - x_teacher).detach().abs().flatten(1).mean(1) + 1e-6)
    found = Objective.of({"name": "sid", "alpha": alpha}, "objective").loss(batch)
    torch.testing.assert_close(found, w * match)


@pytest.mark.parametrize("name", [*Objective.members()])
def test_the_weight_of_a_noise_level(name: str) -> None:
    batch = random_batch()
    distance = (batch.images - batch.teacher).abs().flatten(1).mean(1) + 1e-6
    both = [Objective.of({"name": name, "weight": weight}, "objective").loss(batch) for weight in ("dmd", "score")]
    # VSD is quadratic in its weight, and has one difference of estimates.
    expected = (distance / batch.sigma**2) ** 2 if name == "vsd" else distance / batch.sigma**4
    torch.testing.assert_close(both[1] / both[0], expected.detach(), rtol=1e-4, atol=0)


def test_weights_have_mean_one_and_no_gradient() -> None:
    ratio = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0], requires_grad=True)
    batch = random_batch(ratio=ratio, scale=1 / ratio.detach().mean())
    assert float(batch.h.detach().mean()) == pytest.approx(1)
    for name in ("vsd", "sim", "sid"):
        loss = Objective.of(name, "objective").loss(batch).sum()
        (slope,) = torch.autograd.grad(loss, batch.images, retain_graph=True)
        assert slope.abs().max() > 0
        assert torch.autograd.grad(loss, ratio, retain_graph=True, allow_unused=True) == (None,)
    (through_ratio,) = torch.autograd.grad(UniInstruct().loss(batch).sum(), ratio, retain_graph=True)
    assert through_ratio.abs().min() > 0


def test_the_adversarial_loss_is_exact_in_half_precision() -> None:
    found = gan_losses(torch.tensor([-12.0, 0.0, 12.0], dtype=torch.float16))
    expected = torch.tensor([math.log1p(math.exp(12.0)), math.log(2), math.log1p(math.exp(-12.0))])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [*Objective.members()])
def test_bad_settings(name: str) -> None:
    with pytest.raises(ValueError, match=r"weight='dmmd' is not one of \('dmd', 'score'\)"):
        Objective.of({"name": name, "weight": "dmmd"}, "objective")
    with pytest.raises(ValueError, match="objective='vsdd' is unknown: did you mean 'vsd'"):
        Objective.of("vsdd", "objective")

"""f-distill: each turn written out, who changes when, checkpoints, precision, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from federations import silent_trainer
from line_distributions import ExactTeacher, LineNetwork, Mixture
from small_denoisers import CLASSES, coloured, unet_config
from small_distillations import Weights, distillation, equal, fit, images, teacher, weights
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.modules.diffusion import load_denoiser
from lightning_fed.modules.diffusion.f_distill import FDistill, Noise


class Replayed(FDistill):
    """Its noise is given."""

    given: list[Noise]

    def draw_noise(self, images: Tensor, distribution: Any) -> Noise:
        return self.given.pop(0)


def noise(count: int, seed: int) -> Noise:
    source = torch.Generator().manual_seed(seed)
    sigma = 10 ** (2 * torch.rand(count, generator=source) - 1)
    z, eps = (torch.randn(count, 1, 8, 8, generator=source) for _ in range(2))
    return Noise(20.0 * z, sigma, eps)


class Looked(pl.Callback):
    """Keeps the weights before every batch and after the last one, when the module has done all of its own."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Weights]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        # Gradients of one turn would be in the step of the next one.
        assert all(parameter.grad is None for parameter in [*pl_module.parameters(), *pl_module.teacher.parameters()])
        self.seen.append(self.look(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(self.look(pl_module))

    def look(self, module: FDistill) -> dict[str, Weights]:
        parts = {"student": module.denoiser, "fake": module.fake_score, "discriminator": module.discriminator}
        parts |= {"teacher": module.teacher, **({"average": module.average} if module.average is not None else {})}
        return {name: weights(part) for name, part in parts.items()}


def alone(module: FDistill) -> None:
    """What its losses need of a Trainer, where no fit runs."""
    module.trainer = silent_trainer("auto")
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------------- turns written out


def replayed(draws: list[Noise], **settings: Any) -> Replayed:
    module = distillation(Replayed, **settings)
    assert isinstance(module, Replayed)
    module.given = draws
    alone(module)
    return module


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "reverse_kl"])
def test_the_students_turn(divergence: str) -> None:
    """Everything on one page, with logits so large that the bounds of the ratio matter."""
    count, draw = 64, noise(64, 1)
    module = replayed([draw], divergence=divergence, gan_weight=0.3)
    module.discriminator.heads[0][-1].weight.data *= 10
    with torch.no_grad():  # as many on each side
        x = module.denoiser(draw.start, 20.0)
        module.discriminator.heads[0][-1].bias -= module.discriminator(draw.on(x), draw.sigma).median()
    loss = module.student_loss(torch.zeros(count, 1, 8, 8), None)
    gradients = torch.autograd.grad(loss, [*module.denoiser.parameters()])

    x = module.denoiser(draw.start, 20.0)
    x_sigma = x + draw.sigma.view(-1, 1, 1, 1) * draw.noise
    x_teacher, x_fake = module.teacher(x_sigma, draw.sigma).detach(), module.fake_score(x_sigma, draw.sigma).detach()
    logits = module.discriminator(x_sigma, draw.sigma)
    r = logits.detach().exp()
    clipped = r.clamp(0.1, 20)
    assert 0.1 < float((clipped != r).float().mean()) < 0.9
    position = (draw.sigma ** (1 / 7) - 0.002 ** (1 / 7)) / (20 ** (1 / 7) - 0.002 ** (1 / 7))
    r = clipped.clone()
    for level in (position * 10).int().unique():
        here = (position * 10).int() == level
        r[here] = clipped[here] / clipped[here].mean()
    h = {"forward_kl": r, "jensen_shannon": r / (1 + r), "reverse_kl": torch.ones(count)}[divergence]
    w = (h / h.mean() / (x - x_teacher).detach().abs().flatten(1).mean(1)).view(-1, 1, 1, 1)
    written_out = 0.5 * (x - (x - w * (x_fake - x_teacher)).detach()).square().mean() + 0.3 * softplus(-logits).mean()

    torch.testing.assert_close(loss, written_out, rtol=1e-4, atol=0)
    for found, expected in zip(gradients, torch.autograd.grad(written_out, [*module.denoiser.parameters()])):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-8)
    last = module.last_step
    assert last["sigma"] is draw.sigma and last["loss"].shape == last["weight"].shape == (count,)
    torch.testing.assert_close(last["weight"], h / h.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last["log_ratio"], logits.detach())


def test_the_student_goes_where_the_teacher_is_surer_than_the_fake() -> None:
    """The sign: towards the teacher's estimate, away from the fake score's."""
    draw = noise(32, 2)
    module = replayed([draw], gan_weight=0.0)
    x = module.denoiser(draw.start, 20.0).detach().requires_grad_()
    x_sigma = draw.on(x)
    with torch.no_grad():
        towards = module.teacher(x_sigma, draw.sigma) - module.fake_score(x_sigma, draw.sigma)
        batch = module._weighted(
            x, x_sigma, draw.sigma, module.teacher(x_sigma, draw.sigma), module.fake_score(x_sigma, draw.sigma),
            module.discriminator(x_sigma, draw.sigma),
        )  # fmt: skip
    (slope,) = torch.autograd.grad(module.objective.loss(batch).sum(), x)
    assert (-(slope * towards).flatten(1).sum(1) > 0).all()


def test_reverse_kl_needs_no_ratio() -> None:
    """DMD2: bit by bit the same whatever the discriminator thinks."""
    losses = []
    for factor in (1.0, 50.0):
        module = replayed([noise(16, 3)], divergence="reverse_kl", gan_weight=0.0)
        module.discriminator.heads[0][-1].weight.data *= factor
        losses.append(module.student_loss(torch.zeros(16, 1, 8, 8), None))
        assert (module.ratio.bin_means == 1).all() and (module.last_step["weight"] == 1).all()
    assert torch.equal(*losses)


@pytest.mark.parametrize("fake_weighting", ["edm", "uniform"])
@pytest.mark.parametrize("r1_weight", [0.0, 2.0])
def test_the_others_turn(fake_weighting: str, r1_weight: float) -> None:
    of_fake, of_real, real = noise(16, 1), noise(16, 2), coloured(16).tensors[0]
    module = replayed([of_fake, of_real], fake_weighting=fake_weighting, r1_weight=r1_weight)
    torch.manual_seed(5)
    loss = module.others_loss(real, None)

    x = module.denoiser(of_fake.start, 20.0).detach()
    x_sigma, sigma = of_fake.on(x), of_fake.sigma
    error = (module.fake_score(x_sigma, sigma) - x).square().flatten(1).mean(1)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 if fake_weighting == "edm" else 1.0
    real_sigma = of_real.on(real)
    on_real = module.discriminator(real_sigma, of_real.sigma)
    on_fake = module.discriminator(x_sigma, sigma)
    expected = (weight * error).mean() + softplus(on_fake).mean() + softplus(-on_real).mean()
    if r1_weight:
        torch.manual_seed(5)
        near = module.discriminator(real_sigma + 0.1 * torch.randn(16, 1, 8, 8), of_real.sigma)
        assert (near - on_real).abs().max() > 1e-3
        expected = expected + 2.0 * (near - on_real).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert all(p.grad is None for p in module.denoiser.parameters())
    loss.backward()
    assert all(p.grad is None for p in [*module.denoiser.parameters(), *module.teacher.parameters()])
    assert all(p.grad is not None for p in [*module.fake_score.parameters(), *module.discriminator.parameters()])


@pytest.mark.parametrize("objective", ["sim", {"name": "sid", "alpha": 1.2}, "uni"])
def test_objectives_that_differentiate_the_networks(objective: Any) -> None:
    draw = noise(16, 1)
    module = replayed([draw], objective=objective, divergence="jensen_shannon", gan_weight=0.0)
    loss = module.student_loss(torch.zeros(16, 1, 8, 8), None)
    slopes = torch.autograd.grad(loss, [*module.denoiser.parameters()], retain_graph=True)
    assert max(float(slope.abs().max()) for slope in slopes) > 0
    # Gradients that stopped at the two estimates would be other ones.
    x = module.denoiser(draw.start, 20.0)
    noisy = draw.on(x)
    with torch.no_grad():
        seen = module.teacher(noisy, draw.sigma), module.fake_score(noisy, draw.sigma)
        logits = module.discriminator(noisy, draw.sigma)
    batch = module._weighted(x, noisy, draw.sigma, *seen, logits)
    detached = module.objective.loss(batch).mean()
    torch.testing.assert_close(detached, loss, rtol=1e-4, atol=1e-6)
    others = torch.autograd.grad(detached, [*module.denoiser.parameters()])
    assert max(float((one - other).abs().max()) for one, other in zip(slopes, others)) > 1e-4


# ----------------------------------------------------------------------------------------------------- who changes when


@pytest.mark.parametrize("settings", [{}, {"features": "fake"}, {"objective": "uni"}, {"gan_weight": 0.0}])
def test_networks_change_on_their_turns_only(settings: dict[str, Any]) -> None:
    module, looked = distillation(ema_decay=0.9, **settings), Looked()
    trainer = fit(module, images(32), callbacks=[looked])
    assert trainer.global_step == module.iteration == 8 and module.steps_done == module.student_step == 3
    for turn, (before, after) in enumerate(zip(looked.seen, looked.seen[1:])):
        is_students = turn % 3 == 0
        assert equal(before["teacher"], after["teacher"])
        assert equal(before["student"], after["student"]) != is_students, turn
        assert equal(before["average"], after["average"]) != is_students, turn
        for name in ("fake", "discriminator"):
            assert equal(before[name], after[name]) == is_students, (turn, name)
    assert all(parameter.grad is None for parameter in module.teacher.parameters())
    assert module.average.n_averaged == 3 and not module.teacher.training
    assert not any("teacher" in name for name in module.state_dict())
    names = "loss_student loss_fake loss_discriminator discriminator_accuracy h_min h_mean h_max effective_samples"
    expected = {*(f"train/{name}" for name in f"{names} ratio_clipped score_gap".split()), "student_step"}
    assert expected == {*trainer.callback_metrics}
    assert trainer.callback_metrics["student_step"] == 3
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())


def test_dropout_is_off_in_networks_that_are_asked_only() -> None:
    modes: list[tuple[bool, bool, bool]] = []

    class Watched(FDistill):
        def student_loss(self, *args: Any) -> Tensor:
            loss = super().student_loss(*args)
            modes.append((self.denoiser.training, self.fake_score.training, self.discriminator.training))
            return loss

        def others_loss(self, *args: Any) -> Tensor:
            loss = super().others_loss(*args)
            modes.append((self.denoiser.training, self.fake_score.training, self.discriminator.training))
            return loss

    fit(Watched(teacher(), student_every=2), images(8))
    assert modes == [(True, False, False), (False, True, True)]


def test_classes_reach_every_network() -> None:
    labelled = load_denoiser(unet_config(num_class_embeds=CLASSES), sigma_max=20.0)
    for parameter in labelled.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    seen: dict[str, set[Any]] = {}
    module = FDistill(labelled, student_every=2)
    for name in ("teacher", "denoiser", "fake_score"):
        seen[name] = set()
        network = getattr(module, name)
        network.register_forward_pre_hook(lambda m, args, name=name: seen[name].add(tuple(args[2][:4].tolist())))
    fit(module, DataLoader(coloured(8), 4))
    assert seen == {name: {(0, 1, 2, 0), (1, 2, 0, 1)} for name in seen}
    assert module.sample(4).shape == (4, 1, 8, 8)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"divergence": "forwrd_kl"}, "divergence='forwrd_kl' is unknown: did you mean 'forward_kl'"),
        ({"objective": "vds"}, "objective='vds' is unknown: did you mean 'vsd'"),
        ({"fake_weighting": "edn"}, "fake_weighting='edn' is unknown"),
        ({"student_every": 1}, "student_every=1 must be at least 2"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0"),
        ({"gan_weight": -1.0}, "gan_weight=-1.0"),
        ({"fake_lr": -1.0}, "fake_lr=-1.0"),
        ({"discriminator_lr": 0.0}, "discriminator_lr=0.0"),
        ({"ratio_bounds": (2.0, 3.0)}, "ratio_bounds"),
        ({"features": "students"}, "features='students'"),
        ({"feature_layers": ["middle"]}, "has no layer 'middle'; it has 'conv_in'"),
        ({"sigma_max": 80.0}, "sigma_max=80.0, but the given denoiser was trained with 20.0"),
        ({"student": unet_config(in_channels=2, out_channels=2)}, r"student has sample_shape=\(2, 8, 8\)"),
        ({"fake_score": unet_config(num_class_embeds=3)}, "fake_score has num_classes=3, the teacher None"),
        ({"student": nn.Identity()}, "student has "),
    ],
)
def test_bad_settings(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FDistill(teacher(), **settings)


def test_a_configuration_is_no_teacher() -> None:
    with pytest.raises(ValueError, match="a network with random weights teaches nothing"):
        FDistill(unet_config())


def test_a_one_step_generator_is_no_teacher() -> None:
    student = distillation()
    with pytest.raises(ValueError, match="a one-step generator itself"):
        FDistill(student)


def test_a_bare_model_in_a_folder_can_teach(tmp_path: Path) -> None:
    teacher().network.save_pretrained(tmp_path)
    assert FDistill(str(tmp_path), time_embedding="consistency").teacher.time_embedding == "consistency"


def test_an_exact_teacher_needs_a_student() -> None:
    with pytest.raises(ValueError, match="student has no parameters to train"):
        FDistill(ExactTeacher(Mixture()), discriminator=LineNetwork(False))


def test_images_that_do_not_fit_are_refused_before_the_first_step() -> None:
    module = distillation()
    before = weights(module)
    with pytest.raises(ValueError, match="the network is for"):
        fit(module, DataLoader(TensorDataset(torch.rand(4, 3, 8, 8)), 2))
    before["seed"] = module.seed.clone()
    assert equal(weights(module), before)

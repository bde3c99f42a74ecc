"""Consistency training against a transcription of its papers, and what a user does with it."""

from __future__ import annotations

import copy
import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import diffusers
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import silent_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_fed.modules.diffusion import DiffusionTraining, EDMDenoiser, load_denoiser
from lightning_fed.modules.diffusion.consistency_training import ConsistencyTraining, pseudo_huber
from lightning_fed.modules.diffusion.frozen import HoldsFrozen
from lightning_fed.modules.diffusion.noise_pairs import NoisePair

SIDE, CHANNELS = 3, 2
NUMBERS = CHANNELS * SIDE * SIDE
LOW, HIGH, DATA = 0.002, 80.0, 0.7


class Linear(nn.Module):
    """F(x, time) = W x + v sin(time / 100), of the flattened image: its gradient is known."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(NUMBERS, NUMBERS) / 5)
        self.v = nn.Parameter(torch.randn(NUMBERS) / 5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        features = x.flatten(1) @ self.w + (time.to(x.dtype) / 100).sin()[:, None] * self.v
        output = self.dropout(features).view_as(x)
        if not torch.is_grad_enabled():
            torch.rand(1, device=x.device)  # what the target draws beside its mask must leave no trace
        return output


def unet(**settings: Any) -> diffusers.UNet2DModel:
    """A network of 8 x 8 images that knows no classes unless told to."""
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return diffusers.UNet2DModel(**{**defaults, **settings})


def linear_images(count: int = 24) -> Tensor:
    return torch.rand(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def digits(count: int = 32) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1


def batches_of(images: Tensor, size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images), size)


class Records(ConsistencyTraining):
    """Keeps what each step drew and what it logged."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.steps: list[tuple[Tensor, NoisePair, Tensor, Tensor]] = []
        self.levels: list[int] = []

    def loss(self, images: Tensor, pair: NoisePair, noise: Tensor, *args: Any) -> Tensor:
        value = super().loss(images, pair, noise, *args)
        self.steps.append((images, pair, noise, value.detach()))
        return value

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.levels.append(int(self.trainer.callback_metrics["train/discretization_steps"]))


class SeedsEachStep(pl.Callback):
    """Makes the random numbers of a step a function of its number, so that runs can be compared after a resume."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        torch.manual_seed(1000 + trainer.global_step)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(map(torch.equal, states[0].values(), states[1].values()))


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


# ------------------------------------------------------------------------------------------------ a run with Lightning


def test_resume_goes_on_bitwise_with_the_schedule(tmp_path: Path) -> None:
    def module() -> Records:
        torch.manual_seed(0)
        return Records(
            unet(dropout=0.3),
            sigma_data=0.75,
            pairs={"name": "doubling", "smallest": 4, "largest": 32},
            ema_decay=0.9,
            total_steps=8,
        )

    def run(module: Records, epochs: int, **settings: Any) -> pl.Trainer:
        trainer = silent_trainer("auto", max_epochs=epochs, callbacks=[SeedsEachStep()])
        trainer.fit(module, batches_of(digits(16)), **settings)
        return trainer

    whole, first, second = module(), module(), module()
    run(whole, 2)
    run(first, 1).save_checkpoint(tmp_path / "half.ckpt")
    run(second, 2, ckpt_path=tmp_path / "half.ckpt")
    assert whole.levels == [5, 5, 9, 9, 17, 17, 33, 33]
    assert second.levels == whole.levels[4:]
    assert same(second, whole)
    assert not same(first, whole)
    assert torch.equal(second.sample(2, seed=0), whole.sample(2, seed=0))


class RandomStates(pl.Callback):
    """Keeps the state of the default generator around each minibatch of validation."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_validation_batch_start(self, *args: Any) -> None:
        self.states.append(torch.get_rng_state())

    def on_validation_batch_end(self, *args: Any) -> None:
        self.states.append(torch.get_rng_state())


def test_a_run_logs_and_keeps_what_monitors_draw() -> None:
    module = ConsistencyTraining(unet(), sigma_data=0.75)
    trainer = silent_trainer("auto", max_epochs=1, limit_train_batches=2)
    trainer.fit(module, batches_of(digits()), batches_of(digits(8)))
    assert {"train/loss", "train/discretization_steps", "val/loss"} <= trainer.callback_metrics.keys()
    assert module.last_step["sigma"].shape == module.last_step["loss"].shape == (4,)
    assert not module.last_step["loss"].requires_grad
    validator = silent_trainer("auto", callbacks=[random := RandomStates()])
    first = validator.validate(module, batches_of(digits(8)), verbose=False)
    torch.rand(3)
    assert validator.validate(module, batches_of(digits(8)), verbose=False) == first
    assert len(random.states) == 8
    assert all(map(torch.equal, random.states[::2], random.states[1::2]))


def test_the_loss_is_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    module = ConsistencyTraining(unet(), sigma_data=0.75)
    x, noise, b = digits(4), torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        losses = module.loss(x, NoisePair(b * 0.9, b, torch.ones(4)), noise)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    gradients = [parameter.grad for parameter in module.denoiser.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None) > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_classes_and_precisions_train(precision: Any) -> None:
    module = ConsistencyTraining(unet(num_class_embeds=3), sigma_data=0.75)
    data = DataLoader(TensorDataset(digits(12), torch.arange(12) % 3), 4)
    before = copy.deepcopy(module.denoiser)
    silent_trainer("auto", max_epochs=1, precision=precision).fit(module, data)
    assert not same(before, module.denoiser)
    one, other = (module.sample(2, torch.tensor(labels), seed=0) for labels in ([0, 0], [1, 0]))
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_the_schedule_needs_an_end() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield torch.randn(1, 8, 8)

    def fit(**settings: Any) -> Records:
        module = Records(unet(), sigma_data=0.75, **settings)
        silent_trainer("auto", max_epochs=-1, max_time={"seconds": 2}, limit_train_batches=1).fit(
            module, DataLoader(Stream(), 2)
        )
        return module

    with pytest.raises(ValueError, match="total_steps=None"):
        fit()
    assert fit(total_steps=4).levels[0] == 11


# ---------------------------------------------------------------------------------------- teacher, checkpoints, export


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "teacher"
    DiffusionTraining(unet(), sigma_data=0.75, ema_decay=None).save_pretrained(folder)
    return folder


def test_a_student_starts_from_its_teacher_and_leaves_it_alone(teacher_folder: Path) -> None:
    module = ConsistencyTraining(
        teacher=str(teacher_folder), time_embedding="edm", pairs="fixed", ema_decay=None, lr=0.01
    )
    teacher = load_denoiser(teacher_folder)
    assert module.denoiser.settings == {**teacher.settings, "boundary": True}
    assert same(module.denoiser.network, teacher.network)
    silent_trainer("auto", max_epochs=1).fit(module, batches_of(digits()))
    assert isinstance(module.teacher, EDMDenoiser)
    assert same(module.teacher.network, teacher.network)
    assert not module.teacher.training
    assert not same(module.denoiser.network, teacher.network)
    assert not any("teacher" in name for name in module.state_dict())
    assert not any("teacher" in name for name, _ in module.named_parameters())


def test_a_teacher_given_as_an_object_is_copied() -> None:
    network = unet()
    teacher = EDMDenoiser(network, sigma_data=0.75)
    module = ConsistencyTraining(network, teacher, sigma_data=0.75, pairs="fixed")
    assert module.denoiser.network is network
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.training
    assert module.teacher is not teacher


def test_a_generator_is_no_teacher(tmp_path: Path) -> None:
    generator = ConsistencyTraining(unet(), sigma_data=0.75, ema_decay=None)
    generator.save_pretrained(tmp_path / "folder")
    trainer = silent_trainer("auto", max_epochs=1, limit_train_batches=1)
    trainer.fit(generator, batches_of(digits()))
    trainer.save_checkpoint(tmp_path / "generator.ckpt")
    for teacher in (generator, str(tmp_path / "folder"), str(tmp_path / "generator.ckpt")):
        with pytest.raises(ValueError, match="a one-step generator"):
            ConsistencyTraining(teacher=teacher, pairs="fixed")
        ConsistencyTraining(teacher)  # but one to go on from


def test_a_checkpoint_samples_when_its_teacher_is_gone(teacher_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"time_embedding": "edm", "pairs": "fixed", "sampling_sigmas": (2.0, 0.5)}
    module = ConsistencyTraining(teacher=teacher_folder, **settings)
    trainer = silent_trainer("auto", max_epochs=1, limit_train_batches=2)
    trainer.fit(module, batches_of(digits()))
    trainer.save_checkpoint(path := tmp_path / "student.ckpt")
    again = ConsistencyTraining.load_from_checkpoint(path)
    assert again.hparams == module.hparams
    silent_trainer("auto", max_epochs=1, limit_train_batches=1).fit(again, batches_of(digits()))
    assert again.teacher is not None  # loaded when it was needed

    shutil.rmtree(teacher_folder)
    orphan = ConsistencyTraining.load_from_checkpoint(path)
    for steps in (None, 1, 2, 3):
        assert torch.equal(orphan.sample(2, steps=steps, seed=0), module.sample(2, steps=steps, seed=0))
    with pytest.raises(ValueError, match=r"is needed for training \(not for sampling\)"):
        silent_trainer("auto", max_epochs=1).fit(orphan, batches_of(digits()))
    with pytest.raises(ValueError, match="is needed for training"):
        silent_trainer("auto").validate(orphan, batches_of(digits()), verbose=False)
    other = ConsistencyTraining.load_from_checkpoint(path, teacher=EDMDenoiser(unet(), sigma_data=0.75))
    silent_trainer("auto", max_epochs=1, limit_train_batches=1).fit(other, batches_of(digits()))


def test_a_checkpoint_tells_that_its_teacher_was_an_object(tmp_path: Path) -> None:
    module = ConsistencyTraining(unet(), EDMDenoiser(unet(), sigma_data=0.75), pairs="fixed")
    trainer = silent_trainer("auto", max_epochs=1, limit_train_batches=1)
    trainer.fit(module, batches_of(digits()))
    trainer.save_checkpoint(path := tmp_path / "student.ckpt")
    again = ConsistencyTraining.load_from_checkpoint(path)
    assert torch.equal(again.sample(1, seed=0), module.sample(1, seed=0))
    with pytest.raises(ValueError, match="give it again"):
        silent_trainer("auto", max_epochs=1).fit(again, batches_of(digits()))


def test_what_is_held_frozen_follows_its_module() -> None:
    class Holder(HoldsFrozen, pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.hold_frozen("teacher", nn.Linear(2, 2))

    holder = Holder()
    holder.train().double()
    assert holder.teacher.weight.dtype == torch.float64
    assert not holder.teacher.training
    assert not holder.teacher.weight.requires_grad
    assert holder.state_dict().keys() == {"net.weight", "net.bias"}
    twin = copy.deepcopy(holder).float()
    assert twin.teacher.weight.dtype == torch.float32
    assert holder.teacher.weight.dtype == torch.float64


def test_plain_diffusers_draws_the_same_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ConsistencyTraining(unet(), sigma_data=0.75, lr=1e-2, ema_decay=0.5, sampling_sigmas=(0.821, 0.1))
    assert module.sampling_sigmas[0] == pytest.approx(0.8209, abs=1e-4)
    calls = module.pipeline_calls()
    assert calls[2]["timesteps"] == [788, 0]
    silent_trainer("auto", max_epochs=3).fit(module, batches_of(digits()))
    module.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "ConsistencyModelPipeline"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert list(calls) == [1, 2, 3]
    for steps, settings in calls.items():
        generator = torch.Generator().manual_seed(3)
        theirs = pipeline(batch_size=4, generator=generator, output_type="np", **settings).images
        ours = (module.sample(4, steps=steps, seed=3).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        assert np.abs(ours - theirs).max() <= 1e-5
        assert ours.std() > 0.05


# ------------------------------------------------------------------------------------------------------------ bad input


def teacher_of(**settings: Any) -> EDMDenoiser:
    return EDMDenoiser(unet(**settings.pop("network", {})), **{"sigma_data": 0.75, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "network=None"),
        ({"network": unet(), "huber_c": -1.0}, "huber_c=-1.0"),
        ({"network": unet(), "total_steps": 0}, "total_steps=0"),
        ({"network": unet(), "sampling_sigmas": (0.5, 0.8)}, "sampling_sigmas=\\(0.5, 0.8\\) must decrease"),
        ({"network": unet(), "sampling_sigmas": (0.82, 0.819)}, "by 2 % or more"),
        ({"network": unet(), "sampling_sigmas": (-1.0,)}, "sigma_min=0.002"),
        ({"network": unet(), "sampling_sigmas": (90.0,)}, "sigma_max=80.0"),
        ({"network": unet(), "pairs": "dubling"}, "did you mean 'doubling'"),
        ({"network": unet(), "ema_decay": 1.0}, "ema_decay=1.0"),
        ({"network": unet(), "teacher": teacher_of(), "pairs": "easy"}, "pairs='easy' with a teacher"),
        ({"network": unet(), "teacher": teacher_of(), "sigma_data": 0.5}, "sigma_data=0.5, but .* with 0.75"),
        ({"network": teacher_of(sigma_max=40.0), "teacher": teacher_of()}, "sigma_max=80.0, but .* with 40.0"),
        ({"teacher": teacher_of()}, "time_embedding='consistency', but .* with 'edm'"),
        ({"teacher": teacher_of(boundary=True, time_embedding="consistency")}, "a one-step generator"),
        ({"teacher": {"_class_name": "UNet2DModel"}}, "random weights teaches nothing"),
        ({"teacher": "no/such folder", "network": unet()}, "no/such folder"),
        ({"network": unet(), "teacher": teacher_of(network={"num_class_embeds": 3})}, "num_classes=3"),
        ({"network": unet(), "teacher": teacher_of(network={"sample_size": 16})}, r"sample_shape=\(1, 16, 16\)"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsistencyTraining(**settings)


@pytest.mark.parametrize("steps", [0, 3])
def test_steps_without_noise_levels_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps}, but sampling_sigmas=\(0.82"):
        ConsistencyTraining(unet()).sample(1, steps=steps)

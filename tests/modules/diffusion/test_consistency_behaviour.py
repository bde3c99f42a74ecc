"""What a user does with consistency training: runs, teachers, checkpoints, export; what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import silent_trainer
from small_consistency import (
    Records,
    SeedsEachStep,
    batches_of,
    digits,
    same,
    unet,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_fed.modules.diffusion import DiffusionTraining, EDMDenoiser, load_denoiser
from lightning_fed.modules.diffusion.consistency_training import ConsistencyTraining
from lightning_fed.modules.diffusion.frozen import HoldsFrozen
from lightning_fed.modules.diffusion.noise_pairs import NoisePair

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
        ({"network": unet(), "sampling_sigmas": (0.001,)}, "sigma_min=0.002"),
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

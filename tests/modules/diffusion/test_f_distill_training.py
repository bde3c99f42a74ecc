"""Optimization of f-distill in windows, precisions and clipped, and what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import lightning.pytorch as pl
import pytest
import torch
from federations import silent_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from line_distributions import AffineStudent, ExactTeacher, LineNetwork, Mixture
from small_denoisers import coloured, unet_config
from small_distillations import Keyed, distance, distillation, equal, fit, images, teacher, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.modules.diffusion import DiffusionTraining, load_denoiser
from lightning_fed.modules.diffusion.f_distill import FDistill

# -------------------------------------------------------------------------------------------------------- optimization


def test_accumulated_batches_are_one_larger_batch() -> None:
    """Exactly where nothing is normalised over the batch."""
    settings = {"divergence": "reverse_kl", "gan_weight": 0.1, "ema_decay": None}
    whole, parts = distillation(Keyed, **settings), distillation(Keyed, **settings, accumulate=2)
    for module, size in ((whole, 8), (parts, 4)):
        module.double()
        data = TensorDataset(coloured(48).tensors[0].double())
        trainer = fit(module, DataLoader(data, size), precision="64-true")
        assert module.iteration == trainer.global_step == 6 and module.steps_done == 2
        module.seed.zero_()
    assert distance(weights(whole), weights(parts)) <= 1e-9
    assert distance(weights(whole.denoiser), weights(distillation(Keyed, **settings).double().denoiser)) > 1e-3


def test_an_epoch_ends_with_a_step() -> None:
    module = distillation(accumulate=3)
    trainer = fit(module, images(28))  # seven batches
    assert module.iteration == trainer.global_step == 3


def test_clipping_is_that_of_each_network() -> None:
    norms: list[list[float]] = []

    class Watching(FDistill):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            groups = [group["params"] for group in optimizer.param_groups]
            norms.append([float(nn.utils.get_total_norm([p.grad for p in group])) for group in groups])

    fit(distillation(Watching, gradient_clip=1e-3, student_every=2), images(8))
    assert [len(turn) for turn in norms] == [1, 2]
    assert [norm for turn in norms for norm in turn] == pytest.approx([1e-3] * 3, rel=2e-2)


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
def test_loss_scaling_leaves_no_trace(scale: float) -> None:
    """Everything but the scale is float32 here: a power of two comes and goes exactly, also through clipping."""

    class Unscaled(MixedPrecision):
        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    found = []
    for plugins in ([], [Unscaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]):
        pl.seed_everything(3, verbose=False)
        module = distillation(gradient_clip=0.5, accumulate=2)
        fit(module, images(40), plugins=plugins)
        found.append(weights(module))
    assert equal(*found)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true"])
def test_precisions(precision: Any) -> None:
    module = distillation(gradient_clip=1.0)
    before = weights(module)
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # the Trainer turns it into bf16 on a CPU, unless it is given as a plugin
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]}
    trainer = fit(module, images(24), **settings)
    after = weights(module)
    assert all(torch.isfinite(value).all() for value in after.values()) and distance(before, after) > 1e-4
    assert torch.isfinite(trainer.callback_metrics["train/loss_student"])
    assert module.last_step["weight"].dtype == (torch.float64 if precision == "64-true" else torch.float32)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("epochs", "shuffle"), [(1, False), (2, True)])
def test_a_run_resumes_bit_by_bit(epochs: int, shuffle: bool, tmp_path: Path) -> None:
    """An epoch has four batches, and three are a cycle: after one epoch and after two it stops within one."""
    settings: dict[str, Any] = {"ema_decay": 0.9, "ratio_rate": 0.5}

    def trained(max_epochs: int, resume: Path | None = None, seed: int = 0) -> FDistill:
        module = distillation(**settings)
        pl.seed_everything(seed, verbose=False)
        if resume is not None:  # nothing of the beginning may matter
            pl.seed_everything(seed + 77, verbose=False)
            for parameter in module.parameters():
                parameter.data.zero_()
        trainer = silent_trainer("auto", max_epochs=max_epochs)
        trainer.fit(module, images(shuffle=shuffle), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
        return module

    whole = trained(3)
    part = trained(epochs)
    assert int(part.iteration) % 3 and not equal(weights(whole), weights(part))
    resumed = trained(3, tmp_path / f"{epochs}.ckpt")
    assert equal(weights(whole), weights(resumed))
    optimizers = [[optimizer.state_dict() for optimizer in m.trainer.optimizers] for m in (whole, resumed)]
    for one, other in zip(*optimizers):
        assert one["param_groups"] == other["param_groups"]
        for key, state in one["state"].items():
            assert all(torch.equal(state[name], other["state"][key][name]) for name in state)
    assert not equal(weights(whole), weights(trained(3, seed=1)))


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    module = DiffusionTraining(unet_config(), sigma_data=0.5, sigma_max=20.0, time_embedding="consistency")
    trainer = silent_trainer("auto", max_steps=1)
    trainer.fit(module, images())
    trainer.save_checkpoint(folder / "teacher.ckpt")
    return folder


def test_a_checkpoint_samples_when_the_teacher_is_gone(teacher_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "teacher.ckpt"
    source.write_bytes((teacher_folder / "teacher.ckpt").read_bytes())
    module = FDistill(str(source), student_every=2, divergence="jensen_shannon", objective={"name": "vsd"})
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert module.denoiser.boundary and not module.fake_score.boundary  # the former can be exported

    again = FDistill.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    fit(again)
    assert equal(weights(again.teacher), weights(load_denoiser(str(source))))

    source.unlink()
    loaded = FDistill.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    assert equal(weights(loaded), weights(module)) and loaded.divergence == module.divergence
    assert torch.equal(loaded.sample(3, seed=1), module.sample(3, seed=1))
    before = weights(loaded)
    with pytest.raises(ValueError, match=r"teacher=.*teacher.ckpt' is needed for training .*there is no such"):
        fit(loaded)
    assert equal(weights(loaded), before)
    given = FDistill.load_from_checkpoint(tmp_path / "student.ckpt", teacher=str(teacher_folder / "teacher.ckpt"))
    fit(given)
    assert not equal(weights(given.denoiser), weights(module.denoiser))
    network = load_denoiser(str(tmp_path / "student.ckpt")).network  # also to start from
    average = {name.removeprefix("module.network."): value for name, value in weights(module.average).items()}
    assert all(torch.equal(value, average[name]) for name, value in weights(network).items())


def test_a_teacher_given_as_an_object_has_to_be_given_again(tmp_path: Path) -> None:
    given = teacher()
    state, modes = weights(given), given.training
    module = FDistill(given, student=unet_config(layers_per_block=2), student_every=2)
    fit(module).save_checkpoint(tmp_path / "student.ckpt")
    assert equal(state, weights(given)) and given.training == modes
    assert all(parameter.requires_grad for parameter in given.parameters())
    loaded = FDistill.load_from_checkpoint(tmp_path / "student.ckpt")
    assert torch.equal(loaded.sample(2, seed=1), module.sample(2, seed=1))
    with pytest.raises(ValueError, match=r"given as an object, .* can be sampled from, but not trained further"):
        fit(loaded)
    fit(FDistill.load_from_checkpoint(tmp_path / "student.ckpt", teacher=given))


def test_modules_of_ones_own_have_to_be_given_again(tmp_path: Path) -> None:
    own = {"student": AffineStudent(0.1, 1.0), "fake_score": LineNetwork(True), "discriminator": LineNetwork(False)}
    points = DataLoader(TensorDataset(torch.randn(8, 1, 1, 1)), 4)
    module = FDistill(ExactTeacher(Mixture()), **own, sigma_max=5.0, student_every=2)
    fit(module, points).save_checkpoint(tmp_path / "student.ckpt")
    with pytest.raises(ValueError, match=r"teacher was given as an object.*load_from_checkpoint\(path, teacher=...\)"):
        FDistill.load_from_checkpoint(tmp_path / "student.ckpt")
    some = {"teacher": ExactTeacher(Mixture()), "student": AffineStudent(0.0, 0.0), "fake_score": LineNetwork(True)}
    with pytest.raises(ValueError, match="One that was given as an object is not in the checkpoint"):
        FDistill.load_from_checkpoint(tmp_path / "student.ckpt", **some)
    loaded = FDistill.load_from_checkpoint(tmp_path / "student.ckpt", **some, discriminator=LineNetwork(False))
    assert torch.equal(loaded.sample(4, seed=1), module.sample(4, seed=1))
    with pytest.raises(ValueError, match="AffineStudent"):
        module.to_pipeline()


def test_a_student_draws_in_one_step_what_its_pipeline_draws() -> None:
    module = FDistill(teacher(time_embedding="consistency"))
    pipeline = module.to_pipeline()
    assert isinstance(pipeline, diffusers.ConsistencyModelPipeline)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=3, generator=torch.Generator().manual_seed(4), num_inference_steps=1, output_type="pt")
    ours = module.sample(3, seed=4)
    expected = torch.as_tensor(theirs.images).view_as(ours)
    assert (ours.clamp(-1, 1) / 2 + 0.5 - expected).abs().max() <= 1e-5
    assert torch.equal(module.sample(3, seed=4, steps=1), ours)
    with pytest.raises(ValueError, match="steps=2: a student of f-distill makes images in one step"):
        module.sample(3, steps=2)

"""Every configuration of a generator runs: shortened on a CPU, or for a few steps on a GPU that it is sized for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from small_denoisers import unet_config
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.cli import FederatedCLI
from lightning_fed.modules import DiffusionModule, DiffusionTraining

CONFIGS = Path(__file__).parents[1] / "configs" / "diffusion"
FOR_GPUS = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name.startswith(("cifar10", "imagenet64")))
SHORT = "--trainer.max_epochs 1 --trainer.limit_train_batches 6 --trainer.enable_model_summary false"


def train(name: str) -> FederatedCLI:
    return FederatedCLI(["fit", "--config", str(CONFIGS / name), *SHORT.split()])


@pytest.mark.parametrize("data", ["digits", "mixture"])
def test_a_teacher_and_then_its_student_train(data: str, in_tmp_path: Path) -> None:
    for name in (f"{data}_teacher", f"{data}_f_distill"):
        cli = train(f"{name}.yaml")
        assert Path(f"runs/{name}/{name}.ckpt").is_file()
    assert int(cli.model.student_step) == 2
    assert math.isfinite(cli.trainer.callback_metrics["train/loss_student"])


def test_consistency_training_needs_no_teacher(in_tmp_path: Path) -> None:
    cli = train("digits_consistency.yaml")
    assert cli.trainer.global_step >= 6 and math.isfinite(cli.trainer.callback_metrics["train/loss"])


def for_gpus(name: str, folder: Path, *settings: str) -> tuple[DiffusionModule, Trainer, tuple[int, int, int]]:
    """Model, Trainer and images' shape of a configuration, on one device; with a small teacher, where it has one."""
    side = 32 if name.startswith("cifar10") else 64
    classes = 10 if side == 32 else 1000
    options = ["--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.logger", "false", *settings]
    if not torch.cuda.is_available():
        options += ["--trainer.accelerator", "cpu"]
    if "f_distill" in name:
        network = unet_config(sample_size=side, in_channels=3, out_channels=3, num_class_embeds=classes)
        DiffusionTraining(network).save_pretrained(folder / "teacher")
        options += ["--model.teacher", str(folder / "teacher")]
    cli = FederatedCLI(["--config", str(CONFIGS / name), *options], run=False)
    return cli.model, cli.trainer, (3, side, side)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_GPUS)
def test_a_configuration_for_gpus_is_valid(name: str, in_tmp_path: Path) -> None:
    module, trainer, shape = for_gpus(name, in_tmp_path)
    assert module.denoiser.sample_shape == shape
    assert trainer.max_steps > 0 or trainer.max_epochs > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOR_GPUS)
def test_a_configuration_for_gpus_trains(name: str, in_tmp_path: Path) -> None:
    module, trainer, shape = for_gpus(name, in_tmp_path, "--trainer.max_steps", "6", "--trainer.max_epochs", "-1")
    images, labels = torch.rand(12, *shape) * 2 - 1, torch.arange(12) % 10
    trainer.fit(module, DataLoader(TensorDataset(images, labels), 2))
    assert trainer.global_step == 6
    assert all(math.isfinite(value) for key, value in trainer.callback_metrics.items() if "loss" in key)

"""Small distillations that several tests run: a U-Net of 18,000 weights as the teacher, and noise that is known."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from federations import silent_trainer
from small_denoisers import coloured, unet_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.modules.diffusion import EDMDenoiser, load_denoiser
from lightning_fed.modules.diffusion.discriminator import FeatureDiscriminator
from lightning_fed.modules.diffusion.f_distill import FDistill, Noise

Weights = dict[str, Tensor]


def teacher(seed: int = 0, time_embedding: Any = "edm", **network: Any) -> EDMDenoiser:
    torch.manual_seed(seed)
    return load_denoiser(unet_config(**network), sigma_data=0.5, sigma_max=20.0, time_embedding=time_embedding)


def distillation(kind: type[FDistill] = FDistill, seed: int = 0, **settings: Any) -> FDistill:
    """Every network is a little away from the others, and ratios from 1, as after some training."""
    module = kind(teacher(seed), **{"lr": 1e-3, "student_every": 3, **settings})
    torch.manual_seed(seed + 100)
    for parameter in [*module.denoiser.parameters(), *module.fake_score.parameters()]:
        parameter.data += 0.05 * torch.randn_like(parameter)
    if isinstance(module.discriminator, FeatureDiscriminator):
        module.discriminator.heads[0][-1].weight.data *= 10
    return module


def images(count: int = 16, batch_size: int = 4, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(coloured(count).tensors[0]), batch_size, shuffle=shuffle)


def fit(module: FDistill, loader: Any = None, **settings: Any) -> pl.Trainer:
    trainer = silent_trainer("auto", **{"max_epochs": 1, **settings})
    trainer.fit(module, images() if loader is None else loader, ckpt_path=settings.pop("ckpt_path", None))
    return trainer


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one: Weights, other: Weights) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


class Keyed(FDistill):
    """Noise is a function of the image, the turn and the use, not of how images are spread over ranks."""

    def student_loss(self, images: Tensor, class_labels: Any) -> Tensor:
        self.uses = 0
        return super().student_loss(images, class_labels)

    def others_loss(self, images: Tensor, class_labels: Any) -> Tensor:
        self.uses = 0
        return super().others_loss(images, class_labels)

    def draw_noise(self, images: Tensor, distribution: Any) -> Noise:
        self.uses += 1
        numbers = []
        for image in images:
            key = int(image.double().abs().sum() * 1e6) * 1000 + int(self.iteration) * 10 + self.uses
            numbers.append(torch.rand(129, generator=torch.Generator().manual_seed(key), dtype=torch.float64))
        drawn = torch.stack(numbers).to(images)
        z, eps = (2 * part.reshape(images.shape) - 1 for part in (drawn[:, :64], drawn[:, 64:128]))
        return Noise(20 * z, 10 ** (2 * drawn[:, 128] - 1), eps)

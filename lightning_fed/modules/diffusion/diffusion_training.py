"""Training of a diffusion model from scratch: the teacher of all distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from lightning_fed.checks import check_choice, check_counts, check_numbers, check_pairs
from lightning_fed.modules.diffusion.denoiser import EDMDenoiser, TimeEmbedding, like_images
from lightning_fed.modules.diffusion.diffusion_module import Batch, DiffusionModule
from lightning_fed.modules.diffusion.noise import NoiseDistribution, Weighting
from lightning_fed.modules.diffusion.pipelines import PipelineCalls
from lightning_fed.modules.diffusion.pretrained import load_denoiser, network_setting
from lightning_fed.modules.diffusion.sampling import euler, heun


class DiffusionTraining(DiffusionModule):
    """Denoising training of Karras et al. 2022 (EDM, arXiv 2206.00364, eq. 2 and 8, table 1).

    ``E[ weight(sigma) mean ||D(x + sigma eps; sigma) - x||^2 ]`` with the denoiser of
    :class:`~lightning_fed.modules.diffusion.EDMDenoiser`. Logged: ``train/loss``, and ``val/loss`` with noise that is
    the same in every epoch.

    Samples are drawn by Heun's method, which diffusers does not have for these models: the exported pipeline goes by
    Euler's, and draws the same images as this module with ``sampler="euler"``.

    Args:
        network: a diffusers model, its configuration (``{"_class_name": "UNet2DModel", ...}``), or a folder, hub name
            or checkpoint to start from; see :func:`~lightning_fed.modules.diffusion.load_denoiser`.
        sigma_data: standard deviation of the data; None: that of what is loaded, or 0.5.
        sigma_min: smallest noise level of sampling; None likewise, or 0.002.
        sigma_max: largest; None likewise, or 80.
        time_embedding: ``"edm"`` or ``"consistency"``; a teacher of consistency distillation that is to be exported
            with several steps needs the latter. None: that of what is loaded, or ``"edm"``.
        noise: the distribution of noise levels; EDM's is ``LogNormal(-1.2, 1.2)``.
        weighting: of the squared error.
        lr: of Adam; 1e-3 for CIFAR-10 and 1e-4 for ImageNet-64 in EDM.
        betas: of Adam.
        warmup_steps: steps over which the learning rate rises from 0; the papers' 10 million images.
        ema_decay: see :class:`DiffusionModule`; 0.9999 is a half-life of 6,900 steps.
        sampling_steps: of the sampler, 18 in EDM for CIFAR-10.
        sampler: ``"heun"``, of two evaluations a step but one at the last, or ``"euler"``, of one.

    Shapes:
        batches are images ``[B, C, H, W]`` in [-1, 1], or (images, labels int64 ``[B]``).

    Raises:
        ValueError: if a setting is out of range or does not fit what is loaded.
    """

    def __init__(
        self,
        network: nn.Module | dict[str, Any] | str,
        sigma_data: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        time_embedding: TimeEmbedding | None = None,
        noise: NoiseDistribution | str | Mapping[str, Any] = "lognormal",
        weighting: Weighting | str | Mapping[str, Any] = "edm",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        ema_decay: float | None = 0.9999,
        sampling_steps: int = 18,
        sampler: Literal["heun", "euler"] = "heun",
    ) -> None:
        denoiser = load_denoiser(
            network,
            sigma_data=sigma_data,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            time_embedding=time_embedding,
            boundary=False,
        )
        super().__init__(denoiser, ema_decay)
        check_counts(sampling_steps=sampling_steps)
        check_counts(0, warmup_steps=warmup_steps)
        check_choice("sampler", sampler, "heun", "euler")
        check_numbers("[0, inf)", lr=lr)
        check_pairs("[0, 1)", betas=betas)
        self.noise = NoiseDistribution.of(noise, "noise")
        self.weighting = Weighting.of(weighting, "weighting")
        self.lr, self.betas, self.warmup_steps = lr, betas, warmup_steps
        self.sampling_steps, self.sampler = sampling_steps, sampler
        self.save_hyperparameters(ignore=["network", "noise", "weighting"])
        self.remember(network=network_setting(denoiser), noise=self.noise, weighting=self.weighting)
        self.remember(**{key: value for key, value in denoiser.settings.items() if key != "boundary"})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = self.images_and_labels(batch)
        sigma = self._noise_levels(len(images))
        loss = self.loss(images, sigma, torch.randn_like(images), labels)
        self.last_step = {"sigma": sigma, "loss": loss.detach()}
        self.log("train/loss", loss.mean(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = self.images_and_labels(batch)
        with self.same_noise(batch_idx):
            sigma, noise = self._noise_levels(len(images)), torch.randn_like(images)
        loss = self.loss(images, sigma, noise, labels, self.generator).mean()
        self.log("val/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(images))

    def loss(
        self,
        images: Tensor,
        sigma: Tensor,
        noise: Tensor,
        class_labels: Tensor | None = None,
        denoiser: EDMDenoiser | None = None,
    ) -> Tensor:
        """The weighted squared error of each image, a mean over its pixels, ``[B]``."""
        denoiser = denoiser or self.denoiser
        noisy = images + like_images(sigma, images) * noise
        error = (denoiser(noisy, sigma, class_labels) - images).square().flatten(1).mean(dim=1)
        return self.weighting(sigma, denoiser.sigma_data) * error

    def _noise_levels(self, size: int) -> Tensor:
        return self.noise.sample(size, self.denoiser.sigma_min, self.denoiser.sigma_max, self.device)

    def draw(
        self,
        denoiser: EDMDenoiser,
        noise: Tensor,
        class_labels: Tensor | None,
        steps: int | None,
        source: torch.Generator,
    ) -> Tensor:
        solve = heun if self.sampler == "heun" else euler
        return solve(denoiser, noise, class_labels, self.sampling_steps if steps is None else steps)

    def pipeline_calls(self) -> PipelineCalls:
        """Of Euler's method, as many steps as the module's sampler makes evaluations."""
        steps = self.sampling_steps if self.sampler == "euler" else 2 * self.sampling_steps - 1
        return {steps: {"num_inference_steps": steps}}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = Adam(self.denoiser.parameters(), lr=self.lr, betas=self.betas)
        if not self.warmup_steps:
            return optimizer
        scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

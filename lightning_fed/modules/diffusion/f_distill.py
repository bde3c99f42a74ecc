"""Distillation of a diffusion model into a one-step generator by the gradient of an f-divergence.

Shapes: B = samples, C, H, W = channels, height and width of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_fed.checks import check_choice, check_numbers, check_pairs, given
from lightning_fed.modules.diffusion.alternating_training import AlternatingTraining
from lightning_fed.modules.diffusion.denoiser import EDMDenoiser, TimeEmbedding, like_images
from lightning_fed.modules.diffusion.density_ratio import DensityRatio
from lightning_fed.modules.diffusion.discriminator import FeatureDiscriminator, discriminator_losses
from lightning_fed.modules.diffusion.distillation_networks import (
    UNNAMED,
    Source,
    bring_back,
    check_alike,
    denoiser_from,
    remembered,
    remembered_source,
    remembered_teacher,
)
from lightning_fed.modules.diffusion.divergences import Divergence
from lightning_fed.modules.diffusion.frozen import HoldsFrozen
from lightning_fed.modules.diffusion.noise import NoiseDistribution, Weighting, karras_positions
from lightning_fed.modules.diffusion.objectives import Objective, StudentBatch, gan_losses, pixel_mean
from lightning_fed.modules.diffusion.pretrained import DEFAULTS, is_one_step_generator, network_setting
from lightning_fed.modules.diffusion.sampling import initial_noise_level


@dataclass
class Noise:
    """The random numbers of one turn: the student's input, and the noise that is put on images, ``[B, C, H, W]``."""

    start: Tensor
    sigma: Tensor
    noise: Tensor

    def on(self, images: Tensor) -> Tensor:
        """The noisy images."""
        return images + like_images(self.sigma, images) * self.noise


class FDistill(HoldsFrozen, AlternatingTraining):
    """f-distill (Xu et al. 2025, arXiv 2502.15681), of which DMD2 (arXiv 2405.14867) is the reverse KL.

    The student ``x = G(sigma_max z)`` descends an f-divergence from the teacher's distribution to its own, at all noise
    levels. Two further networks learn while it does: the *fake score* F, a denoiser of the student's samples, and a
    discriminator, whose logit is the logarithm of the density ratio ``r`` of teacher (data) over student. With
    ``h(r) = f''(r) r^2``, the student's gradient at x is

        ``h(r) (F(x_sigma; sigma) - teacher(x_sigma; sigma))``, times a weight of sigma.

    Batches take turns: of every ``student_every`` the first is the student's, the others train F and the discriminator.

    Logged, each on its turns: ``train/loss_student``, ``train/loss_fake``, ``train/loss_discriminator``,
    ``train/discriminator_accuracy``; ``train/h_min``, ``train/h_mean``, ``train/h_max`` of h before it is divided by
    its mean, ``train/effective_samples`` (the batch, as evenly weighted samples would be worth as much),
    ``train/ratio_clipped`` (a fraction), ``train/score_gap`` (mean ``|x_T - x_F|``), and ``student_step``.

    Manual optimization: ``global_step`` counts turns, ``steps_done`` and the average those of the student. DDP needs
    ``strategy="ddp_find_unused_parameters_true"``. In a federation every client distils for itself, and all its trained
    networks are mixed.

    Args:
        teacher: anything of which a denoiser is loaded (:func:`~lightning_fed.modules.diffusion.load_denoiser`), or
            any module that is called with (x, sigma, class_labels) and estimates the clean image. It is not in
            checkpoints, and not needed to sample; a fit loads it again from where it was.
        student: the same; None: a copy of the teacher, as a consistency model if its time embedding is that of one.
        fake_score: the same; None: a copy of the teacher.
        discriminator: a module that is called with (noisy images, sigma, class_labels) and returns logits ``[B]``;
            None: a :class:`~lightning_fed.modules.diffusion.FeatureDiscriminator`.
        sigma_data: standard deviation of the data; None: that of what is loaded, or 0.5.
        sigma_min: smallest noise level; None likewise, or 0.002.
        sigma_max: largest; None likewise, or 80.
        time_embedding: None: that of what is loaded, or ``"edm"``.
        divergence: one of :class:`~lightning_fed.modules.diffusion.Divergence`. The paper's best are ``"forward_kl"``
            for CIFAR-10 and ``"jensen_shannon"`` for ImageNet-64.
        objective: ``"vsd"`` (f-distill, DMD2), ``"sim"``, ``"sid"``, ``"uni"``, or one of
            :class:`~lightning_fed.modules.diffusion.Objective`.
        noise: the distribution of noise levels on the student's turns.
        fake_noise: on the others; None: the same.
        fake_weighting: of the squared error of F. ``"edm"`` is DMD2's, ``"uniform"`` f-distill's.
        ratio_bounds: see :class:`~lightning_fed.modules.diffusion.DensityRatio`; likewise the next two.
        ratio_bins: see there.
        ratio_rate: see there.
        features: whose features the discriminator reads: the ``"teacher"``'s, or the ``"fake"`` score's.
        feature_layers: names of submodules of that network.
        shape: of an image, ``(C, H, W)``, for networks that do not tell.
        gan_weight: of the student's adversarial loss; 1e-3 for CIFAR-10 and text, 3e-3 for ImageNet-64.
        r1_weight: of ``(D(x) - D(x + r1_scale n))^2`` on real samples, an approximation of R1; 1 in the paper's table.
        r1_scale: see there.
        student_every: batches for one of the student, at least 2; 5 in the papers, 10 for text.
        lr: of the student's AdamW; 1e-4 for CIFAR-10, 2e-6 for ImageNet-64, 1e-5 for text.
        fake_lr: of F; None: ``lr``.
        discriminator_lr: None: ``lr``.
        betas: of AdamW.
        weight_decay: of AdamW.
        accumulate: batches of one turn, whose gradients are averaged before its step.
        gradient_clip: largest norm of the gradient of each network; None for no clipping.
        ema_decay: see :class:`DiffusionModule`; one update a step of the student. 0.9999 on every batch in the papers.

    Attributes:
        teacher: the frozen teacher, not a submodule.
        fake_score: F.
        discriminator: the discriminator.
        ratio: the normalised density ratio, with its buffer.
        iteration: turns done, int64.
        student_step: those of the student.
        last_step: of the last turn of the student: ``sigma``, ``loss``, ``log_ratio`` (the logits) and ``weight``
            (h with mean 1), ``[B]``.

    Shapes:
        batches are images ``[B, C, H, W]`` in [-1, 1], or (images, labels int64 ``[B]``).

    Raises:
        ValueError: if a setting is out of range or unknown, or networks do not fit each other.
    """

    is_one_step_generator = True
    teacher: EDMDenoiser
    discriminator: nn.Module

    def __init__(
        self,
        teacher: Source,
        student: Source | None = None,
        fake_score: Source | None = None,
        discriminator: nn.Module | str | None = None,
        sigma_data: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        time_embedding: TimeEmbedding | None = None,
        divergence: Divergence | str | Mapping[str, Any] = "forward_kl",
        objective: Objective | str | Mapping[str, Any] = "vsd",
        noise: NoiseDistribution | str | Mapping[str, Any] = "karras",
        fake_noise: NoiseDistribution | str | Mapping[str, Any] | None = None,
        fake_weighting: Weighting | str | Mapping[str, Any] = "edm",
        ratio_bounds: tuple[float, float] | None = (0.1, 20.0),
        ratio_bins: int = 10,
        ratio_rate: float = 0.0,
        features: Literal["teacher", "fake"] = "teacher",
        feature_layers: Sequence[str] = ("mid_block",),
        shape: tuple[int, int, int] | None = None,
        gan_weight: float = 1e-3,
        r1_weight: float = 0.0,
        r1_scale: float = 0.1,
        student_every: int = 5,
        lr: float = 1e-4,
        fake_lr: float | None = None,
        discriminator_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        accumulate: int = 1,
        gradient_clip: float | None = None,
        ema_decay: float | None = 0.999,
    ) -> None:
        # Before any network is loaded.
        check_numbers("[0, inf)", gan_weight=gan_weight, r1_weight=r1_weight, r1_scale=r1_scale)
        check_numbers("[0, inf)", weight_decay=weight_decay)
        check_numbers("(0, inf)", lr=lr, **given(fake_lr=fake_lr, discriminator_lr=discriminator_lr))
        check_pairs("[0, 1)", betas=betas)
        check_choice("features", features, "teacher", "fake")
        if time_embedding is not None:
            check_choice("time_embedding", time_embedding, "edm", "consistency")
        asked = {
            "sigma_data": sigma_data,
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "time_embedding": time_embedding,
        }
        loaded = denoiser_from(teacher, "teacher", asked)
        if is_one_step_generator(teacher, loaded):
            raise ValueError("teacher is a one-step generator itself: distil a diffusion model.")
        if isinstance(teacher, nn.Module):
            loaded = loaded.copy(loaded.boundary)
        levels = {name: loaded.settings[name] for name in DEFAULTS}
        boundary = levels["time_embedding"] == "consistency"
        generator = loaded.copy(boundary) if student is None else denoiser_from(student, "student", levels, boundary)
        super().__init__(generator, ema_decay, student_every, accumulate, gradient_clip)
        self.fake_score = (
            loaded.copy(loaded.boundary) if fake_score is None else denoiser_from(fake_score, "fake_score", levels)
        )
        check_alike(loaded, student=generator, fake_score=self.fake_score)
        self.hold_frozen("teacher", loaded)
        self.sigma_min, self.sigma_max = loaded.sigma_min, loaded.sigma_max
        self.divergence = Divergence.of(divergence, "divergence")
        self.objective = Objective.of(objective, "objective")
        self.noise = NoiseDistribution.of(noise, "noise")
        self.fake_noise = self.noise if fake_noise is None else NoiseDistribution.of(fake_noise, "fake_noise")
        self.fake_weighting = Weighting.of(fake_weighting, "fake_weighting")
        self.ratio = DensityRatio(ratio_bounds, ratio_bins, ratio_rate)
        self.gan_weight, self.r1_weight, self.r1_scale = gan_weight, r1_weight, r1_scale
        self.lr, self.fake_lr = lr, lr if fake_lr is None else fake_lr
        self.discriminator_lr = lr if discriminator_lr is None else discriminator_lr
        self.betas, self.weight_decay = betas, weight_decay
        self.discriminator = self._discriminator_of(discriminator, features, feature_layers, shape)
        self._teacher_to_load = remembered_source(teacher)
        named = ("divergence", "objective", "noise", "fake_noise", "fake_weighting")
        self.save_hyperparameters(
            ignore=["teacher", "student", "fake_score", "discriminator", "feature_layers", *named]
        )
        self.remember(**{name: getattr(self, name) for name in named}, feature_layers=list(feature_layers), **levels)
        self.remember(teacher=remembered_teacher(loaded, teacher), network=network_setting(generator))
        self.remember(
            student=None if student is None else remembered(generator),
            fake_score=None if fake_score is None else remembered(self.fake_score),
            discriminator=None if discriminator is None else UNNAMED,
        )

    def _discriminator_of(
        self, module: nn.Module | str | None, features: str, layers: Sequence[str], shape: tuple[int, ...] | None
    ) -> nn.Module:
        if isinstance(module, nn.Module):
            return module
        if module is not None:
            raise ValueError(
                f"discriminator={module!r}: it must be a module, or None. One that was given as an object is not in "
                "the checkpoint: give it again, FDistill.load_from_checkpoint(path, discriminator=...)."
            )
        return FeatureDiscriminator(self.teacher if features == "teacher" else self.fake_score, layers, shape)

    # --------------------------------------------------------------------------------------------------------- turns

    def student_loss(self, images: Tensor, class_labels: Tensor | None) -> Tensor:
        """The loss of as many samples of the student as there are images; a number with gradient in the student."""
        self._modes(student=True)
        noise = self.draw_noise(images, self.noise)
        x = self.denoiser(noise.start, self.denoiser.sigma_max, class_labels)
        noisy = noise.on(x)
        seen = noisy, noise.sigma, class_labels
        with torch.set_grad_enabled(self.objective.differentiates_networks):
            x_teacher, x_fake = self.teacher(*seen), self.fake_score(*seen)
        with torch.set_grad_enabled(self.gan_weight > 0 or self.objective.differentiates_ratio):
            logits = self.discriminator(*seen)
        batch = self._weighted(x, noisy, noise.sigma, x_teacher, x_fake, logits)
        losses = self.objective.loss(batch) + self.gan_weight * gan_losses(logits)
        self._log_student(batch, losses, logits)
        return losses.mean()

    def _weighted(
        self, x: Tensor, noisy: Tensor, sigma: Tensor, x_teacher: Tensor, x_fake: Tensor, logits: Tensor
    ) -> StudentBatch:
        """The student's samples with their density ratios, normalised twice."""
        logits = logits if self.objective.differentiates_ratio else logits.detach()
        if self.divergence.is_unweighted:
            ratio = self.ratio.clipped(logits)
            scale = ratio.new_ones(())
        else:
            positions = karras_positions(sigma, self.sigma_min, self.sigma_max)
            ratio = self.ratio(logits, positions, self.sum_over_replicas)
            scale = self.ratio.scale_of(self.divergence.h(ratio), self.sum_over_replicas)
        return StudentBatch(x, noisy, sigma, x_teacher, x_fake, self.divergence, ratio, scale)

    def others_loss(self, images: Tensor, class_labels: Tensor | None) -> Tensor:
        """The losses of the fake score and the discriminator, which share no parameter, added; a number."""
        self._modes(student=False)
        with torch.no_grad():
            noise = self.draw_noise(images, self.fake_noise)
            x = self.denoiser(noise.start, self.denoiser.sigma_max, class_labels)
            noisy = noise.on(x)
        of_real = self.draw_noise(images, self.fake_noise)
        discriminator = self._discriminator_losses(noisy, noise.sigma, of_real.on(images), of_real.sigma, class_labels)
        self.fake_score.train()
        error = pixel_mean((self.fake_score(noisy, noise.sigma, class_labels) - x).square())
        fake = self.fake_weighting(noise.sigma, self.teacher.sigma_data) * error
        self._log("loss_fake", fake.mean(), len(x), prog_bar=True)
        self._log("loss_discriminator", discriminator.mean(), len(x))
        return fake.mean() + discriminator.mean()

    def _discriminator_losses(
        self, fake: Tensor, fake_sigma: Tensor, real: Tensor, real_sigma: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        """The loss of each pair of a fake and a real noisy image, ``[B]``."""
        parts, sigmas = [fake, real], [fake_sigma, real_sigma]
        if self.r1_weight:
            parts.append(real + self.r1_scale * torch.randn_like(real))
            sigmas.append(real_sigma)
        labels = None if class_labels is None else class_labels.repeat(len(parts))
        logits = self.discriminator(torch.cat(parts), torch.cat(sigmas), labels).chunk(len(parts))
        losses = discriminator_losses(logits[0], logits[1])
        right = torch.cat([logits[0] < 0, logits[1] > 0]).float().mean()
        self._log("discriminator_accuracy", right, len(fake))
        if self.r1_weight:
            losses = losses + self.r1_weight * (logits[1].float() - logits[2].float()).square()
        return losses

    def draw_noise(self, images: Tensor, distribution: NoiseDistribution) -> Noise:
        """The random numbers of one turn, from the default generator."""
        level = initial_noise_level(self.denoiser)
        sigma = distribution.sample(len(images), self.sigma_min, self.sigma_max, images.device)
        return Noise(level * torch.randn_like(images), sigma.to(images.dtype), torch.randn_like(images))

    # ------------------------------------------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self._teacher_to_load is not None:
            bring_back(self.teacher, self._teacher_to_load)
            self._teacher_to_load = None

    def _modes(self, student: bool) -> None:
        """Whoever is not trained now is in evaluation mode; the fake score is until its own pass begins."""
        self.denoiser.train(student)
        self.fake_score.eval()
        self.discriminator.train(not student)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings = {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}
        others = [
            {"params": [*self.fake_score.parameters()], "lr": self.fake_lr},
            {"params": [*self.discriminator.parameters()], "lr": self.discriminator_lr},
        ]
        return [AdamW(self.denoiser.parameters(), **settings), AdamW(others, **settings)]  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------- sampling and logging

    def draw(
        self,
        denoiser: EDMDenoiser,
        noise: Tensor,
        class_labels: Tensor | None,
        steps: int | None,
        source: torch.Generator,
    ) -> Tensor:
        if steps not in (None, 1):
            raise ValueError(f"steps={steps}: a student of f-distill makes images in one step.")
        return denoiser(initial_noise_level(denoiser) * noise, denoiser.sigma_max, class_labels)

    @torch.no_grad()
    def _log_student(self, batch: StudentBatch, losses: Tensor, logits: Tensor) -> None:
        size, h = len(losses), batch.divergence.h(batch.ratio)
        self.last_step = {
            "sigma": batch.sigma,
            "loss": losses.detach(),
            "log_ratio": logits.detach().float(),
            "weight": batch.h.detach(),
        }
        self._log("loss_student", losses.mean(), size, prog_bar=True)
        self._log("h_min", h.min(), size)
        self._log("h_mean", h.mean(), size)
        self._log("h_max", h.max(), size)
        self._log("effective_samples", h.sum() ** 2 / h.square().sum(), size)
        self._log("ratio_clipped", self.ratio.clipped_fraction, size)
        self._log("score_gap", (batch.teacher - batch.fake).abs().mean(), size)

    def _log(self, name: str, value: Tensor, size: int, prog_bar: bool = False) -> None:
        self.log(f"train/{name}", value.detach(), on_step=False, on_epoch=True, prog_bar=prog_bar, batch_size=size)

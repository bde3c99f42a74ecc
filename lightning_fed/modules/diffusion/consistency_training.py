"""Consistency models: one-step generators, trained from data alone or distilled from a diffusion model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import RAdam

from lightning_fed.checks import check_counts, check_kinds, check_numbers, check_pairs, given
from lightning_fed.modules.diffusion.denoiser import EDMDenoiser, TimeEmbedding, like_images
from lightning_fed.modules.diffusion.diffusion_module import Batch, DiffusionModule
from lightning_fed.modules.diffusion.distillation_networks import UNNAMED
from lightning_fed.modules.diffusion.frozen import HoldsFrozen
from lightning_fed.modules.diffusion.noise_pairs import EasyPairs, NoisePair, NoisePairs
from lightning_fed.modules.diffusion.pipelines import GRID, PipelineCalls, consistency_call, grid_sigma, grid_timestep
from lightning_fed.modules.diffusion.pretrained import is_one_step_generator, load_denoiser, network_setting
from lightning_fed.modules.diffusion.sampling import consistency_steps, flow_step

HUBER_SCALE = 0.00054  # of iCT: c = 0.00054 sqrt(numbers of an image)


class ConsistencyTraining(HoldsFrozen, DiffusionModule):
    """Improved consistency training (Song, Dhariwal 2023, arXiv 2310.14189), distillation, and easy consistency tuning.

    The model f maps every point of the probability flow's trajectory to its end, the image; at ``sigma_min`` it is the
    identity, exactly. With a pair of noise levels a < b, an image x and one noise z for both::

        loss = weight d(f(x + b z; b), stop_gradient f(x + a z; a)),    d = sqrt(||.||^2 + c^2) - c

    The target has the same weights (no moving average) and the same dropout mask. Logged: ``train/loss``,
    ``train/discretization_steps`` (the levels N(k) of the grid), and ``val/loss`` with the finest pairs and noise that
    is the same in every epoch.

    ======================================== =============================================================
    what                                     settings
    ======================================== =============================================================
    improved consistency training            the defaults, with a ``network``
    consistency distillation                 ``teacher``, ``pairs="fixed"`` or ``"doubling"``
    easy consistency tuning                  ``network`` of a diffusion model, ``pairs="easy"``, ``huber_c=0``
    ======================================== =============================================================

    Args:
        network: a diffusers model, its configuration, or a folder, hub name or checkpoint to start from; see
            :func:`~lightning_fed.modules.diffusion.load_denoiser`. None: a copy of the teacher's.
        teacher: of consistency distillation (Song et al. 2023, arXiv 2303.01469, algorithm 2), anything of which a
            denoiser is loaded: the target's point is one step of Heun's method on its probability flow from b to a. It
            is not in checkpoints, and not needed to sample; a fit loads it again from where it was.
        sigma_data: standard deviation of the data; None: that of what is loaded, or 0.5.
        sigma_min: smallest noise level; None likewise, or 0.002.
        sigma_max: largest; None likewise, or 80.
        time_embedding: must be that of the network that training starts from. One with ``"edm"`` cannot be exported:
            diffusers knows consistency models with ``"consistency"`` only.
        pairs: ``"doubling"``, ``"fixed"``, ``"easy"``, or one of :class:`~lightning_fed.modules.diffusion.NoisePairs`.
        huber_c: c of the pseudo-Huber distance; None: ``0.00054 sqrt(C H W)``. 0 is the norm.
        total_steps: K, optimizer steps of the whole training, over which the pairs become finer; None: those that the
            Trainer is set to do.
        lr: of RAdam, constant, without weight decay.
        betas: of RAdam.
        ema_decay: see :class:`DiffusionModule`. 0.99993 is for CIFAR-10, 0.99997 for ImageNet-64.
        sampling_sigmas: noise levels of the second and further steps of sampling, decreasing. 0.821 is the one for
            CIFAR-10, 1.526 for ImageNet-64. The nearest levels of the exported pipeline are taken, 2 % apart or less.
            Samples are drawn in one step unless more are asked for.

    Shapes:
        batches are images ``[B, C, H, W]`` in [-1, 1], or (images, labels int64 ``[B]``).

    Raises:
        ValueError: if a setting is out of range or does not fit what is loaded; when a fit begins, if its teacher
            cannot be loaded or does not fit, or it has no end and ``total_steps`` is not given.
    """

    is_one_step_generator = True

    def __init__(
        self,
        network: nn.Module | dict[str, Any] | str | Path | None = None,
        teacher: nn.Module | str | Path | None = None,
        sigma_data: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        time_embedding: TimeEmbedding = "consistency",
        pairs: NoisePairs | str | Mapping[str, Any] = "doubling",
        huber_c: float | None = None,
        total_steps: int | None = None,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        ema_decay: float | None = 0.99993,
        sampling_sigmas: Sequence[float] = (0.821,),
    ) -> None:
        levels = {"sigma_data": sigma_data, "sigma_min": sigma_min, "sigma_max": sigma_max}
        loaded: EDMDenoiser | None = None
        # A module from a checkpoint has its network and levels, and samples without the teacher.
        if isinstance(teacher, nn.Module) or (teacher is not None and (network is None or None in levels.values())):
            loaded = load_teacher(teacher, levels)
            levels = {name: loaded.settings[name] for name in levels}
        start = loaded.copy(boundary=True) if network is None and loaded is not None else network
        denoiser = load_denoiser(start, **levels, time_embedding=time_embedding, boundary=True)  # type: ignore[arg-type]
        super().__init__(denoiser, ema_decay)
        self.pairs = NoisePairs.of(pairs, "pairs")
        self.huber_c, self.total_steps = huber_c, total_steps
        self.lr, self.betas = lr, betas
        self.sampling_sigmas = self._levels_of_export(sampling_sigmas)
        self.teacher: EDMDenoiser | None = None
        named = str(teacher) if isinstance(teacher, Path) else teacher
        self._teacher_source = UNNAMED if isinstance(teacher, nn.Module) else named
        self._check_settings()
        if loaded is not None:
            self._hold_teacher(loaded)
        self.save_hyperparameters(ignore=["network", "teacher", "pairs", "sampling_sigmas"])
        self.remember(network=network_setting(denoiser), teacher=self._teacher_source, pairs=self.pairs)
        self.remember(sampling_sigmas=list(self.sampling_sigmas))
        self.remember(**{key: value for key, value in denoiser.settings.items() if key != "boundary"})

    def _check_settings(self) -> None:
        check_numbers("[0, inf)", lr=self.lr)
        check_pairs("[0, 1)", betas=self.betas)
        check_counts(**given(total_steps=self.total_steps))
        check_numbers(**given(huber_c=self.huber_c))
        if self.huber_c is not None and self.huber_c < 0:
            raise ValueError(f"huber_c={self.huber_c} must not be negative; 0 is the norm, None the paper's value.")
        if self._teacher_source is not None and isinstance(self.pairs, EasyPairs):
            raise ValueError(
                "pairs='easy' with a teacher: easy consistency tuning starts from a diffusion model and then has no "
                "teacher. Pass it as network, or use pairs='fixed' or 'doubling'."
            )

    def _levels_of_export(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        check_kinds((list, tuple), sampling_sigmas=sigmas)
        for sigma in sigmas:
            check_numbers("(0, inf)", sampling_sigmas=sigma)
        low, high = self.denoiser.sigma_min, self.denoiser.sigma_max
        inside = all(low < sigma < high for sigma in sigmas)
        timesteps = [grid_timestep(self.denoiser, sigma) for sigma in sigmas] if inside else []
        if not inside or any(left >= right for left, right in pairwise([0, *timesteps, GRID - 1])):
            raise ValueError(
                f"sampling_sigmas={tuple(sigmas)} must decrease, by 2 % or more, between sigma_max={high} and "
                f"sigma_min={low}; () for one-step sampling only."
            )
        return tuple(grid_sigma(self.denoiser, timestep) for timestep in timesteps)

    # ------------------------------------------------------------------------------------------------------ teacher

    def _hold_teacher(self, teacher: EDMDenoiser) -> None:
        for name in ("num_classes", "sample_shape"):
            of_teacher, of_network = getattr(teacher, name), getattr(self.denoiser, name)
            if of_teacher != of_network:
                raise ValueError(
                    f"the teacher has {name}={of_teacher}, the network {of_network}: take a network like the "
                    "teacher's, or leave network out to start from a copy of it."
                )
        self.hold_frozen("teacher", teacher)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage not in ("fit", "validate") or self._teacher_source is None or self.teacher is not None:
            return
        if self._teacher_source == UNNAMED:
            raise ValueError(
                "this model was distilled from a teacher that was given as an object, which checkpoints do not hold. "
                "To train it further, give it again: ConsistencyTraining.load_from_checkpoint(path, teacher=...)."
            )
        settings = self.denoiser.settings
        try:
            teacher = load_teacher(
                self._teacher_source, {name: settings[name] for name in ("sigma_data", "sigma_min", "sigma_max")}
            )
        except ValueError as error:
            raise ValueError(
                f"teacher={self._teacher_source!r} is needed for training (not for sampling): {error} Or give "
                "another one: ConsistencyTraining.load_from_checkpoint(path, teacher=...)."
            ) from error
        self._hold_teacher(teacher)

    # ----------------------------------------------------------------------------------------------------- training

    def on_fit_start(self) -> None:
        super().on_fit_start()
        planned = self.trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if math.isinf(planned):
            raise ValueError(
                "total_steps=None, but this Trainer has neither max_steps nor max_epochs, or the data no length: set "
                "total_steps to the optimizer steps over which the noise levels of a pair come closer."
            )
        self._planned_steps = int(planned)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = self.images_and_labels(batch)
        resolution = self.pairs.resolution(self.steps_done, self._planned_steps)
        pair = self._draw_pairs(images, resolution)
        loss = self.loss(images, pair, torch.randn_like(images), labels)
        self.last_step = {"sigma": pair.upper, "loss": loss.detach()}
        self.log("train/loss", loss.mean(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        self.log("train/discretization_steps", float(resolution), on_step=True, on_epoch=False, batch_size=len(images))
        return loss.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = self.images_and_labels(batch)
        with self.same_noise(batch_idx):
            pair, noise = self._draw_pairs(images, self.pairs.finest), torch.randn_like(images)
        loss = self.loss(images, pair, noise, labels, self.generator).mean()
        self.log("val/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(images))

    def loss(
        self,
        images: Tensor,
        pair: NoisePair,
        noise: Tensor,
        class_labels: Tensor | None = None,
        denoiser: EDMDenoiser | None = None,
    ) -> Tensor:
        """The weighted distance of each image's two estimates, ``[B]``; it has a gradient at the upper level only."""
        f = denoiser or self.denoiser
        a, b = (like_images(level, images) for level in (pair.lower, pair.upper))
        upper_point, lower_point = images + b * noise, images + a * noise
        if self.teacher is not None:
            with torch.no_grad():
                lower_point = flow_step(self.teacher, upper_point, pair.upper, pair.lower, class_labels)
        masks = random_state(images.device)
        # The trained pass comes first: autocast would keep the weights that it casts without gradients.
        estimate = f(upper_point, pair.upper, class_labels)
        with torch.no_grad(), replayed(masks, images.device):
            # Where a is 0, f is the identity at sigma_min: the target is the image.
            target = f(lower_point, pair.lower.clamp(min=f.sigma_min), class_labels)
        c = HUBER_SCALE * math.sqrt(images[0].numel()) if self.huber_c is None else self.huber_c
        return pair.weight * pseudo_huber(estimate, target, c)

    def _draw_pairs(self, images: Tensor, resolution: int) -> NoisePair:
        like = images.new_empty(0, dtype=torch.promote_types(images.dtype, torch.float32))
        return self.pairs.draw(len(images), resolution, self.denoiser.sigma_min, self.denoiser.sigma_max, like)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return RAdam(self.denoiser.parameters(), lr=self.lr, betas=self.betas)

    # ----------------------------------------------------------------------------------------------------- sampling

    def draw(
        self,
        denoiser: EDMDenoiser,
        noise: Tensor,
        class_labels: Tensor | None,
        steps: int | None,
        source: torch.Generator,
    ) -> Tensor:
        further = 0 if steps is None else steps - 1
        if not 0 <= further <= len(self.sampling_sigmas):
            raise ValueError(
                f"steps={steps}, but sampling_sigmas={self.sampling_sigmas} are noise levels for 1 to "
                f"{1 + len(self.sampling_sigmas)} steps: give one more level for each further step."
            )
        return consistency_steps(denoiser, noise, class_labels, self.sampling_sigmas[:further], source)

    def pipeline_calls(self) -> PipelineCalls:
        """Of one step, and of as many more as there are ``sampling_sigmas``."""
        further = range(len(self.sampling_sigmas) + 1)
        return {1 + count: consistency_call(self.denoiser, self.sampling_sigmas[:count]) for count in further}


def pseudo_huber(estimate: Tensor, target: Tensor, c: float) -> Tensor:
    """``sqrt(e + c^2) - c`` with e the squared distance of two samples, over all their numbers; ``[B]``.

    As a quotient: the difference is 0 in float32 long before e is.
    """
    e = (estimate - target).square().flatten(1).sum(dim=1)
    # For c = 0 the root has no gradient at 0.
    return e / ((e + c**2).clamp(min=torch.finfo(e.dtype).tiny).sqrt() + c)


def load_teacher(source: nn.Module | str | Path, levels: Mapping[str, float | None]) -> EDMDenoiser:
    """A teacher of its own parameters, with these noise levels.

    Raises:
        ValueError: if it is none, was trained with other levels, or is a one-step generator.
    """
    if isinstance(source, Mapping):
        raise ValueError("teacher is a configuration: a network with random weights teaches nothing, train it first.")
    teacher = load_denoiser(source, **levels, boundary=False, setting="teacher")  # type: ignore[arg-type]
    if is_one_step_generator(source, teacher):
        raise ValueError(
            "teacher is a one-step generator itself: distil a diffusion model, such as DiffusionTraining makes."
        )
    return teacher.copy(boundary=False) if isinstance(source, nn.Module) else teacher


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of the default generators of the CPU and of a CUDA device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Inside, random numbers are again those after ``state``; afterwards they go on as if nothing had been drawn."""
    cpu, cuda = state
    with torch.random.fork_rng([device] if cuda is not None else []):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield

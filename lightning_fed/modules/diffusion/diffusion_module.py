"""What the modules of this folder share: a denoiser that is trained, its average, sampling, and the way to diffusers.

Shapes: B = samples, C, H, W = channels, height and width of an image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_fed.checks import check_kinds, check_numbers, given
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.modules.diffusion.denoiser import EDMDenoiser
from lightning_fed.modules.diffusion.named import Named
from lightning_fed.modules.diffusion.pipelines import PipelineCalls, pipeline_of, save_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Batch = Tensor | tuple[Tensor, ...] | list[Tensor]
VALIDATION_SEED = 0
# Under which a checkpoint names the class that wrote it.
CLASS_KEY = "diffusion_module"
# And whether that makes images in one step.
ONE_STEP_KEY = "one_step_generator"


class WarmedUpDecay:
    """``average <- d average + (1 - d) model`` with ``d = min(decay, (1 + k) / (10 + k))`` at the k-th update.

    Args:
        decay: in [0, 1), of late updates.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, averages: Any, values: Any, num_averaged: Tensor | int) -> None:
        k = int(num_averaged)
        torch._foreach_lerp_(list(averages), list(values), 1 - min(self.decay, (1 + k) / (10 + k)))


class DiffusionModule(LightningModule):
    """A LightningModule around one denoiser, from which images are sampled.

    Random numbers of training come from torch's default generators, which differ between the ranks of a fit.

    Args:
        denoiser: what is trained and sampled from.
        ema_decay: of an exponential moving average of the denoiser, one update a step of its optimizer, from which
            samples are drawn; None for no average. It warms up. A federation keeps none: its consensus model is one.

    Attributes:
        is_one_step_generator: whether the denoiser makes images in one step, and so cannot be a teacher.
        denoiser: the trained denoiser.
        average: its moving average, or None.
        last_step: what monitors draw of the last training step, detached: ``sigma`` and ``loss``, ``[B]`` each, and
            more where a subclass says so.

    Raises:
        ValueError: if ``ema_decay`` is not in [0, 1).
    """

    is_one_step_generator: ClassVar[bool] = False

    def __init__(self, denoiser: EDMDenoiser, ema_decay: float | None) -> None:
        super().__init__()
        check_kinds(EDMDenoiser, denoiser=denoiser)
        check_numbers(**given(ema_decay=ema_decay))
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} must be in [0, 1), or None for no average.")
        # A network that was loaded comes in evaluation mode, in which Lightning would leave it.
        self.denoiser = denoiser.train()
        self.average: AveragedModel | None = None
        if ema_decay is not None:
            self.average = AveragedModel(denoiser, multi_avg_fn=WarmedUpDecay(ema_decay))
            self.average.requires_grad_(False)
        self.last_step: dict[str, Tensor] = {}
        self._steps_averaged = 0
        self._has_looked = False

    def remember(self, **settings: Any) -> None:
        """Put settings among the hyperparameters in a form that checkpoints can load safely."""
        plain = {key: value.plain() if isinstance(value, Named) else value for key, value in settings.items()}
        self.hparams.update(plain)
        self.hparams_initial.update(plain)

    # ---------------------------------------------------------------------------------------------------- sampling

    @property
    def generator(self) -> EDMDenoiser:
        """What samples are drawn from: the average if there is one that has begun, else the denoiser."""
        if self.average is not None and self.average.n_averaged > 0:
            return self.average.module  # type: ignore[return-value]
        return self.denoiser

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """The denoised images ``[B, C, H, W]`` of :attr:`generator`."""
        return self.generator(x, sigma, class_labels)

    @torch.no_grad()
    def sample(
        self,
        num: int,
        class_labels: Tensor | Sequence[int] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Draw images, without a trace in the module or in the random numbers of training.

        Args:
            num: images, B.
            class_labels: integers ``[B]`` for a network that knows classes; by default they take turns.
            steps: of the sampler; None for the module's own default.
            seed: of the noise, which is drawn on the CPU; the same seed gives what the exported pipeline gives. None
                draws one.
            shape: of an image, for networks that do not tell.

        Returns:
            float32 ``[B, C, H, W]`` on the module's device, in the range of the data, not clamped.

        Raises:
            ValueError: if the shape is unknown or does not fit, likewise the labels, or the module has no sampler with
                so many steps.
        """
        if num < 1:
            raise ValueError(f"num={num} must be at least 1.")
        shape = shape or self.generator.sample_shape
        if shape is None:
            raise ValueError("shape=None: this network has no sample_size and in_channels, so pass shape=(C, H, W).")
        self.generator.check_images(shape)
        noise_source = torch.Generator()
        noise_source.seed() if seed is None else noise_source.manual_seed(seed)
        labels = self._labels_to_sample(num, class_labels)
        denoiser = self.generator
        modes = [(module, module.training) for module in denoiser.modules()]
        denoiser.eval()
        try:
            noise = torch.randn((num, *shape), generator=noise_source).to(self.device)
            return self.draw(denoiser, noise, labels, steps, noise_source)
        finally:
            for module, mode in modes:
                module.training = mode

    @abstractmethod
    def draw(
        self,
        denoiser: EDMDenoiser,
        noise: Tensor,
        class_labels: Tensor | None,
        steps: int | None,
        source: torch.Generator,
    ) -> Tensor:
        """From unit noise ``[B, C, H, W]`` to images.

        Args:
            denoiser: to use, in evaluation mode.
            noise: standard normal.
            class_labels: ``[B]`` or None.
            steps: of the sampler; None for the default.
            source: of further noise, on the CPU.
        """

    def _labels_to_sample(self, num: int, class_labels: Tensor | Sequence[int] | None) -> Tensor | None:
        num_classes, no_class = self.generator.num_classes, self.generator.no_class
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but the network knows no classes (num_class_embeds).")
            return None
        labels = torch.arange(num) % num_classes if class_labels is None else torch.as_tensor(class_labels)
        largest = num_classes - 1 if no_class is None else no_class
        if labels.shape != (num,) or labels.is_floating_point() or labels.min() < 0 or labels.max() > largest:
            raise ValueError(f"class_labels={class_labels} must be {num} integers in 0 .. {largest}.")
        return labels.to(self.device, torch.int64)

    # ---------------------------------------------------------------------------------------------------- diffusers

    def to_pipeline(self, average: bool = True) -> DiffusionPipeline:
        """A pipeline of plain diffusers that draws the same images from the same seed.

        Args:
            average: of the averaged weights, if there are any, or of those that were trained last.

        Raises:
            ValueError: if diffusers has no pipeline for this denoiser; the message names the setting.
        """
        return pipeline_of(self.generator if average else self.denoiser)

    def pipeline_calls(self) -> PipelineCalls:
        """How :meth:`to_pipeline` is called to draw what :meth:`sample` draws, by the number of steps.

        The first is the one that is meant, and the model card's example. By default there is one step.
        """
        return {1: {"num_inference_steps": 1}}

    def save_pretrained(self, folder: str | Path, average: bool = True) -> None:
        """Write the folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads; see :meth:`to_pipeline`.

        Its ``README.md`` says how to draw images, and what was trained.

        Raises:
            ValueError: before anything is written, if diffusers has no pipeline for this denoiser.
        """
        denoiser = self.generator if average else self.denoiser
        save_pipeline(denoiser, folder, self.pipeline_calls(), type(self).__name__)

    # ----------------------------------------------------------------------------------------------------- training

    def images_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Images ``[B, C, H, W]``, and labels ``[B]`` if the network knows classes.

        Raises:
            ValueError: if the images do not fit the network, or labels are absent.
        """
        if not isinstance(batch, (Tensor, tuple, list)):
            raise ValueError(f"batches are {type(batch).__name__}: they must be images, or (images, labels).")
        images, labels, *_ = (batch, None) if isinstance(batch, Tensor) else (*batch, None)
        self.denoiser.check_images(tuple(images.shape[1:]))
        num_classes = self.denoiser.num_classes
        if num_classes is not None and labels is None:
            raise ValueError(
                f"the network knows {num_classes} classes, but batches have no labels: let the data give (images, "
                "labels), or make the network without num_class_embeds (a DiT: with num_embeds_ada_norm=0)."
            )
        if not self._has_looked:
            self._has_looked = True
            self._look(images, None if num_classes is None else labels)
        return images, None if num_classes is None else labels

    @contextmanager
    def same_noise(self, batch_idx: int) -> Iterator[None]:
        """Inside, random numbers are those of this validation batch in every epoch; outside, as if none were drawn."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(VALIDATION_SEED + batch_idx)
            yield

    def _look(self, images: Tensor, labels: Tensor | None) -> None:
        """What would need the GPU to wait, once."""
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: transform them to floating point, in [-1, 1].")
        if images.min() >= 0 or images.abs().max() > 1.5:
            rank_zero_warn(
                f"images lie in [{images.min():.3g}, {images.max():.3g}]; diffusion models are trained, and diffusers "
                "shows their samples, in [-1, 1]."
            )
        num_classes = self.denoiser.num_classes
        if labels is not None and num_classes is not None and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"labels are in {labels.min()} .. {labels.max()}, but the network knows {num_classes} classes, from 0."
            )

    def setup(self, stage: str) -> None:
        # Before a federation takes its copies: it would go on with the average of a run before it.
        if stage == "fit" and self.average is not None and self.is_federated:
            self.average.n_averaged.zero_()
            rank_zero_info("ema_decay is not used: samples of a federation come from its consensus model.")

    def on_fit_start(self) -> None:
        if self.average is None or self.is_federated:
            return
        if next(self.average.parameters()).dtype in (torch.float16, torch.bfloat16):
            rank_zero_warn("The average of weights in half precision hardly moves: use precision='bf16-mixed'.")

    def on_train_start(self) -> None:
        # Only now has a run that is resumed got its step.
        self._steps_averaged = self.steps_done
        # All ranks are seeded alike, and would draw one noise for their samples.
        if self.global_rank > 0 and not self.is_federated:
            torch.manual_seed((torch.initial_seed() + self.global_rank) % 2**63)

    @property
    def is_federated(self) -> bool:
        """Whether clients take turns in this module."""
        return isinstance(self.trainer.strategy, FederatedStrategy)

    @property
    def steps_done(self) -> int:
        """Steps of the denoiser's optimizer in this fit and those that it resumes."""
        return self.trainer.global_step

    def on_train_batch_end(self, *args: Any) -> None:
        if self.average is None or self.is_federated or self.steps_done == self._steps_averaged:
            return
        self._steps_averaged = self.steps_done
        self.average.update_parameters(self.denoiser)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS_KEY] = type(self).__name__
        checkpoint[ONE_STEP_KEY] = self.is_one_step_generator

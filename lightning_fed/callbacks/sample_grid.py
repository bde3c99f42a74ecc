"""Pictures of what a generator makes, of the same noise in every epoch.

Shapes: B = samples, C, H, W = channels, height and width of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_fed.callbacks.drawn_samples import diffusion_module, labels_in_turn, speaks
from lightning_fed.callbacks.feature_pass import undisturbed
from lightning_fed.callbacks.figures import figure_directory, new_figure
from lightning_fed.checks import check_counts, check_kinds, check_names, check_paths, given
from lightning_fed.data import GaussianMixtureDataModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_fed.modules.diffusion import DiffusionModule

IMAGES, POINTS = 64, 2000
# Smaller images are enlarged by a whole number to about this side.
SIDE = 48
PADDING = 2
# Of the axes of points; the data lie in [-1, 1].
LIMIT = 1.3


class SampleGrid(Callback):
    """Draws samples with a fixed seed at the end of an epoch: a picture an epoch, of the same noise in each.

    ``samples/epoch=0007.png`` is the picture after seven epochs: images in [-1, 1] in a square grid, row by row, or, of
    points ``[2, 1, 1]``, a scatter plot in fixed axes, with the modes of a
    :class:`~lightning_fed.data.GaussianMixtureDataModule` as crosses. Weights & Biases and TensorBoard get it too,
    under ``prefix``. Training goes on bit by bit as without it. In a federation the consensus model is drawn from. Rank
    zero draws. In ``fast_dev_run`` samples are drawn, and no picture.

    Args:
        every_n_epochs: draw after every so many epochs.
        num: samples; None: 64 images, or 2,000 points.
        steps: of the sampler; None for the module's own default.
        seed: of the noise.
        class_labels: for networks that know classes, taken in turn; None: all classes in turn.
        prefix: under which loggers show the picture. Two callbacks need two.
        directory: of the pictures; by default ``prefix`` in the logger's directory, or in the Trainer's
            ``default_root_dir`` if there is no logger.

    Raises:
        ValueError: if a setting is out of range; at the start of the fit, if the module is no diffusion module, or
            knows no such classes.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        class_labels: Sequence[int] | None = None,
        prefix: str = "samples",
        directory: str | None = None,
    ) -> None:
        check_counts(every_n_epochs=every_n_epochs, **given(num=num, steps=steps))
        check_counts(0, seed=seed)
        check_kinds((list, tuple), **given(class_labels=class_labels))
        for label in class_labels or ():
            check_counts(0, class_labels=label)
        check_names(prefix=prefix)
        check_paths(**given(directory=directory))
        if class_labels is not None and not class_labels:
            raise ValueError("class_labels=[] is empty: name the classes to draw, or leave it out for all of them.")
        self.every_n_epochs, self.num, self.steps, self.seed = every_n_epochs, num, steps, seed
        self.class_labels = None if class_labels is None else list(class_labels)
        self.prefix, self.directory = prefix, directory
        self._images: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        classes = diffusion_module(pl_module, self).generator.num_classes
        if self.class_labels is None:
            return
        if classes is None:
            raise ValueError("class_labels were given, but the network knows no classes (num_class_embeds).")
        if not 0 <= min(self.class_labels) <= max(self.class_labels) < classes:
            raise ValueError(f"class_labels={self.class_labels} must be in 0 .. {classes - 1}.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images = None
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._images = figure_directory(trainer, self.prefix, self.directory)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch + 1
        if done % self.every_n_epochs or not speaks(trainer):
            return
        with undisturbed(trainer, pl_module):
            samples = self._drawn(trainer, diffusion_module(pl_module, self)) if trainer.is_global_zero else None
        if samples is not None and self._images is not None:
            path = self._images / f"epoch={done:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if samples.shape[1:] == (2, 1, 1):
                draw_points(samples, modes_of(trainer)).savefig(path, dpi=100)
            else:
                write_grid(samples, path)
            show(trainer, self.prefix, path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._images is not None and self._images.is_dir():
            rank_zero_info(f"Samples: {self._images}")
        self._images = None

    def _drawn(self, trainer: Trainer, module: DiffusionModule) -> Tensor:
        """``[B, C, H, W]`` on the CPU."""
        num = self.num or (POINTS if module.generator.sample_shape == (2, 1, 1) else IMAGES)
        labels = labels_in_turn(module, 0, num)
        if self.class_labels is not None:
            labels = torch.tensor(self.class_labels)[torch.arange(num) % len(self.class_labels)]
        with trainer.precision_plugin.forward_context():
            return module.sample(num, labels, self.steps, self.seed).float().cpu()


def modes_of(trainer: Trainer) -> Tensor | None:
    """Means ``[M, 2]`` of the Gaussians that the points are drawn from, if they are known."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.means if isinstance(data, GaussianMixtureDataModule) else None


def write_grid(images: Tensor, path: Path) -> None:
    """Write images ``[B, C, H, W]`` in [-1, 1] as one PNG; of more than three channels, the first."""
    from torchvision.utils import make_grid, save_image

    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    enlarged = max(1, SIDE // max(images.shape[-2:]))
    images = images.repeat_interleave(enlarged, dim=-1).repeat_interleave(enlarged, dim=-2)
    # Not finite is black, so that one sees it.
    images = torch.nan_to_num((images + 1) / 2, nan=0, posinf=0, neginf=0).clamp(0, 1)
    columns = int(np.ceil(len(images) ** 0.5))
    save_image(make_grid(images, nrow=columns, padding=PADDING, pad_value=0.5), path)


def draw_points(points: Tensor, modes: Tensor | None = None) -> Figure:
    """Points ``[B, 2, 1, 1]``, and crosses at modes ``[M, 2]``."""
    figure = new_figure(5, 5)
    axes = figure.add_subplot()
    x, y = points.flatten(1).T.numpy()
    axes.scatter(x, y, s=4, alpha=0.5, linewidth=0)
    if modes is not None:
        axes.scatter(modes[:, 0], modes[:, 1], marker="+", s=80, color="0.2", linewidth=1)
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    axes.grid(color="0.92")
    axes.spines[:].set_visible(False)
    return figure


def show(trainer: Trainer, name: str, path: Path) -> None:
    """Show a picture to the loggers that take images, under the same name in every epoch."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            logger.experiment.add_image(name, imread(path)[..., :3], global_step=step, dataformats="HWC")

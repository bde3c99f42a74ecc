"""Samples of a generator in the middle of its training, without a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_fed.callbacks.feature_pass import is_elastic

if TYPE_CHECKING:
    from lightning_fed.modules.diffusion import DiffusionModule


def diffusion_module(module: LightningModule, callback: Callback) -> DiffusionModule:
    """The module that is trained, which samples can be drawn from.

    Raises:
        ValueError: if it is no diffusion module.
    """
    for name in ("sample", "generator", "last_step"):
        if not hasattr(module, name):
            raise ValueError(
                f"{type(callback).__name__} needs a module of lightning_fed.modules.diffusion, but "
                f"{type(module).__name__} has no `{name}`."
            )
    return cast("DiffusionModule", module)


def speaks(trainer: Trainer) -> bool:
    """Whether this rank takes part in a measurement: all do, but where ranks may die, one speaks for all."""
    return trainer.is_global_zero or not is_elastic(trainer)


def labels_in_turn(module: DiffusionModule, start: int, stop: int) -> Tensor | None:
    """Class labels of the samples start to stop, all classes taking turns; None for a network without classes."""
    classes = module.generator.num_classes
    return None if classes is None else torch.arange(start, stop) % classes


def sampled_in_batches(
    trainer: Trainer,
    module: DiffusionModule,
    num: int,
    batch_size: int,
    steps: int | None,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Tensor]:
    """Draw samples under the Trainer's precision, each batch with a seed of its own.

    Args:
        trainer: whose precision.
        module: to draw from.
        num: samples of all ranks together.
        batch_size: of a call; together with the seed it decides which samples these are, not the number of ranks.
        steps: of the sampler; None for the module's own default.
        seed: of the first batch.
        share: ``(rank, ranks)``: each rank draws every ranks-th batch.

    Yields:
        ``[batch_size, C, H, W]``, the last one perhaps smaller.
    """
    for number in range(share[0], -(-num // batch_size), share[1]):
        start = number * batch_size
        stop = min(start + batch_size, num)
        with trainer.precision_plugin.forward_context():
            yield module.sample(stop - start, labels_in_turn(module, start, stop), steps, seed + number)

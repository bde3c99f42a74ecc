"""Callbacks that change gradients before the optimizer's step: in which order, with whom, and what they share."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_fed.federation.strategy import FederatedStrategy


class GradientCallback(Callback):
    """A callback that changes gradients in ``on_before_optimizer_step``: unscaled, reduced, not yet clipped.

    Attributes:
        place: in the order of such callbacks: sharpness-aware minimization (0), which computes the gradient anew;
            projections (1); filters (2). Clipping comes after all of them.
    """

    place = 0

    def check(self, trainer: Trainer) -> None:
        """Refuse two of a kind, a wrong order, and strategies that do not keep whole weights on each rank.

        Raises:
            ValueError: naming the callbacks or the strategy.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        kin = [callback for callback in callbacks if isinstance(callback, GradientCallback)]
        name = type(self).__name__
        if sum(callback.place == self.place for callback in kin) > 1:
            raise ValueError(f"the Trainer has two {name} callbacks, but a step has room for one: leave one out.")
        ordered = sorted(kin, key=lambda callback: callback.place)
        if kin != ordered:
            given, wanted = (", ".join(type(c).__name__ for c in order) for order in (kin, ordered))
            raise ValueError(f"callbacks=[{given}] change gradients in this order, but it must be [{wanted}].")
        strategy = trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FederatedStrategy)):
            raise ValueError(
                f"{name} needs whole weights and gradients on each rank, which {type(strategy).__name__} does not "
                "keep: use strategy='auto', 'ddp' or one of lightning_fed."
            )

    def check_optimizers(self, trainer: Trainer) -> None:
        """Refuse optimizers whose gradients are not there, or still scaled, before their step.

        Raises:
            ValueError: naming the optimizer.
        """
        for optimizer in trainer.optimizers:
            name = f"{type(self).__name__} with {type(optimizer).__name__}"
            if isinstance(optimizer, LBFGS):
                raise ValueError(f"{name}: it evaluates the loss many times in a step. Use a first-order optimizer.")
            if scaler_of(trainer) is not None and _optimizer_handles_unscaling(optimizer):
                raise ValueError(
                    f"{name}(fused=True) under 16-mixed: gradients are still scaled before the step. Set fused=False."
                )


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16 training, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def has_overflowed(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Whether the loss scaler is going to skip this step."""
    found = found_inf(scaler_of(trainer), optimizer)
    return any(bool(flag) for flag in found)


def skip_step(trainer: Trainer, optimizer: Optimizer) -> None:
    """Make the loss scaler skip this step and lower its scale."""
    for flag in found_inf(scaler_of(trainer), optimizer):
        flag.fill_(1.0)


def found_inf(scaler: Any, optimizer: Optimizer) -> list[Tensor]:
    """The scaler's findings about an optimizer's gradients, one a device."""
    if scaler is None or not scaler.is_enabled():
        return []
    return list(scaler._found_inf_per_device(optimizer).values())


def gradients(optimizer: Optimizer) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """The parameters that an optimizer is going to step, with their gradients."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of many tensors as one vector."""
    return torch.linalg.vector_norm(torch.stack(tuple(torch._foreach_norm(tensors))))

"""Which of Lightning's hooks are overridden: others need not be called, and waves of clients cannot serve some."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fed.federation.companion import Companion

IN_A_STEP = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
OF_BATCHES = ("on_train_batch_start", "on_train_batch_end")


def hooks_of_a_step(module: LightningModule, plugin: Precision) -> list[str]:
    """Who wants to see the inside of a local step, as ``Class.hook``.

    If nobody does, Lightning's dispatch of a dozen empty hooks, which costs as much as a small model's step, is left
    out; the arithmetic is the same.
    """
    in_module = (*IN_A_STEP, "backward", "optimizer_zero_grad", "configure_gradient_clipping")
    in_precision = ("optimizer_step", "pre_backward", "backward", "post_backward", "clip_gradients")
    return [
        *overridden_in_callbacks(module, IN_A_STEP),
        *(f"{type(module).__name__}.{hook}" for hook in in_module if is_overridden(hook, module)),
        *(
            f"{type(plugin).__name__}.{hook}"
            for hook in in_precision
            if getattr(type(plugin), hook) not in (getattr(Precision, hook), getattr(MixedPrecision, hook))
        ),
    ]


def shows_batches(module: LightningModule) -> bool:
    """Whether anybody but a training step is shown a joint batch, and may look into it."""
    in_callbacks = overridden_in_callbacks(module, OF_BATCHES)
    return bool(in_callbacks) or any(is_overridden(hook, module) for hook in OF_BATCHES)


def overridden_in_callbacks(module: LightningModule, hooks: tuple[str, ...]) -> list[str]:
    """Of the Trainer's callbacks but the strategy's own, as ``Class.hook``."""
    callbacks: list[Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
    return [
        f"{type(callback).__name__}.{hook}"
        for callback in callbacks
        for hook in hooks
        if not isinstance(callback, Companion) and is_overridden(hook, callback, Callback)
    ]


def has_transfer_hooks(module: LightningModule) -> bool:
    """Whether minibatches must be transferred one client at a time."""
    owners = [owner for owner in (module, module.trainer.datamodule) if owner is not None]  # type: ignore[attr-defined]
    hooks = ("transfer_batch_to_device", "on_after_batch_transfer")
    return any(is_overridden(hook, owner) for hook in hooks for owner in owners)


def precision_context_is_empty(plugin: Precision) -> bool:
    """Whether ``training_step`` runs as it is under this precision, without autocast or another default dtype."""
    return (
        type(plugin).train_step_context is Precision.train_step_context
        and type(plugin).forward_context is Precision.forward_context
    )

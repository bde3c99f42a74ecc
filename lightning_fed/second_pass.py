"""Evaluating a minibatch a second time without a trace: what SAM's pass at the perturbed point needs in Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric

from lightning_fed.federation.client_logs import ignore_log
from lightning_fed.federation.local_step import frozen


@contextmanager
def untraced(module: LightningModule) -> Iterator[None]:
    """Neither ``self.log``, nor metrics, nor buffers, nor random generators notice what runs inside.

    Buffers are put back as they were, BatchNorm's statistics and counters among them, also those that the module has
    replaced by new tensors. Metrics that are no submodules, and loggers that the module calls itself, are not seen.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng(include_cuda=on_gpu(module)))
        stack.enter_context(restored_buffers(module))
        for part in module.modules():
            if isinstance(part, LightningModule):
                stack.enter_context(unlogged(part))
            elif isinstance(part, Metric):
                stack.enter_context(frozen(part))
        yield


@contextmanager
def unlogged(module: LightningModule) -> Iterator[None]:
    """``self.log`` logs nothing."""
    # Dynamo would trace a function that it has not seen, and compile the user's step anew.
    is_compiled = getattr(module, "_compiler_ctx", None) is not None
    module.__dict__["log"] = torch.compiler.disable(ignore_log) if is_compiled else ignore_log
    try:
        yield
    finally:
        del module.__dict__["log"]


@contextmanager
def restored_buffers(module: LightningModule) -> Iterator[None]:
    """All buffers are afterwards what they were, the same tensors with the same values."""
    places = [(part._buffers, name) for part in module.modules() for name in part._buffers]
    buffers = [owner[name] for owner, name in places]
    saved = [None if buffer is None else buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for (owner, name), buffer, before in zip(places, buffers, saved):
                owner[name] = buffer
                if buffer is not None and before is not None:
                    buffer.copy_(before)


class MicroBatch(NamedTuple):
    """What it takes to evaluate a minibatch again.

    Attributes:
        arguments: of ``training_step``.
        random_state: of all generators, as it was just before.
        loss: what was backpropagated the first time, without a loss scale.
    """

    arguments: tuple[Any, ...]
    random_state: dict[str, Any]
    loss: Tensor


def random_state(module: LightningModule) -> dict[str, Any]:
    """The state of all generators that the module's device can draw from."""
    return _collect_rng_states(include_cuda=on_gpu(module))


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    _set_rng_states(state)


def loss_of(output: Any, accumulate: int) -> Tensor | None:
    """The loss to backpropagate, from what ``training_step`` returned; None if it skipped the minibatch."""
    return ClosureResult.from_training_step_output(output, accumulate).closure_loss


def on_gpu(module: LightningModule) -> bool:
    """Whether the module draws random numbers on a CUDA device."""
    return module.device.type == "cuda"

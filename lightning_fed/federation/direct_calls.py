"""What every local step asks of torch, without the wrapping that nobody uses.

On a small model the wrapping costs as much as the arithmetic, which stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer

Closure = Callable[[], Any]


def backpropagate(loss: Tensor) -> None:
    """``loss.backward()``, which for one number need not find out what it is."""
    if type(loss) is not Tensor or loss.dim() or not loss.is_floating_point():
        loss.backward()
        return
    gradient = torch.ones_like(loss)
    _engine_run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def direct_step(optimizer: Optimizer) -> Callable[..., Any]:
    """What ``optimizer.step(closure)`` does at the moment, by the shortest way.

    Torch wraps every ``step`` for profilers and hooks, and its schedulers wrap that once more. The wrapping is left out
    while there is neither profiler nor hook; SGD without momentum is the one line that it comes down to. Hooks,
    profilers and hyperparameters may come and go, so ask again for every joint step.

    Args:
        optimizer: any one.

    Returns:
        Takes the ``closure``, which computes gradients.
    """
    wrapped: Any = type(optimizer).step
    own = vars(optimizer).get("step")
    if not hasattr(wrapped, "hooked") or not hasattr(wrapped, "__wrapped__") or is_watched(optimizer):
        return optimizer.step
    if own is not None:
        if not hasattr(own, "_wrapped_by_lr_sched") or own.__wrapped__ is not wrapped:
            return optimizer.step
        optimizer._opt_called = True  # type: ignore[attr-defined]  # all that the scheduler's wrapping is there for
    if is_plain_sgd(optimizer):
        return partial(step_plain_sgd, optimizer.param_groups)
    return partial(wrapped.__wrapped__, optimizer)


def is_watched(optimizer: Optimizer) -> bool:
    """Whether a profiler or a hook wants to know of an optimizer's steps."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()
    )


def is_plain_sgd(optimizer: Optimizer) -> bool:
    """Whether a step is ``w -= lr * (gradient + weight_decay * w)`` for every group, with torch's default kernels."""
    return type(optimizer) is SGD and all(
        type(group["lr"]) is float
        and type(group["weight_decay"]) in (float, int)
        and not any(group[name] for name in ("momentum", "maximize", "differentiable", "fused"))
        and group["foreach"] is None
        for group in optimizer.param_groups
    )


def step_plain_sgd(groups: list[dict[str, Any]], closure: Closure) -> Any:
    """One step of such an SGD."""
    loss = closure()
    with torch.no_grad():
        for group in groups:
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not stepped:
                continue
            gradients = [parameter.grad for parameter in stepped]
            if group["weight_decay"]:
                gradients = list(torch._foreach_add(gradients, stepped, alpha=group["weight_decay"]))
            torch._foreach_add_(stepped, gradients, alpha=-group["lr"])
    return loss

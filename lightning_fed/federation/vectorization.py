"""What stands against training several clients in one step: found out before it can do harm, and said plainly."""

from __future__ import annotations

import copy
import math
import random
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed.federation.sampler import ClientBatch, JointBatch
from lightning_fed.federation.stacked_functions import leaked

if TYPE_CHECKING:
    from lightning_fed.federation.local_step import LocalStep

PACKAGE = Path(__file__).parents[1]
LIBRARIES = [str(Path(library.__file__).parent) for library in (torch, lightning) if library.__file__] + [str(PACKAGE)]
WAY_OUT = 'set clients_per_step=1, or "auto" to fall back on it.'


class CannotVectorize(RuntimeError):
    """A wave of clients cannot be trained in one step; the message says why, and ends without a full stop."""


# ------------------------------------------------------------------------------------------------------ the settings


def check_vectorized(local_step: LocalStep) -> None:
    """Refuse settings under which the clients of a wave would not train as they do one by one.

    Raises:
        CannotVectorize: naming the setting.
    """
    strategy, module = local_step.strategy, local_step.module
    rule = strategy.local_rule
    if not module.automatic_optimization:
        raise CannotVectorize(f"{type(module).__name__} has automatic_optimization=False, and steps by itself")
    if getattr(module, "_compiler_ctx", None) is not None:
        raise CannotVectorize(f"{type(module).__name__} is compiled, and vmap does not see into compiled code")
    if strategy.ranks_per_client > 1:
        raise CannotVectorize(f"ranks_per_client={strategy.ranks_per_client} trains one client on several ranks")
    if strategy.bank.scaler is not None:
        raise CannotVectorize(
            "precision='16-mixed' scales losses, and lets single clients skip steps: use 'bf16-mixed'"
        )
    if local_step.hooks_in_use:
        raise CannotVectorize(f"{local_step.hooks_in_use[0]} looks into the local step of a single client")
    if rule is not None and not rule.works_on_waves:
        raise CannotVectorize(f"{type(rule).__name__} is a local rule for single clients (works_on_waves=False)")
    if not local_step.gathers:
        check_optimizer(local_step.strategy.optimizers[0])


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose update of a stacked tensor is not that of its parts, as of LAMB, Muon or L-BFGS.

    Found out by trying: copies of the optimizer step two models, apart and stacked.

    Raises:
        CannotVectorize: naming the optimizer.
    """
    name = type(optimizer).__name__
    draw = torch.Generator().manual_seed(0)
    like = [distinct_shapes(group["params"]) for group in optimizer.param_groups]
    points = [[[torch.randn(2, *p.shape, generator=draw).to(p) for p in group] for group in like] for _ in range(4)]
    try:
        stacked = trajectory(optimizer, points)
        for client in range(2):
            own = [[[tensor[client] for tensor in group] for group in point] for point in points]
            for alone, together in zip(trajectory(optimizer, own), stacked):
                if not torch.allclose(together[client], alone, rtol=1e-3, atol=1e-4):
                    raise CannotVectorize(
                        f"the optimizer {name} does not work entry by entry (it may take norms of whole tensors, or "
                        "factor them), so it would mix the clients of a wave"
                    )
    except CannotVectorize:
        raise
    except Exception as error:
        raise CannotVectorize(f"the optimizer {name} does not step stacked clients: {error}") from error


def distinct_shapes(parameters: Sequence[Tensor]) -> list[Tensor]:
    """One parameter of each shape."""
    return list({parameter.shape: parameter for parameter in parameters}.values())


def trajectory(optimizer: Optimizer, points: Sequence[Sequence[Sequence[Tensor]]]) -> list[Tensor]:
    """Where an optimizer with these settings leads some parameters: their start, then a gradient for every step."""
    another = object.__new__(type(optimizer))
    another.__dict__ = {key: copy.copy(value) for key, value in optimizer.__dict__.items() if key != "step"}
    another.__dict__["_optimizer_step_pre_hooks"] = OrderedDict()
    another.__dict__["_optimizer_step_post_hooks"] = OrderedDict()
    start = [[nn.Parameter(tensor.clone()) for tensor in group] for group in points[0]]
    another.state = defaultdict(dict)
    another.param_groups = [
        {**copy.deepcopy({key: value for key, value in group.items() if key != "params"}), "params": parameters}
        for group, parameters in zip(optimizer.param_groups, start)
    ]
    for group in another.param_groups:
        group["lr"] = 0.1  # whatever a schedule begins with
    parameters = [parameter for group in start for parameter in group]
    for gradients in points[1:]:
        for parameter, gradient in zip(parameters, [tensor for group in gradients for tensor in group]):
            parameter.grad = gradient.clone()
        another.step()
    return [parameter.detach() for parameter in parameters]


# ----------------------------------------------------------------------------------------------------- the first wave


class Trial:
    """The first wave of a fit, which is compared with what single clients do, and of which nothing remains if it fails.

    Args:
        local_step: which runs single clients.
        joint: the joint step.
        parts: the wave.
        step: the ``training_step``.
    """

    def __init__(
        self, local_step: LocalStep, joint: JointBatch, parts: Sequence[ClientBatch], step: Callable[..., Any]
    ) -> None:
        self.local_step, self.parts = local_step, parts
        self.bank, self.module = local_step.bank, local_step.module
        joint.unstack()
        self._attributes = [(part, dict(part.__dict__)) for part in self.module.modules()]
        # Buffers go first, because single clients leave no trace in them.
        slots = [self.bank.slot(part.client) for part in parts]
        self._buffers = [(rows, slots, rows.matrix[slots]) for rows in (self.bank.buffers, self.bank.counters)]
        self._alone = {number: local_step.gradient_of(parts[number], step) for number in (0, len(parts) - 1)}
        self._positions = generator_positions()

    def compare(self, losses: Tensor | None) -> None:
        """Check the wave's gradients, before they land.

        Raises:
            CannotVectorize: if a client's gradient is not its own, or if the step has left something behind.
        """
        name = type(self.module).__name__
        for part, before in self._attributes:
            for key, value in part.__dict__.items():
                if value is not before.get(key) and leaked(value):
                    raise CannotVectorize(
                        f"{name}.training_step keeps a tensor in `{type(part).__name__}.{key}`, which would be that of "
                        "all clients of the wave: return it, or log it"
                    )
        for generator, position in generator_positions().items():
            if position != self._positions[generator]:
                raise CannotVectorize(
                    f"{name}.training_step draws from {generator}, which would give all clients of a wave the same "
                    "numbers: draw with torch"
                )
        if losses is None:
            return
        gradients = torch.autograd.grad(losses.sum(), self.bank.parameters, retain_graph=True, allow_unused=True)
        for number, alone in self._alone.items():
            together = [None if gradient is None else gradient[number] for gradient in gradients]
            if (distance := relative_distance(together, alone)) > self._tolerance():
                raise CannotVectorize(
                    f"the gradient of client {self.parts[number].client} differs by {distance:.1%} from the one that "
                    f"{name}.training_step gives it alone: something in it works across the clients of a wave"
                )

    def _tolerance(self) -> float:
        dtype = self.bank.rows.matrix.dtype if self.local_step.context_is_empty else torch.bfloat16
        return float(torch.finfo(dtype).eps ** 0.5)

    def restore(self) -> None:
        """Put back what a wave that failed may have changed."""
        for rows, slots, before in self._buffers:
            rows.matrix[slots] = before
        for part, attributes in self._attributes:
            part.__dict__.clear()
            part.__dict__.update(attributes)


def relative_distance(gradients: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> float:
    """``||g - h|| / ||h||`` of two gradients of a model; None is zero."""
    pairs = [(g, h) for g, h in zip(gradients, others) if g is not None or h is not None]
    differences = [h if g is None else g if h is None else g - h for g, h in pairs]
    distance = norm_of(differences)
    norm = norm_of([h for _, h in pairs])
    return distance / norm if norm else float(distance > 0)


def norm_of(tensors: Sequence[Tensor | None]) -> float:
    """The Euclidean norm over all tensors; None is zero."""
    norms = [float(tensor.double().norm()) for tensor in tensors if tensor is not None]
    return math.hypot(*norms)


def explain(error: Exception, module: LightningModule) -> CannotVectorize:
    """Say what failed under vmap, and where in the user's code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not any(frame.filename.startswith(library) for library in LIBRARIES)]
    where = f" at {own[-1].filename}:{own[-1].lineno} (`{own[-1].line}`)" if own else ""
    reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return CannotVectorize(f"{type(module).__name__}.training_step fails for several clients at once{where}: {reason}")


def generator_positions() -> dict[str, Any]:
    """A mark for each generator that changes when it is drawn from."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return {"Python's `random`": random.getstate()[1:], "`numpy.random`": numpy_state["state"]["pos"]}

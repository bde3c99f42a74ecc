"""What stands against training several clients in one step: found out before it can do harm, and said plainly."""

from __future__ import annotations

import copy
import math
import random
import traceback
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fed.federation.sampler import ClientBatch, JointBatch
from lightning_fed.federation.stacked_functions import leaked

if TYPE_CHECKING:
    from lightning_fed.federation.local_step import LocalStep

PACKAGE = Path(__file__).parents[1]
LIBRARIES = [str(Path(library.__file__).parent) for library in (torch, lightning) if library.__file__] + [str(PACKAGE)]
COLLECTIONS = (list, deque, set, dict, OrderedDict, defaultdict)
TF32_EPS = 2.0**-10
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
    if local_step.gradient_step is None:
        optimizer = local_step.strategy.optimizers[0]
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise CannotVectorize(f"the optimizer {type(optimizer).__name__} has hooks on the steps of single clients")
        check_optimizer(optimizer)


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
        stacked = trajectory(optimizer, points, is_stacked=True)
        for client in range(2):
            own = [[[tensor[client] for tensor in group] for group in point] for point in points]
            for alone, together in zip(trajectory(optimizer, own), stacked):
                if not torch.allclose(together[client], alone, rtol=1e-3, atol=1e-4):
                    raise CannotVectorize(
                        f"the optimizer {name} does not work entry by entry (it may take norms of whole tensors, "
                        "factor them, or be fused, for which clients do not lie close enough), so it would mix the "
                        "clients of a wave"
                    )
    except CannotVectorize:
        raise
    except Exception as error:
        raise CannotVectorize(f"the optimizer {name} does not step stacked clients: {error}") from error


def distinct_shapes(parameters: Sequence[Tensor]) -> list[Tensor]:
    """One parameter of each shape."""
    return list({parameter.shape: parameter for parameter in parameters}.values())


def trajectory(
    optimizer: Optimizer, points: Sequence[Sequence[Sequence[Tensor]]], is_stacked: bool = False
) -> list[Tensor]:
    """Where an optimizer with these settings leads some parameters: their start, then a gradient for every step.

    Raises:
        CannotVectorize: if it counts in its parameter groups, where clients share what is there from the beginning.
    """
    another = object.__new__(type(optimizer))
    another.__dict__ = {key: copy.copy(value) for key, value in optimizer.__dict__.items() if key != "step"}
    another.__dict__["_optimizer_step_pre_hooks"] = OrderedDict()
    another.__dict__["_optimizer_step_post_hooks"] = OrderedDict()
    start = [[nn.Parameter(in_rows(tensor) if is_stacked else tensor.clone()) for tensor in g] for g in points[0]]
    another.state = defaultdict(dict)
    another.param_groups = [
        {**copy.deepcopy({key: value for key, value in group.items() if key != "params"}), "params": parameters}
        for group, parameters in zip(optimizer.param_groups, start)
    ]
    for group in another.param_groups:
        group["lr"] = 0.1  # whatever a schedule begins with
    before = [copy.deepcopy({**group, "params": None}) for group in another.param_groups]
    parameters = [parameter for group in start for parameter in group]
    for gradients in points[1:]:
        for parameter, gradient in zip(parameters, [tensor for group in gradients for tensor in group]):
            parameter.grad = gradient.clone()
        another.step()
    for group, settings in zip(another.param_groups, before):
        for key in settings.keys() - {"params"}:
            if group[key] is not settings[key] and group[key] != settings[key]:
                raise CannotVectorize(f"the optimizer {type(optimizer).__name__} changes {key!r} in its param_groups")
    return [parameter.detach() for parameter in parameters]


def in_rows(tensor: Tensor) -> Tensor:
    """A copy whose parts lie apart, as parameters do in the rows of clients."""
    rows = tensor.new_empty(len(tensor), tensor[0].numel() + 1)
    return rows[:, :-1].view(tensor.shape).copy_(tensor)


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
        held = [value for _, attributes in self._attributes for value in attributes.values()]
        self._contents = [(value, copy.copy(value)) for value in held if type(value) in COLLECTIONS]
        self._slots = [self.bank.slot(part.client) for part in parts]
        self._rows = [rows.matrix[self._slots] for rows in self.bank.matrices]
        self._alone = {number: local_step.gradient_of(parts[number], step) for number in (0, len(parts) - 1)}
        self._restore_rows()
        self._marks = self._marks_of_module()
        self._positions = generator_positions()

    def compare(self, losses: Tensor | None) -> bool:
        """Check the wave's gradients, before they land.

        Returns:
            whether there was something to compare; else the next wave has to be tried too.

        Raises:
            CannotVectorize: if a client's gradient is not its own, or if the step has left something behind.
        """
        name = type(self.module).__name__
        for part in self.module.modules():
            for key, value in part.__dict__.items():
                if leaked(value):
                    raise CannotVectorize(
                        f"{name}.training_step keeps a tensor in `{type(part).__name__}.{key}`, which would be that of "
                        "all clients of the wave: return it, or log it"
                    )
        for place, mark in self._marks_of_module().items():
            if mark != self._marks.get(place):
                raise CannotVectorize(
                    f"{name}.training_step changes `{place}`, which clients share, and would do so once for all "
                    "of the wave: register a persistent int64 or float buffer, so that each client has its own"
                )
        for generator, position in generator_positions().items():
            if position != self._positions[generator]:
                raise CannotVectorize(
                    f"{name}.training_step draws from {generator}, which would give all clients of a wave the same "
                    "numbers: draw with torch"
                )
        if losses is None:
            return False
        try:
            gradients = torch.autograd.grad(losses.sum(), self.bank.parameters, retain_graph=True, allow_unused=True)
        except Exception as error:
            raise explain(error, self.module) from error
        is_conclusive = True
        for number, alone in self._alone.items():
            together = [None if gradient is None else gradient[number] for gradient in gradients]
            if (distance := relative_distance(together, alone)) > self._tolerance():
                raise CannotVectorize(
                    f"the gradient of client {self.parts[number].client} differs by {distance:.1%} from the one that "
                    f"{name}.training_step gives it alone: something in it works across the clients of a wave"
                )
            is_conclusive &= not math.isnan(distance)
        return is_conclusive

    def _tolerance(self) -> float:
        plugin, dtype = self.local_step.strategy.precision_plugin, self.bank.rows.matrix.dtype
        is_of_rows = self.local_step.context_is_empty or isinstance(plugin, (DoublePrecision, HalfPrecision))
        eps = torch.finfo(dtype if is_of_rows else torch.bfloat16).eps
        return max(eps, TF32_EPS if self._may_be_tf32() else 0.0) ** 0.5

    def _may_be_tf32(self) -> bool:
        if self.local_step.device.type != "cuda" or self.bank.rows.matrix.dtype != torch.float32:
            return False
        convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in self.module.modules())
        return torch.backends.cuda.matmul.allow_tf32 or (convolves and torch.backends.cudnn.allow_tf32)

    def _marks_of_module(self) -> dict[str, Any]:
        """Of what clients share in the module, marks that differ if a step has changed it."""
        of_clients = {id(tensor) for rows in self.bank.matrices for tensor in rows.tensors}
        marks: dict[str, Any] = {}
        for name, part in self.module.named_modules():
            for key, value in (part.__dict__ | part._parameters | part._buffers).items():
                if id(value) not in of_clients:
                    marks[f"{name}.{key}" if name else key] = mark(value)
        return marks

    def restore(self) -> None:
        """Put back what a wave that failed may have changed."""
        self._restore_rows()
        for part, attributes in self._attributes:
            part.__dict__.clear()
            part.__dict__.update(attributes)
        for collection, contents in self._contents:
            collection.clear()
            (collection.extend if isinstance(collection, (list, deque)) else collection.update)(contents)

    def _restore_rows(self) -> None:
        self.bank.put_away()  # else copies of rows would be written back afterwards
        for rows, values in zip(self.bank.matrices, self._rows):
            for slot, row in zip(self._slots, values):
                rows.matrix[slot].copy_(row)


def mark(value: Any) -> Any:
    """Something that differs if an attribute of a module has changed, as far as that can be told."""
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if type(value) in COLLECTIONS:
        return len(value)
    return value if isinstance(value, (bool, int, float, str)) else None


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

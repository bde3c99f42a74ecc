"""The local step of many clients at once: one program under ``torch.func.vmap`` for the clients of a wave.

Shapes: M = clients of a wave, P = trainable parameters, B = samples of a minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_fed.federation.direct_calls import backpropagate, direct_step
from lightning_fed.federation.sampler import ClientBatch, JointBatch
from lightning_fed.federation.stacked_batch import StackedBatch
from lightning_fed.federation.stacked_functions import ClientGenerators, StackedFunctions, for_each_client
from lightning_fed.federation.vectorization import CannotVectorize, Trial, explain
from lightning_fed.federation.wave_logs import WaveLogs
from lightning_fed.sharpness import beside

if TYPE_CHECKING:
    from lightning_fed.federation.local_step import LocalStep, Outcome

Place = tuple[dict[str, Any], str]  # where a module holds a tensor: a dictionary and a name in it


class VectorizedStep:
    """Runs waves of clients.

    Args:
        local_step: which runs clients one by one.
    """

    def __init__(self, local_step: LocalStep) -> None:
        self.local_step = local_step
        self.module, self.bank = local_step.module, local_step.bank
        self._tensors = [tensor for rows in self.bank.matrices for tensor in rows.tensors]
        self._places = [list(places_of(tensor, self.module)) for tensor in self._tensors]
        self._parts: Sequence[ClientBatch] = []
        self._batch: StackedBatch | None = None
        self._logs = WaveLogs(local_step.logs)
        self._step: Callable[..., Any] | None = None
        self._is_tried = False

    # ------------------------------------------------------------------------------------------------------- waves

    def waves(self, joint: JointBatch, clients_per_step: int) -> Iterator[list[int]]:
        """Which parts of a joint step go together, as numbers of parts.

        Args:
            joint: the joint step.
            clients_per_step: at most so many together.
        """
        for group in groups_of(joint):
            for start in range(0, len(group), clients_per_step):
                numbers = group[start : start + clients_per_step]
                if self.local_step.gradient_step is not None:
                    yield numbers
                    continue
                first = 0
                for wave in self.bank.waves.split([joint.parts[number].client for number in numbers]):
                    yield numbers[first : first + len(wave)]
                    first += len(wave)

    def run(self, joint: JointBatch, numbers: Sequence[int], optimizer: Optimizer, step: Callable[..., Any]) -> Outcome:
        """The local step of one wave.

        Args:
            joint: the joint step.
            numbers: the wave, as :meth:`waves` has named it.
            optimizer: the only one.
            step: the ``training_step``.

        Returns:
            what the clients' steps have returned.

        Raises:
            CannotVectorize: naming what stands against it. Rows and buffers are then as they were.
        """
        self._parts, self._step = [joint.parts[number] for number in numbers], step
        self._batch = StackedBatch.of(joint, numbers)
        clients = [part.client for part in self._parts]
        local_step, bank = self.local_step, self.bank
        steps, gradient_step = self._parts[0].steps_optimizer, local_step.gradient_step
        trial = None if self._is_tried else Trial(local_step, joint, self._parts, step)
        bank.waves.bind(clients, steps_optimizers=gradient_step is None)
        try:
            with torch.enable_grad():
                outputs = self._evaluate(self._logs)
                if trial is not None:
                    self._is_tried = trial.compare(outputs.loss)
                self._logs.publish(self._batch, clients)
                if outputs.loss is not None:
                    backward = partial(self._backward, outputs.loss)
                    local_step.apply_rule(backward, clients, bank.rows.bound, partial(self._recompute))
            if steps:
                local_step.add_to_gradients(optimizer, clients)
                if gradient_step is not None:
                    gradient_step.gather(clients)
                else:
                    self._clip(optimizer)
                    direct_step(optimizer)(closure=nothing)
        except CannotVectorize:
            if trial is not None:
                trial.restore()
            raise
        finally:
            bank.waves.leave(keeps_gradients=bank.keep_gradients and not steps)
        return outputs.outcome()

    # -------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, logs: WaveLogs) -> Outputs:
        """The wave's losses, at its present parameters.

        Raises:
            CannotVectorize: if vmap, or the step under it, fails.
        """
        assert self._batch is not None
        generators = ClientGenerators(self._seeds, self.local_step.device)
        # Views of rows are not contiguous, and batch_norm under vmap would update a copy of such a buffer.
        given = [tensor if tensor.requires_grad else tensor.contiguous() for tensor in self._tensors]
        outputs = Outputs(self.module.trainer.accumulate_grad_batches)
        logs.begin()

        def of_one_client(*own: Tensor) -> list[Tensor]:
            tensors, leaves = own[: len(given)], own[len(given) :]
            assert self._batch is not None and self._step is not None
            with self._swapped(tensors), logs.recording():
                found = outputs.take(self._step(self._batch.of_one(leaves), *self.local_step.step_arguments()))
                replacements = outputs.find_replaced(self._places, tensors)
            return [*found, *logs.tensors, *replacements]

        try:
            with StackedFunctions(len(self._parts), generators):
                tensors = for_each_client(of_one_client, [*given, *self._batch.leaves])
        except CannotVectorize:
            raise
        except Exception as error:
            raise explain(error, self.module) from error
        outputs.fill(tensors)
        logs.fill(tensors[outputs.size : outputs.size + len(logs.tensors)])
        for number, value in zip(outputs.replaced, tensors[outputs.size + len(logs.tensors) :]):
            given[number] = value.detach()
        for tensor, value in zip(self._tensors, given):
            if value is not tensor:
                tensor.copy_(value)
        return outputs

    @contextmanager
    def _swapped(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the module holds other tensors."""
        for places, tensor in zip(self._places, tensors):
            for owner, name in places:
                owner[name] = tensor
        try:
            yield
        finally:
            for places, original in zip(self._places, self._tensors):
                for owner, name in places:
                    owner[name] = original

    def _seeds(self) -> list[int]:
        return [self.local_step.seed_of(part) for part in self._parts]

    # --------------------------------------------------------------------------------------------------- gradients

    def _backward(self, losses: Tensor) -> Tensor:
        backpropagate(losses.sum())  # each client's parameters are in its own loss alone
        return losses.detach()

    @torch.enable_grad()
    def _recompute(self) -> None:
        """Evaluate the same minibatches at the present rows, leaving no other trace."""
        kept = [rows.bound.clone() for rows in (self.bank.buffers, self.bank.counters)]
        self.bank.clear_gradients()
        losses = self._evaluate(WaveLogs(self.local_step.logs, is_quiet=True)).loss
        assert losses is not None
        self._backward(losses)
        for rows, before in zip((self.bank.buffers, self.bank.counters), kept):
            rows.bound.copy_(before)

    @torch.no_grad()
    def _clip(self, optimizer: Optimizer) -> None:
        """Clip every client's gradient, as Lightning does a single one's."""
        trainer = self.module.trainer
        limit = trainer.gradient_clip_val
        if not limit:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        if trainer.gradient_clip_algorithm == "value":
            torch._foreach_clamp_min_(gradients, -limit)
            torch._foreach_clamp_max_(gradients, limit)
            return
        norms = torch.stack(
            [torch.linalg.vector_norm(gradient.unsqueeze(-1).flatten(1), dim=1) for gradient in gradients]
        )
        factors = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)  # as torch clips
        for gradient in gradients:
            gradient.mul_(beside(factors, gradient))


def nothing() -> None:
    """The closure of an optimizer whose gradients are there."""


class Outputs:
    """What the training steps of a wave have returned.

    Args:
        accumulate: minibatches an optimizer step, by which losses are divided.

    Attributes:
        loss: of each client ``[M]``, with its graph; None if the step has left its minibatch out.
        size: how many tensors were found in the output.
        replaced: the numbers of module tensors that the step has replaced by new ones.
    """

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.loss: Tensor | None = None
        self.size = 0
        self.replaced: list[int] = []
        self._extra: list[Any] = []
        self._structure: TreeSpec | None = None

    def take(self, output: Any) -> list[Tensor]:
        """The tensors of a client's output, the loss first."""
        loss, extra = output, {}
        if not isinstance(output, Tensor):
            result = ClosureResult.from_training_step_output(output)
            loss, extra = result.closure_loss, result.extra
        if loss is None:
            return []
        if loss.numel() != 1:
            raise ValueError(f"training_step has returned a loss of shape {tuple(loss.shape)}, no scalar")
        self._extra, self._structure = tree_flatten(extra)
        tensors = [value for value in self._extra if isinstance(value, Tensor)]
        self.size = 1 + len(tensors)
        return [loss.reshape(()) if loss.dim() else loss, *tensors]

    def find_replaced(self, places: Sequence[Sequence[Place]], tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the module now holds instead of some of the tensors that it was given."""
        now = [owner[name] for (owner, name), *_ in places]
        self.replaced = [number for number, tensor in enumerate(tensors) if now[number] is not tensor]
        return [now[number] for number in self.replaced]

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Take the same tensors of all clients."""
        if self.size:
            self.loss = tensors[0] if self.accumulate == 1 else tensors[0] / self.accumulate
            found = iter(tensors[1 : self.size])
            self._extra = [next(found) if isinstance(value, Tensor) else value for value in self._extra]

    def outcome(self) -> Outcome:
        """The losses of all clients, and what else the last one has returned."""
        if self.loss is None or self._structure is None:
            return None, {}
        last = [value[-1].detach() if isinstance(value, Tensor) else value for value in self._extra]
        return self.loss.detach(), tree_unflatten(last, self._structure)


def groups_of(joint: JointBatch) -> list[list[int]]:
    """The parts of a joint step, as numbers, whose minibatches are alike and equally advanced."""
    parts = joint.parts
    if joint.stacked is not None and len({part.steps_optimizer for part in parts}) == 1:
        return [list(range(len(parts)))]
    groups: dict[Any, list[int]] = {}
    for number, part in enumerate(parts):
        kind = None if joint.stacked is not None else StackedBatch.kind_of(part.batch)
        groups.setdefault((part.steps_optimizer, kind), []).append(number)
    return list(groups.values())


def places_of(tensor: Tensor, module: nn.Module) -> Iterator[Place]:
    """Where a module holds a parameter or a buffer; tied weights are in several places."""
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for name, value in owner.items():
                if value is tensor:
                    yield owner, name

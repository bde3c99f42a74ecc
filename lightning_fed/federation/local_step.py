"""One client's minibatch, and the joint step that is one minibatch of every client of a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_fed.federation.client_logs import ClientLogs
from lightning_fed.federation.companion import Companion
from lightning_fed.federation.gradient_step import GradientStep
from lightning_fed.federation.local_rules import LocalGradient
from lightning_fed.federation.randomness import Stream, derive_seed, seed_generators
from lightning_fed.federation.rounds import finish_joint_step
from lightning_fed.federation.sampler import ClientBatch, JointBatch

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy

Outcome = tuple[Tensor | None, dict[str, Any]]  # a client's loss, and what else its training_step has returned


def average_over_replicas(parameters: list[nn.Parameter], weight: float, group: dist.ProcessGroup) -> None:
    """Average the gradients inside one client, each replica weighted by its share of the minibatch's samples."""
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters],
    )
    flat.mul_(weight)
    dist.all_reduce(flat, group=group)
    for parameter, mean in zip(parameters, _unflatten_dense_tensors(flat, parameters)):
        if parameter.grad is not None:
            parameter.grad = mean.clone()


class LocalStep:
    """Runs the local steps of a fit.

    Args:
        strategy: the federation.
        module: the user's module.
    """

    def __init__(self, strategy: FederatedStrategy, module: LightningModule) -> None:
        self.strategy = strategy
        self.module = module
        self.bank = strategy.bank
        self.logs = ClientLogs(module, on_step=True, on_epoch=False)
        self.joint: JointBatch | None = None
        self.batch_idx = 0
        self._seed, self._replica = strategy.seed, strategy.layout.replica_of_rank(strategy.global_rank)
        self._device = strategy.root_device
        self._part: ClientBatch | None = None
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._step: Callable[..., Any] | None = None
        self._metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
        self._context_is_empty = precision_context_is_empty(strategy.precision_plugin)
        self._takes_batch_idx = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self._manual_steps = 1
        self._outcome: Outcome = None, {}
        self._gradient_step = GradientStep(strategy) if strategy.gathers_gradients else None
        self.is_plain = not self._hooks_in_use()
        owners = [owner for owner in (module, module.trainer.datamodule) if owner is not None]  # type: ignore[attr-defined]
        hooks = ("transfer_batch_to_device", "on_after_batch_transfer")
        self.transfers_plainly = not any(is_overridden(hook, owner) for hook in hooks for owner in owners)

    def _hooks_in_use(self) -> bool:
        """Whether anybody wants to see the inside of a local step.

        If nobody does, Lightning's dispatch of a dozen empty hooks, which costs as much as a small model's step, is
        left out; the arithmetic is the same.
        """
        trainer, plugin = self.module.trainer, self.strategy.precision_plugin
        hooks = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
        in_callbacks = any(
            getattr(type(callback), hook) is not getattr(Callback, hook)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            for hook in hooks
            if not isinstance(callback, Companion)
        )
        own = (*hooks, "backward", "optimizer_zero_grad", "configure_gradient_clipping")
        in_module = any(is_overridden(hook, self.module) for hook in own)
        in_precision = self.bank.scaler is not None or any(
            getattr(type(plugin), name) not in (getattr(Precision, name), getattr(MixedPrecision, name))
            for name in ("optimizer_step", "pre_backward", "backward", "post_backward", "clip_gradients")
        )
        return in_callbacks or in_module or in_precision

    # ------------------------------------------------------------------------------------------------- joint steps

    def run_automatic(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        step: Callable[..., Any],
        lightning: Callable[[Callable[[], Any]], None],
    ) -> None:
        """Automatic optimization: one local step of every client in the joint batch.

        Args:
            optimizer: the only one.
            closure: Lightning's, whose result is going to be read.
            step: the strategy's plain ``training_step``.
            lightning: steps the optimizer with a closure, the way Lightning does.
        """
        assert self.joint is not None
        outcomes: list[Outcome] = []
        for part in self.joint.parts:
            self._enter(part)
            steps = part.steps_optimizer and self._gradient_step is None
            if self.is_plain:
                outcomes.append(self._run_plain(optimizer, step, steps))
            else:
                lightning(closure) if steps else closure()
                if isinstance(closure, Closure) and closure._result is not None:
                    outcomes.append((closure._result.loss, closure._result.extra))
            if part.steps_optimizer and self._gradient_step is not None:
                self.before_optimizer_step(optimizer)
                self._gradient_step.gather()
            elif part.steps_optimizer and self.bank.keep_gradients:
                self.bank.clear_gradients()
        result = mean_result(outcomes)
        if self._gradient_step is not None and self.joint.is_last_of_round:
            self._part = None
            self._gradient_step.step(result.loss, lightning)
        self._finish()
        if isinstance(closure, Closure):
            closure._result = result

    def _run_plain(self, optimizer: Optimizer, step: Callable[..., Any], steps_optimizer: bool) -> Outcome:
        """What Lightning's closure and precision plugin do, without the hooks that nobody uses."""
        self._step = self.module.training_step if self._context_is_empty else step
        if steps_optimizer:
            optimizer.step(closure=partial(self._plain_closure, optimizer))  # type: ignore[arg-type]
        else:
            self._plain_closure(None)
        return self._outcome

    def _plain_closure(self, optimizer: Optimizer | None) -> Tensor | None:
        trainer = self.module.trainer
        with torch.enable_grad():
            assert self._step is not None
            output = self.training_step(self._step, *((self.batch_idx,) if self._takes_batch_idx else ()))
            loss: Tensor | None
            if isinstance(output, Tensor) and trainer.accumulate_grad_batches == 1:
                loss, extra = output, {}
            else:
                result = ClosureResult.from_training_step_output(output, trainer.accumulate_grad_batches)
                loss, extra = result.closure_loss, result.extra
            if loss is not None:
                if not self.bank.keep_gradients:
                    self.bank.clear_gradients()
                self.backward(loss.backward)
        if optimizer is not None:
            self.before_optimizer_step(optimizer)
            if trainer.gradient_clip_val:
                algorithm = trainer.gradient_clip_algorithm or "norm"
                self.module.clip_gradients(optimizer, trainer.gradient_clip_val, algorithm)
        self._outcome = None if loss is None else loss.detach(), extra
        return self._outcome[0]

    def run_manual(self, step: Callable[..., Any], batch: JointBatch, *args: Any, **kwargs: Any) -> Any:
        """Manual optimization: the user's ``training_step`` does everything, once for each client."""
        progress = self.module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        before = progress.total.ready, progress.current.ready
        output = None
        for number, part in enumerate(batch.parts):
            self._enter(part)
            output = self.training_step(step, *args, **kwargs)
            if number == 0:
                self._manual_steps = progress.total.ready - before[0]
        # global_step advances as if for one client, also on a rank whose clients have no work left in this round.
        for tracker, start in zip((progress.total, progress.current), before):
            tracker.ready = tracker.completed = start + self._manual_steps
        self._finish()
        return output

    def _enter(self, part: ClientBatch) -> None:
        self.bank.bind_client(part.client)
        self._part = part
        self._seed_generators(part)

    def _seed_generators(self, part: ClientBatch) -> None:
        assert self.joint is not None
        key = (self._seed, self.joint.round, part.client, part.index, self._replica)
        seed_generators(derive_seed(Stream.LOCAL_STEP, *key), self._device)

    def _finish(self) -> None:
        assert self.joint is not None
        self._part = None
        self.strategy.consensus_is_stale = True
        # What callbacks and hooks draw must not depend on which client this rank has trained last.
        ambient = derive_seed(Stream.ROUND, self._seed, self.joint.round, self.joint.index)
        seed_generators(ambient, self._device)
        joint, self.joint = self.joint, None
        finish_joint_step(self.strategy, joint)

    # -------------------------------------------------------------------------------------------------- one client

    def training_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The user's ``training_step`` on the bound client's minibatch.

        Raises:
            RuntimeError: if it is nobody's turn.
        """
        if self._part is None:
            raise RuntimeError(
                f"{type(self.module).__name__}.optimizer_step has run the closure itself, but it is the strategy that "
                "runs it, once for each client: call optimizer.step(closure=closure) for every batch."
            )
        self._step, self._arguments = step, (args, kwargs)
        with self.logs.capture(self._part.batch):
            return step(self._part.batch, *args, **kwargs)

    def backward(self, backward: Callable[[], Any]) -> Any:
        """Backpropagate; then average inside the client, and let the local rule replace the minibatch's gradient."""
        rule = self.strategy.local_rule
        if rule is None or not rule.needs_automatic_optimization:
            loss = backward()
            self._average()
            return loss
        parameters = self.bank.parameters
        accumulated = [parameter.grad for parameter in parameters]
        self.bank.clear_gradients()
        loss = backward()
        self._average()
        client = self.bank.bound
        assert client is not None
        row = self.bank.rows.matrix[self.bank.slot(client)]
        rule.after_backward(LocalGradient(client, row, parameters, self._recompute))
        for parameter, earlier in zip(parameters, accumulated):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else parameter.grad + earlier
        return loss

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the local rule add to the gradients that the optimizer is going to use."""
        rule, client = self.strategy.local_rule, self.bank.bound
        if rule is None or self._part is None:  # gradients that have met are nobody's own
            return
        assert client is not None
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        places, start = [], 0
        for parameter in self.bank.parameters:
            if id(parameter) in stepped:
                places.append((parameter, slice(start, start + parameter.numel())))
            start += parameter.numel()
        rule.before_optimizer_step(client, places)

    def _average(self) -> None:
        if self.strategy.replicas is not None:
            assert self._part is not None
            average_over_replicas(self.bank.parameters, self._part.weight, self.strategy.replicas)

    @torch.enable_grad()
    def _recompute(self) -> None:
        """Evaluate the same minibatch at the present row, leaving no other trace."""
        assert self._part is not None and self._step is not None
        args, kwargs = self._arguments
        self.bank.clear_gradients()
        self._seed_generators(self._part)
        with self._untraced():
            output = self._step(self._part.batch, *args, **kwargs)
        accumulate = self.module.trainer.accumulate_grad_batches
        loss = ClosureResult.from_training_step_output(output, accumulate).closure_loss
        assert loss is not None
        self.module.backward(self.bank.scaler.scale(loss) if self.bank.scaler is not None else loss)
        self._average()

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Neither ``self.log``, nor metrics, nor buffers notice what runs inside."""
        bank = self.bank
        assert bank.bound is not None
        rows = [matrix.matrix[bank.slot(bank.bound)] for matrix in (bank.buffers, bank.counters)]
        saved = [row.clone() for row in rows]
        with ExitStack() as stack:
            self.module.__dict__["log"] = self.logs.ignored
            stack.callback(self.module.__dict__.pop, "log")
            for metric in self._metrics:
                stack.enter_context(frozen(metric))
            yield
        bank.absorb_buffers()
        for row, before in zip(rows, saved):
            row.copy_(before)


def precision_context_is_empty(plugin: Precision) -> bool:
    """Whether ``training_step`` runs as it is under this precision, without autocast or another default dtype."""
    return (
        type(plugin).train_step_context is Precision.train_step_context
        and type(plugin).forward_context is Precision.forward_context
    )


@contextmanager
def frozen(metric: Metric) -> Iterator[None]:
    """Calls of a metric return its last batch value and change nothing."""
    update = metric.update
    metric.__dict__["forward"] = lambda *args, **kwargs: metric._forward_cache
    metric.__dict__["update"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del metric.__dict__["forward"]
        metric.__dict__["update"] = update


def mean_result(outcomes: list[Outcome]) -> ClosureResult:
    """What Lightning reports as the outcome of a joint step: the last client's, with the mean loss of all."""
    result = ClosureResult(closure_loss=None)
    losses = [loss for loss, _ in outcomes if loss is not None]
    if losses:
        result.loss, result.extra = torch.stack(losses).mean(), outcomes[-1][1]
    return result

"""One client's minibatch, and the joint step that is one minibatch of every client of a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_fed.federation.client_logs import ClientLogs
from lightning_fed.federation.clients_per_step import ClientsPerStep
from lightning_fed.federation.direct_calls import backpropagate, direct_step
from lightning_fed.federation.gradient_step import GradientStep
from lightning_fed.federation.hooks_in_use import (
    has_transfer_hooks,
    hooks_of_a_step,
    precision_context_is_empty,
    shows_batches,
)
from lightning_fed.federation.local_rules import LocalGradient
from lightning_fed.federation.randomness import Stream, derive_seed, seed_generators
from lightning_fed.federation.rounds import finish_joint_step
from lightning_fed.federation.sampler import ClientBatch, JointBatch
from lightning_fed.federation.vectorization import WAY_OUT, CannotVectorize, check_vectorized
from lightning_fed.federation.vectorized_step import VectorizedStep

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy

# A client's loss, or those of a wave, and what else the training_step has returned.
Outcome = tuple[Tensor | None, dict[str, Any]]


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
        self.logs = ClientLogs(module, on_step=True, on_epoch=False, per_client=strategy.log_clients)
        self.joint: JointBatch | None = None
        self.running_values: list[dict[str, Any]] = []  # of the epoch in which a resumed run has stopped
        self.epoch_is_over = False  # and what it has logged is published
        self.values_before_validation: dict[str, Any] | None = None
        self.batch_idx = 0
        self._seed, self._replica = strategy.seed, strategy.layout.replica_of_rank(strategy.global_rank)
        self.device = strategy.root_device
        self._part: ClientBatch | None = None
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._step: Callable[..., Any] | None = None
        self._stepping: Optimizer | None = None
        self._trainer = module.trainer
        rule = strategy.local_rule
        self._backpropagates_plainly = strategy.replicas is None and (
            rule is None or not rule.needs_automatic_optimization
        )
        self._metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
        self.context_is_empty = precision_context_is_empty(strategy.precision_plugin)
        self.takes_batch_idx = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self._manual_steps = 1
        self._outcome: Outcome = None, {}
        self.gradient_step = GradientStep(strategy) if strategy.gathers_gradients else None
        self.hooks_in_use = hooks_of_a_step(module, strategy.precision_plugin)
        self.is_plain = not self.hooks_in_use and self.bank.scaler is None
        self.clients_per_step = ClientsPerStep(strategy.clients_per_step, self.device)
        self._vectorized = None if strategy.clients_per_step == 1 else VectorizedStep(self)
        if self._vectorized is not None:
            self._check_vectorized()
        self.shows_batches = shows_batches(module)
        self.transfers_plainly = not has_transfer_hooks(module)

    def _check_vectorized(self) -> None:
        """Find out before the first step whether clients can be trained together.

        Raises:
            ValueError: naming what stands against it.
        """
        try:
            check_vectorized(self)
        except CannotVectorize as error:
            self._give_up_waves(error, ValueError)

    def _give_up_waves(self, error: CannotVectorize, refusal: type[Exception]) -> None:
        """Train clients one by one after all, if that was left open; else raise the refusal."""
        if self.clients_per_step.is_decided:
            raise refusal(f"clients_per_step={self.strategy.clients_per_step}: {error}: {WAY_OUT}") from error
        self.clients_per_step.give_up(str(error))
        self._vectorized = None

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
        parts = self.joint.parts
        number = self.clients_per_step.begin(len(parts))
        outcomes, left = self._run_waves(number, optimizer, step) if number > 1 else ([], parts)
        outcomes += self._run_one_by_one(left, optimizer, closure, step, lightning)
        self.clients_per_step.end(len(parts))
        result = mean_result(outcomes)
        if self.gradient_step is not None and self.joint.is_last_of_round:
            self._part = None
            self.gradient_step.step(result.loss, lightning)
        self._finish()
        if isinstance(closure, Closure):
            closure._result = result

    def _run_waves(
        self, clients_per_step: int, optimizer: Optimizer, step: Callable[..., Any]
    ) -> tuple[list[Outcome], list[ClientBatch]]:
        """Waves of clients; returns also the minibatches that remain, of clients without company."""
        assert self.joint is not None and self._vectorized is not None
        outcomes: list[Outcome] = []
        parts = self.joint.parts
        left = set(range(len(parts)))
        try:
            for wave in list(self._vectorized.waves(self.joint, clients_per_step)):
                if len(wave) > 1:
                    outcomes.append(self._vectorized.run(self.joint, wave, optimizer, self._lean(step)))
                    left.difference_update(wave)
        except CannotVectorize as error:
            self._give_up_waves(error, RuntimeError)
        finally:
            if self.bank.bound is None and parts:  # the module still looks like a wave
                self.bank.show(parts[-1].client)
        return outcomes, [parts[number] for number in sorted(left)]

    def _run_one_by_one(
        self,
        parts: Sequence[ClientBatch],
        optimizer: Optimizer,
        closure: Callable[[], Any],
        step: Callable[..., Any],
        lightning: Callable[[Callable[[], Any]], None],
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        if parts:
            self.joint.unstack()  # type: ignore[union-attr]
        take_step = direct_step(optimizer) if self.is_plain else None
        for part in parts:
            self._enter(part)
            steps = part.steps_optimizer and self.gradient_step is None
            if take_step is not None:
                # What Lightning's closure and precision plugin do, without the hooks that nobody uses.
                self._step, self._stepping = self._lean(step), optimizer if steps else None
                take_step(closure=self._plain_closure) if steps else self._plain_closure()
                outcomes.append(self._outcome)
            else:
                lightning(closure) if steps else closure()
                if isinstance(closure, Closure) and closure._result is not None:
                    outcomes.append((closure._result.loss, closure._result.extra))
            if part.steps_optimizer and self.gradient_step is not None:
                self.before_optimizer_step(optimizer)
                self.gradient_step.gather([part.client])
            elif part.steps_optimizer and self.bank.keep_gradients:
                self.bank.clear_gradients()
        return outcomes

    def _lean(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The ``training_step`` without the precision's context, if that does nothing."""
        return self.module.training_step if self.context_is_empty else step

    def _plain_closure(self) -> Tensor | None:
        trainer, optimizer = self._trainer, self._stepping
        with torch.enable_grad():
            assert self._step is not None
            output = self.training_step(self._step, *self.step_arguments())
            loss: Tensor | None
            if isinstance(output, Tensor) and trainer.accumulate_grad_batches == 1:
                loss, extra = output, {}
            else:
                result = ClosureResult.from_training_step_output(output, trainer.accumulate_grad_batches)
                loss, extra = result.closure_loss, result.extra
            if not self.bank.keep_gradients:
                self.bank.clear_gradients()
            if loss is not None:
                if self._backpropagates_plainly:
                    backpropagate(loss)
                else:
                    self.backward(partial(backpropagate, loss))
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
        batch.unstack()
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

    def step_arguments(self) -> tuple[int, ...]:
        """What the user's ``training_step`` gets beside the minibatch."""
        return (self.batch_idx,) if self.takes_batch_idx else ()

    def seed_of(self, part: ClientBatch) -> int:
        """From which a client's random numbers in this local step are drawn."""
        assert self.joint is not None
        key = (self._seed, self.joint.round, part.client, part.index, self._replica)
        return derive_seed(Stream.LOCAL_STEP, *key)

    def _seed_generators(self, part: ClientBatch) -> None:
        seed_generators(self.seed_of(part), self.device)

    def _finish(self) -> None:
        assert self.joint is not None
        self._part = None
        self.strategy.consensus_is_stale = True
        # What callbacks and hooks draw must not depend on which client this rank has trained last.
        ambient = derive_seed(Stream.ROUND, self._seed, self.joint.round, self.joint.index)
        seed_generators(ambient, self.device)
        finish_joint_step(self.strategy, self.joint)
        self.joint = None

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
        with self.logs.capture(self._part.batch, clients=(self._part.client,)):
            return step(self._part.batch, *args, **kwargs)

    def backward(self, backward: Callable[[], Any]) -> Any:
        """Backpropagate; then average inside the client, and let the local rule replace the minibatch's gradient."""
        client = self.bank.bound
        assert client is not None
        return self.apply_rule(backward, [client], self.bank.rows.bound, self._recompute)

    def apply_rule(
        self, backward: Callable[[], Any], clients: Sequence[int], row: Tensor, recompute: Callable[[], None]
    ) -> Any:
        """Backpropagate, and let the local rule replace the gradient; of one client, or of a wave.

        Args:
            backward: backpropagates the loss.
            clients: whose loss it is.
            row: theirs, ``[P]`` or ``[M, P]``.
            recompute: see :class:`~lightning_fed.federation.local_rules.LocalGradient`.
        """
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
        rule.after_backward(LocalGradient(clients, row, parameters, recompute))
        for parameter, earlier in zip(parameters, accumulated):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else parameter.grad + earlier
        return loss

    def gradient_of(self, part: ClientBatch, step: Callable[..., Any]) -> list[Tensor | None]:
        """The gradient of one client's minibatch at its present row, of which nothing else remains."""
        self._enter(part)
        self._step, self._arguments = step, (self.step_arguments(), {})
        accumulated = [parameter.grad for parameter in self.bank.parameters]
        self._recompute()
        gradient = [parameter.grad for parameter in self.bank.parameters]
        for parameter, earlier in zip(self.bank.parameters, accumulated):
            parameter.grad = earlier
        self._part = None
        return gradient

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the local rule add to the gradients that the optimizer is going to use."""
        if self._part is not None:  # gradients that have met are nobody's own
            assert self.bank.bound is not None
            self.add_to_gradients(optimizer, [self.bank.bound])

    def add_to_gradients(self, optimizer: Optimizer, clients: Sequence[int]) -> None:
        """The same for one client, or for a wave."""
        rule = self.strategy.local_rule
        if rule is None:
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        places, start = [], 0
        for parameter, template in zip(self.bank.parameters, self.bank.rows.templates):
            if id(parameter) in stepped:
                places.append((parameter, slice(start, start + template.numel())))
            start += template.numel()
        rule.before_optimizer_step(clients, places)

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
        if loss is None:  # the step leaves this minibatch out
            return
        self.module.backward(self.bank.scaler.scale(loss) if self.bank.scaler is not None else loss)
        self._average()

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Neither ``self.log``, nor metrics, nor buffers notice what runs inside."""
        bank = self.bank
        bank.absorb_buffers()
        rows = [matrix.bound for matrix in (bank.buffers, bank.counters)]
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
        result.loss, result.extra = torch.cat([loss.reshape(-1) for loss in losses]).mean(), outcomes[-1][1]
    return result

"""Sharpness-aware minimization in any Trainer: one more pass, at the worst point around the weights.

w weights, g the gradient at w, e the step to the worst point, g_S the gradient at w + e.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_fed.callbacks.gradient_order import (
    GradientCallback,
    global_norm,
    gradients,
    scaler_of,
    skip_step,
)
from lightning_fed.checks import (
    check_callables,
    check_counts,
    check_flags,
    check_kinds,
    check_names,
    check_numbers,
    given,
)
from lightning_fed.federation.local_rules import SharpnessAwareRule
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.second_pass import MicroBatch, loss_of, random_state, restore_random_state, untraced
from lightning_fed.sharpness import check_ball, is_measured_by_size, perturbed

Filter = Literal["all", "normalization"] | list[str] | Callable[[str, nn.Parameter], bool]
NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class SharpnessAware(GradientCallback):
    """SAM (Foret et al. 2021, equations 2 and 3) or ASAM (Kwon et al. 2021) around any optimizer.

    Before each optimizer step: ``e = rho g / ||g||``, ``g_S = grad L(w + e)`` on the same minibatches, back to w, to
    the bit; clipping and the optimizer then see ``g_S``. The optimizer's weight decay stays at w and out of ``e``.
    Logs, metrics, buffers (BatchNorm statistics) and random numbers are those of the first pass, and the second one
    sees the same dropout masks. With accumulation the second pass replays the whole window.

    A federated strategy gets it as its local rule: each client has a ball of its own.

    Logged once an epoch: ``sam/sharpness``, the mean of ``L(w + e) - L(w)`` (not by a federation); ``sam/rho`` of the
    last step; counts since the start: ``sam/fallbacks``, steps along the plain gradient because the loss at ``w + e``
    was not finite, and under fp16 ``sam/overflows``, steps that the loss scaler skipped because of either pass.

    Args:
        rho: radius of the ball. SAM: 0.05 (the paper's default); ASAM: about ten times that (0.5 in its paper).
        adaptive: ASAM, which measures weights by their size.
        eta: of ASAM, added to that size.
        p: the ball's norm, in (1, inf].
        every_n_steps: optimizer steps from one second pass to the next. In between, the part of ``g_S`` that is
            orthogonal to g is used again, as in LookSAM (Liu et al. 2022).
        reuse: alpha of LookSAM, 0.7 in its published code; 0 for plain steps in between.
        m_sharpness: under DDP each rank has a ball of its own, and the ranks' ``g_S`` are averaged (m-sharpness,
            section 4 of the SAM paper); False for one ball around the mean gradient, as if one process had the whole
            batch.
        parameters: which may move: ``"all"``, ``"normalization"`` (SAM-ON, Mueller et al. 2023), patterns of names such
            as ``["encoder.*"]``, or a function of name and parameter. All are stepped.
        rho_schedule: the radius at an optimizer step, instead of ``rho``; see
            :class:`~lightning_fed.sharpness.RhoSteps`.

    Raises:
        ValueError: if a setting is out of range; at set-up, for what it cannot train, with the way out.
    """

    place = 0

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.01,
        p: float = 2.0,
        every_n_steps: int = 1,
        reuse: float = 0.7,
        m_sharpness: bool = True,
        parameters: Filter = "all",
        rho_schedule: Callable[[int], float] | None = None,
    ) -> None:
        check_ball(rho, p, eta)
        check_counts(every_n_steps=every_n_steps)
        check_numbers("[0, inf)", reuse=reuse)
        check_flags(adaptive=adaptive, m_sharpness=m_sharpness)
        check_callables(**given(rho_schedule=rho_schedule))
        if not callable(parameters):
            check_kinds((str, list, tuple), parameters=parameters)
            for pattern in parameters:
                check_names(parameters=pattern)
        if isinstance(parameters, str) and parameters not in ("all", "normalization"):
            raise ValueError(f'parameters={parameters!r} must be "all", "normalization" or a list of name patterns.')
        self.rho, self.adaptive, self.eta, self.p = rho, adaptive, eta, p
        self.every_n_steps, self.reuse, self.m_sharpness = every_n_steps, reuse, m_sharpness
        self.parameters, self.rho_schedule = parameters, rho_schedule
        self.fallbacks, self.overflows = 0, 0
        self._orthogonal: dict[str, Tensor] = {}  # LookSAM's g_v
        self._rule: SharpnessAwareRule | None = None
        self._names: dict[nn.Parameter, str] = {}
        self._moves: set[nn.Parameter] = set()
        self._window: list[MicroBatch] = []
        self._first_training_step: Callable[..., Any] | None = None
        self._rho_now = 0.0
        self._sharpness: Tensor | None = None  # the sum over this epoch's second passes
        self._second_passes = 0

    # ------------------------------------------------------------------------------------------------------ set-up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.check(trainer)
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"SharpnessAware runs training_step twice, but {type(pl_module).__name__} has "
                "automatic_optimization=False and steps inside of it: there, call lightning_fed.sharpness.perturbed "
                "(its documentation shows how), or use automatic optimization."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: parameters may be made in configure_model, which comes after it.
        self._names = {parameter: name for name, parameter in pl_module.named_parameters()}
        self._moves = self._moving(pl_module)
        if isinstance(trainer.strategy, FederatedStrategy):
            self._hand_over(trainer, trainer.strategy)

    def _moving(self, module: LightningModule) -> set[nn.Parameter]:
        """The parameters that may move; frozen ones too, which move once they are trained."""
        if self.parameters == "normalization":
            parts = [part for part in module.modules() if isinstance(part, NORMALIZATIONS)]
            moves = {parameter for part in parts for parameter in part.parameters(recurse=False)}
        elif callable(self.parameters):
            moves = {parameter for parameter, name in self._names.items() if self.parameters(name, parameter)}
        else:
            patterns = ["*"] if self.parameters == "all" else self.parameters
            moves = {w for w, name in self._names.items() if any(fnmatch(name, pattern) for pattern in patterns)}
        if not any(parameter.requires_grad for parameter in moves):
            some = ", ".join([name for parameter, name in self._names.items() if parameter.requires_grad][:5])
            raise ValueError(f"parameters={self.parameters!r} selects none of the trainable ones ({some}, ...).")
        return moves

    def _hand_over(self, trainer: Trainer, strategy: FederatedStrategy) -> None:
        """Become the local rule of a federation."""
        if strategy.local_rule is not None:
            raise ValueError(
                f"{type(strategy).__name__} has a local rule of its own, {type(strategy.local_rule).__name__}, and a "
                "client's step has room for one: leave SharpnessAware out, or use a strategy without one."
            )
        if self.every_n_steps > 1 or not self.m_sharpness:
            raise ValueError(
                f"every_n_steps={self.every_n_steps}, m_sharpness={self.m_sharpness}: under {type(strategy).__name__} "
                "each client takes SAM's step at each of its own steps. Leave both settings out."
            )
        adaptive = [parameter for parameter in self._moves if is_measured_by_size(self._names[parameter])]
        self._rule = strategy.local_rule = SharpnessAwareRule(
            rho=self.rho,
            p=self.p,
            adaptive=adaptive if self.adaptive else [],
            eta=self.eta,
            moves=self._moves,
            falls_back=scaler_of(trainer) is None,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_optimizers(trainer)
        if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self._moves):
            rank_zero_warn(
                "SharpnessAware moves weights of half precision by less than their rounding, so most stay where they "
                "are (35 % moved at rho=0.05 in a matrix of a million): use precision='bf16-mixed'."
            )
        if self._rule is None:
            self._first_training_step = trainer.strategy.training_step
            trainer.strategy.__dict__["training_step"] = partial(self._first_pass, trainer, pl_module)
            self._window = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)
        self._dismiss(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._dismiss(trainer)

    def _leave(self, trainer: Trainer) -> None:
        if self._first_training_step is not None:
            trainer.strategy.__dict__.pop("training_step", None)
            self._first_training_step = None
        self._window = []

    def _dismiss(self, trainer: Trainer) -> None:
        if self._rule is not None and isinstance(trainer.strategy, FederatedStrategy):
            trainer.strategy.local_rule, self._rule = None, None

    # ---------------------------------------------------------------------------------------------- the first pass

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rho = self.rho if self.rho_schedule is None else self.rho_schedule(trainer.global_step)
        check_ball(rho)
        self._rho_now = rho
        if self._rule is not None:
            self._rule.rho = rho

    def _is_due(self, trainer: Trainer) -> bool:
        return self._rho_now > 0 and trainer.global_step % self.every_n_steps == 0

    def _first_pass(self, trainer: Trainer, module: LightningModule, *args: Any) -> Any:
        """In place of the strategy's ``training_step``: the same, remembered."""
        assert self._first_training_step is not None
        if not self._is_due(trainer):
            return self._first_training_step(*args)
        state = random_state(module)
        # Only the forward pass asks DDP whether gradients are going to be reduced.
        with self._unsynced(trainer.strategy) if self._is_per_rank(trainer) else nullcontext():
            output = self._first_training_step(*args)
        loss = loss_of(output, trainer.accumulate_grad_batches)
        if loss is not None:
            self._window.append(MicroBatch(args, state, loss.detach()))
        return output

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._window = self._window[-1:]  # a window begins with the minibatch that has just been evaluated

    def _is_per_rank(self, trainer: Trainer) -> bool:
        return self.m_sharpness and trainer.world_size > 1

    @staticmethod
    def _unsynced(strategy: Strategy) -> AbstractContextManager[None]:
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    # --------------------------------------------------------------------------------------------- the second pass

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        window, self._window = self._window, []
        if self._rule is not None:
            return
        if not self._is_due(trainer):
            self._reuse(optimizer)
            return
        found = gradients(optimizer)
        if not found or not window:
            return
        plain = self._keep(trainer, [g for _, g in found])
        if self._anywhere(trainer, not bool(torch.isfinite(global_norm(plain)))):
            self._mean_over_ranks(trainer, plain)
            self._overflow(trainer, optimizer)  # leave the step to the scaler; there is no direction
            return
        movable = [(self._names[w], w) for w, _ in found if w in self._moves]
        with perturbed(movable, self._rho_now, self.p, self.adaptive, self.eta):  # w + e
            for w, _ in found:
                w.grad = None
            loss = self._second_pass(trainer, pl_module, window)  # g_S
        before = torch.stack([micro_batch.loss for micro_batch in window]).sum()
        self._settle(trainer, optimizer, [(w, g) for (w, _), g in zip(found, plain)], loss - before)

    @torch.enable_grad()
    def _second_pass(self, trainer: Trainer, module: LightningModule, window: list[MicroBatch]) -> Tensor:
        """Backpropagate the window at the present weights; the mean loss, NaN if a minibatch returns none."""
        assert self._first_training_step is not None
        scaler, losses = scaler_of(trainer), []
        with untraced(module):
            for micro_batch in window:
                is_last = micro_batch is window[-1]
                with nullcontext() if is_last else self._unsynced(trainer.strategy):
                    restore_random_state(micro_batch.random_state)
                    output = self._first_training_step(*micro_batch.arguments)
                    loss = loss_of(output, trainer.accumulate_grad_batches)
                    if loss is None and trainer.world_size > 1:
                        raise RuntimeError(
                            f"training_step has returned None at SAM's perturbed point of step {trainer.global_step}: "
                            "other ranks wait for this one's gradient. Return a NaN loss, and all take the plain one."
                        )
                    if loss is None:
                        return torch.full_like(micro_batch.loss, torch.nan)
                    module.backward(loss if scaler is None else scaler.scale(loss))
                losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _settle(
        self,
        trainer: Trainer,
        optimizer: Optimizer,
        plain: list[tuple[nn.Parameter, Tensor]],
        sharpness: Tensor,
    ) -> None:
        """Leave ``g_S`` to the optimizer; the plain gradient, or no step at all, if it is not finite."""
        scaler = scaler_of(trainer)
        found = [g for _, g in gradients(optimizer)]
        if scaler is not None:
            torch._foreach_div_(found, scaler.get_scale())
        is_finite = bool(torch.isfinite(global_norm(found))) if found else True
        has_no_loss = self._anywhere(trainer, not bool(torch.isfinite(sharpness)))
        if has_no_loss or (scaler is None and not is_finite):
            self._fall_back(trainer, plain)
            return
        if not is_finite:
            self._overflow(trainer, optimizer)
            return
        if self.every_n_steps > 1 and self.reuse:
            self._mean_over_ranks(trainer, [g for _, g in plain])
            self._remember(plain)
        self._sharpness = sharpness if self._sharpness is None else self._sharpness + sharpness
        self._second_passes += 1

    def _fall_back(self, trainer: Trainer, plain: list[tuple[nn.Parameter, Tensor]]) -> None:
        self.fallbacks += 1
        if self.fallbacks == 1:
            rank_zero_warn(
                f"step {trainer.global_step}: the loss or its gradient is not finite at SAM's perturbed point, so this "
                f"step takes the plain gradient, as later ones may (counted in sam/fallbacks). Lower rho={self.rho}."
            )
        self._mean_over_ranks(trainer, [g for _, g in plain])
        for w, g in plain:
            w.grad = g

    def _overflow(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if scaler_of(trainer) is not None:
            self.overflows += 1
            skip_step(trainer, optimizer)

    # ------------------------------------------------------------------------------------- steps in between (LookSAM)

    def _remember(self, plain: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Keep what ``g_S`` has that g has not: ``g_v = g_S - <g_S, g> / ||g||^2 g``, products over all tensors."""
        both = [(self._names[w], w.grad, g) for w, g in plain if w.grad is not None]
        inner = sum((g_s * g).sum() for _, g_s, g in both)
        share = inner / sum(g.square().sum() for _, _, g in both)
        self._orthogonal = {name: g_s - share * g for name, g_s, g in both}

    @torch.no_grad()
    def _reuse(self, optimizer: Optimizer) -> None:
        """Turn the plain gradient as the last second pass would: ``g + alpha ||g|| / ||g_v|| g_v``."""
        if not self._orthogonal or not self.reuse or not self._rho_now:
            return
        both = [(g, self._orthogonal.get(self._names[w])) for w, g in gradients(optimizer)]
        pairs = [(g, g_v.to(g)) for g, g_v in both if g_v is not None]
        if not pairs:
            return
        norm, norm_v = (global_norm([pair[index] for pair in pairs]) for index in (0, 1))
        scale = self.reuse * norm / norm_v
        if bool(torch.isfinite(scale)):
            for g, g_v in pairs:
                g.add_(g_v * scale)

    # ------------------------------------------------------------------------------------------------- several ranks

    @staticmethod
    def _keep(trainer: Trainer, found: list[Tensor]) -> list[Tensor]:
        """The gradients, in storage that the second pass does not write to."""
        in_buckets = getattr(trainer.strategy.model, "gradient_as_bucket_view", False)
        return [g.clone() for g in found] if in_buckets else found

    def _anywhere(self, trainer: Trainer, here: bool) -> bool:
        """Whether it is so on any rank."""
        if trainer.world_size == 1:
            return here
        flag = torch.tensor(float(here), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(flag, reduce_op="sum"))

    def _mean_over_ranks(self, trainer: Trainer, plain: list[Tensor]) -> None:
        """Average gradients that each rank has kept to itself."""
        if self._is_per_rank(trainer):
            for g in plain:
                g.copy_(trainer.strategy.reduce(g, reduce_op="mean"))

    # ------------------------------------------------------------------------------------------- logs, checkpoints

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sharpness, self._second_passes = None, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not at every step: three calls of self.log cost more than the second pass of a small model.
        if self._rule is not None:
            self._count_fallbacks_of_clients(trainer)
        values = {"sam/rho": self._rho_now, "sam/fallbacks": float(self.fallbacks)}
        if scaler_of(trainer) is not None and self._rule is None:
            values["sam/overflows"] = float(self.overflows)
        pl_module.log_dict(values)  # the same on all ranks
        if self._sharpness is not None:
            mean = self._sharpness / self._second_passes
            pl_module.log("sam/sharpness", mean, sync_dist=trainer.world_size > 1)

    def _count_fallbacks_of_clients(self, trainer: Trainer) -> None:
        assert self._rule is not None and isinstance(trainer.strategy, FederatedStrategy)
        self.fallbacks += sum(trainer.strategy.gather_plain(self._rule.fallbacks))
        self._rule.fallbacks = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "fallbacks": self.fallbacks,
            "overflows": self.overflows,
            "orthogonal": dict(self._orthogonal),
            "rho": self._rho_now,
            "sharpness": self._sharpness,
            "second_passes": self._second_passes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fallbacks, self.overflows = state_dict["fallbacks"], state_dict["overflows"]
        self._orthogonal = dict(state_dict["orthogonal"])
        self._rho_now, self._sharpness = state_dict["rho"], state_dict["sharpness"]
        self._second_passes = state_dict["second_passes"]

"""Grokfast: amplify the slow part of the gradients (Lee, Kang, Kim, Lee 2024, arXiv 2405.20233).

g gradient, h its slow part, both of one parameter.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fed.callbacks.gradient_order import GradientCallback, global_norm, gradients, has_overflowed
from lightning_fed.checks import check_choice, check_counts, check_names, check_numbers, given
from lightning_fed.federation.strategy import FederatedStrategy

STATE = "grokfast"  # the filter's place among a client's optimizer state


class SlowPart(TypedDict):
    """What the filter remembers of one parameter's gradients; plain values, as checkpoints want them.

    Attributes:
        count: gradients seen.
        slow: EMA: h; MA: the mean over the ring, in which gradients not seen yet are zero.
        ring: MA: the last ``window`` gradients, ``[window, *shape]``, in the order of ``count % window``; else None.
    """

    count: int
    slow: Tensor
    ring: Tensor | None


class Grokfast(GradientCallback):
    """Adds the slow part of past gradients to each gradient, before clipping and the optimizer's step.

    ``g <- g + lamb h``, with ``h <- alpha h + (1 - alpha) g`` from ``h = g`` at the first step (``"ema"``, as in
    the paper's code) or h the mean of the last ``window`` gradients, the present one included (``"ma"``). It sees the
    final gradient of an optimizer step: accumulated, reduced over ranks, unscaled. Steps that the fp16 loss scaler is
    going to skip change nothing. An L2 penalty inside the optimizer is added after the filter; with ``h = g`` a filter
    divides its relative weight by ``1 + lamb``.

    Under a federated strategy each client filters its own gradients. What it remembers belongs to its optimizer state:
    it is forgotten each round with ``optimizer_state="reset"``, and lives on with ``"keep"``.

    With Adam much of the effect is that of a larger learning rate: see ``docs/grokking.md`` before using it.

    Logged every ``log_every_n_steps`` steps, not in a federation: ``grokfast/slow_ratio``, ``||lamb h|| / ||g||`` over
    all parameters.

    Args:
        filter: ``"ema"`` or ``"ma"``.
        alpha: of the EMA. 0.98 is the default of the paper's code; its rule is ``alpha^N = 0.1`` for N-fold speed.
        lamb: lambda, the weight of the slow part. 2 for ``"ema"``, 5 for ``"ma"`` in the paper; 0 changes nothing, to
            the bit.
        window: of the MA. It holds as many copies of the gradient.
        warmup: gradients of a parameter, the present one included, before its slow part is added. None is the paper's:
            1 for ``"ema"``, a full window for ``"ma"``.
        stop_step: the optimizer step from which on the filter is off.
        stop_monitor: a metric that switches the filter off for good, when at the end of a validation or an epoch it is
            at least ``stop_threshold`` on any rank.
        stop_threshold: of ``stop_monitor``.

    Raises:
        ValueError: if a setting is out of range; at set-up, for callbacks, optimizers and strategies that it cannot
            work with.
    """

    place = 2

    def __init__(
        self,
        filter: Literal["ema", "ma"] = "ema",
        alpha: float = 0.98,
        lamb: float = 2.0,
        window: int = 100,
        warmup: int | None = None,
        stop_step: int | None = None,
        stop_monitor: str | None = None,
        stop_threshold: float = 0.95,
    ) -> None:
        check_choice("filter", filter, "ema", "ma")
        check_numbers(alpha=alpha, lamb=lamb, stop_threshold=stop_threshold)
        check_counts(window=window)
        check_counts(0, **given(warmup=warmup, stop_step=stop_step))
        check_names(**given(stop_monitor=stop_monitor))
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha={alpha} must be in [0, 1): it is the share of the past in the moving average.")
        if not lamb >= 0:
            raise ValueError(f"lamb={lamb} must not be negative: it is the weight of the slow part.")
        self.filter, self.alpha, self.lamb, self.window = filter, alpha, lamb, window
        self.warmup = warmup if warmup is not None else window if filter == "ma" else 1
        self.stop_step, self.stop_monitor, self.stop_threshold = stop_step, stop_monitor, stop_threshold
        self.is_stopped = False
        self._parts: dict[str, SlowPart] = {}
        self._names: dict[Tensor, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.check(trainer)
        if self.stop_monitor is not None and getattr(trainer.strategy, "is_elastic", False):
            raise ValueError(
                f"stop_monitor={self.stop_monitor!r}: with on_peer_loss='drop' only one rank validates, and the others "
                "would filter on. Use stop_step."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_optimizers(trainer)
        self._names = {parameter: name for name, parameter in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.lamb == 0 or has_overflowed(trainer, optimizer):
            return
        is_federated = isinstance(trainer.strategy, FederatedStrategy)
        memory: dict[str, SlowPart] = self._parts
        if is_federated:  # the bound client's
            memory = optimizer.state[STATE]  # type: ignore[index]
        if self.is_stopped or (self.stop_step is not None and trainer.global_step >= self.stop_step):
            memory.clear()
            return
        found = gradients(optimizer)
        parts = [self._recall(memory, self._names[w], g) for w, g in found]
        self._update(parts, [g for _, g in found])
        due = [(g, part) for (_, g), part in zip(found, parts) if part["count"] >= self.warmup]
        if not due:
            return
        g = [g for g, _ in due]
        h = [self._slow(part) for _, part in due]
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and not is_federated and (trainer.global_step + 1) % every == 0:
            ratio = self.lamb * global_norm(h) / global_norm(g)
            pl_module.log("grokfast/slow_ratio", ratio, on_step=True, on_epoch=False, batch_size=1)
        torch._foreach_add_(g, h, alpha=self.lamb)  # g + lamb h

    def _recall(self, memory: dict[str, SlowPart], name: str, g: Tensor) -> SlowPart:
        """A parameter's memory where g is; begun anew if there is none, or one of another filter."""
        length = self.window if self.filter == "ma" else 0
        part = memory.get(name)
        if part is None or (0 if part["ring"] is None else len(part["ring"])) != length:
            begun = torch.zeros_like(g) if length else g.clone()
            ring = g.new_zeros(length, *g.shape) if length else None
            part = memory[name] = {"count": 0, "slow": begun, "ring": ring}
        if part["slow"].device != g.device or part["slow"].dtype != g.dtype:  # read before the module had moved
            part["slow"] = part["slow"].to(g)
            part["ring"] = None if part["ring"] is None else part["ring"].to(g)
        return part

    @torch.no_grad()
    def _update(self, parts: list[SlowPart], found: list[Tensor]) -> None:
        """Take the gradients g into the averages."""
        slow = [part["slow"] for part in parts]
        if self.filter == "ema":
            torch._foreach_lerp_(slow, found, 1 - self.alpha)  # alpha h + (1 - alpha) g
        else:
            oldest = [ring[part["count"] % self.window] for part in parts if (ring := part["ring"]) is not None]
            torch._foreach_add_(slow, found, alpha=1 / self.window)
            torch._foreach_add_(slow, oldest, alpha=-1 / self.window)
            torch._foreach_copy_(oldest, found)
        for part in parts:
            part["count"] += 1
            if part["ring"] is not None and part["count"] % self.window == 0:
                torch.mean(part["ring"], dim=0, out=part["slow"])  # so that rounding adds up for a window at most

    def _slow(self, part: SlowPart) -> Tensor:
        """h: the average itself; of a ring that is not full, the mean of what is in it."""
        is_full = part["ring"] is None or part["count"] >= self.window
        return part["slow"] if is_full else part["slow"] * (self.window / part["count"])

    # ------------------------------------------------------------------------------------------------------ the end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._watch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch(trainer)

    def _watch(self, trainer: Trainer) -> None:
        if self.stop_monitor is None:
            return
        value = trainer.callback_metrics.get(self.stop_monitor)
        is_reached = value is not None and float(value) >= self.stop_threshold
        # A metric may differ between ranks, whose replicas must not.
        if trainer.strategy.reduce_boolean_decision(is_reached, all=False):
            self.is_stopped = True

    # ------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"is_stopped": self.is_stopped, "parts": self._parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.is_stopped, self._parts = state_dict["is_stopped"], state_dict["parts"]

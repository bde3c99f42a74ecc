"""Checks of settings, with messages that name the setting, its value and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_fed.federation.layout import Layout

if TYPE_CHECKING:
    from lightning_fed.federation.local_rules import LocalRule
    from lightning_fed.federation.strategy import FederatedStrategy


def check_counts(**counts: int | None) -> None:
    """Refuse counts below 1; None stands for a default.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")


def check_seconds(**durations: float | None) -> None:
    """Refuse durations that are not positive; None stands for a default.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, seconds in durations.items():
        if seconds is not None and not seconds > 0:
            raise ValueError(f"{name}={seconds} must be more than 0 seconds.")


def check_choice(name: str, choice: str, *choices: str) -> None:
    """Refuse a choice that is none of those that there are.

    Raises:
        ValueError: naming the setting, its value and the choices.
    """
    if choice not in choices:
        raise ValueError(f"{name}={choice!r} is not one of {choices}.")


def check_training(strategy: FederatedStrategy, module: LightningModule) -> None:
    """Refuse a module, its optimizers and its schedulers if the strategy cannot train them.

    Raises:
        ValueError: naming the setting.
    """
    check_local_rule(strategy.local_rule, module)
    if strategy.gathers_gradients:
        check_gathering(strategy, module)
    else:  # clients that gather gradients all take the same number of steps
        check_schedulers(strategy.lr_scheduler_configs, module, strategy.layout, strategy.is_elastic)


def check_local_rule(rule: LocalRule | None, module: LightningModule) -> None:
    """Refuse a local rule that the module's kind of optimization cannot serve.

    Raises:
        ValueError: naming both.
    """
    if rule is not None and rule.needs_automatic_optimization and not module.automatic_optimization:
        raise ValueError(
            f"{type(rule).__name__} evaluates a minibatch twice, which needs automatic optimization, but "
            f"{type(module).__name__} has automatic_optimization=False: use another strategy for it."
        )


def check_schedulers(
    configs: Sequence[LRSchedulerConfig], module: LightningModule, layout: Layout, is_elastic: bool
) -> None:
    """Refuse rates that depend on what clients do not share: numbers of steps, metrics of one rank.

    Raises:
        ValueError: naming the scheduler.
    """
    watching = [config for config in configs if config.reduce_on_plateau]
    if watching and is_elastic:
        raise ValueError(
            f"the scheduler {type(watching[0].scheduler).__name__} watches {watching[0].monitor!r}, which only the "
            "leading rank knows with on_peer_loss='drop': use a scheduler that depends on the epoch alone."
        )
    per_step = [config for config in configs if config.interval == "step"]
    if per_step and module.automatic_optimization and layout.num_clients > layout.num_hosts:
        raise ValueError(
            f"the scheduler {type(per_step[0].scheduler).__name__} has interval='step', which has no meaning when "
            f"several clients share a rank (num_clients={layout.num_clients}) and take different numbers of steps: "
            "use interval='epoch' (once a round)."
        )


def check_gathering(strategy: FederatedStrategy, module: LightningModule) -> None:
    """Refuse settings under which the clients' gradients cannot meet at every step.

    Raises:
        ValueError: naming the setting.
    """
    name = type(strategy).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} exchanges gradients before the optimizer steps, but {type(module).__name__} has "
            "automatic_optimization=False and steps by itself: use automatic optimization."
        )
    if strategy.local_steps != 1:
        raise ValueError(
            f"{name} exchanges gradients at every step, but local_steps={strategy.local_steps}: set local_steps=1 (and "
            "rounds_per_epoch='pass')."
        )

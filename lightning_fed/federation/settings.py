"""Checks of a strategy's settings: against each other, and against the module that it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_fed.checks import check_counts, check_kinds, check_names, given
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.local_rules import LocalRule
from lightning_fed.federation.participation import Participation
from lightning_fed.federation.virtual_clock import VirtualClock

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy


def check_work(local_epochs: int, local_steps: int | None) -> None:
    """Refuse a round's local work that is no count, or is given twice.

    Raises:
        ValueError: naming the setting.
    """
    check_counts(local_epochs=local_epochs, **given(local_steps=local_steps))
    if local_steps is not None and local_epochs != 1:
        raise ValueError(
            f"local_epochs={local_epochs} and local_steps={local_steps} both say how long a client trains in a round: "
            "give one of them."
        )


def check_parts(participation: object, local_rule: object, clock: object) -> None:
    """Refuse parts of a strategy that are no such parts; None stands for a default.

    Raises:
        ValueError: naming the setting.
    """
    check_kinds(Participation, **given(participation=participation))
    check_kinds(LocalRule, **given(local_rule=local_rule))
    check_kinds(VirtualClock, **given(clock=clock))


def check_backend(process_group_backend: str | None) -> None:
    """Refuse a backend that torch does not know, alone or as in ``"cpu:gloo,cuda:nccl"``; None stands for a default.

    Raises:
        ValueError: naming the setting, its value and the backends that there are.
    """
    check_names(**given(process_group_backend=process_group_backend))
    names = [part.split(":")[-1].lower() for part in (process_group_backend or "gloo").split(",")]
    known = [name for name in dist.Backend.backend_list if name != dist.Backend.UNDEFINED]
    if set(names) - set(known):
        raise ValueError(f"process_group_backend={process_group_backend!r} is not one of {tuple(known)}.")


def check_undecided(federation: dict[str, Any], **instead: str) -> None:
    """Refuse settings of every federation that an algorithm decides for itself.

    Args:
        federation: what the user has set.
        **instead: for each setting that is decided, what to set in its place.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, way_out in instead.items():
        if name in federation:
            raise ValueError(f"{name}={federation[name]!r} is decided by the algorithm here: {way_out}.")


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

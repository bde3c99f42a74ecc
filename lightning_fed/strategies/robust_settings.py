"""Which robust rules and simulated attacks go with which settings of a strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fed.attacks import Attack
from lightning_fed.checks import check_kinds, given
from lightning_fed.federation.participation import FullParticipation
from lightning_fed.federation.robust_mixing import fewest_combined
from lightning_fed.robust import RobustMix

if TYPE_CHECKING:
    from lightning_fed.strategies.fedavg import FedAvgStrategy
    from lightning_fed.strategies.gossip import GossipStrategy
    from lightning_fed.strategies.modest import MoDeSTStrategy


def check_server(strategy: FedAvgStrategy) -> None:
    """Refuse a rule or an attack that a server cannot have.

    Raises:
        ValueError: naming the setting and the way out.
    """
    rule = strategy.robust
    check_kinds(RobustMix, **given(robust=rule))
    check_kinds(Attack, **given(attack=strategy.attack))
    check_ranks_live(strategy)
    if strategy.privacy is not None and (rule is not None or strategy.attack is not None):
        raise ValueError(
            f"robust={rule!r} and attack={strategy.attack!r} let one client's data act through other clients' rows, so "
            "no epsilon can be stated: leave out privacy, and bound updates with max_update_norm."
        )
    if rule is None:
        return
    check_not_centered(rule, "a server")
    if strategy.weighting != "uniform" and not rule.uses_weights:
        raise ValueError(
            f"weighting={strategy.weighting!r}, but robust={rule!r} counts every client once: set weighting='uniform'."
        )


def check_aggregators(strategy: MoDeSTStrategy) -> None:
    """Refuse a rule or an attack that MoDeST's aggregators cannot have, or that gets too few models while nobody fails.

    Raises:
        ValueError: naming the setting and the way out.
    """
    rule, rules = strategy.robust, strategy.rules
    check_kinds(RobustMix, **given(robust=rule))
    check_kinds(Attack, **given(attack=strategy.attack))
    check_ranks_live(strategy)
    if rule is None:
        return
    check_not_centered(rule, "an aggregator")
    needed = rules.models_needed(rules.sample_size)
    fewest = needed if rules.aggregation_timeout is None else min(needed, rules.min_models)
    setting = "min_models" if fewest < needed else "sample_size or success_fraction"
    rule.check(fewest, f"that is what an aggregator waits for; raise {setting}, or expect fewer hostile clients")


def check_not_centered(rule: RobustMix, who: str) -> None:
    """Refuse a rule that compares rows with the own one where there is none.

    Raises:
        ValueError: naming the rule and the way out.
    """
    if rule.is_centered:
        raise ValueError(
            f"robust={rule!r} needs a row of one's own, which {who} has not: use it with GossipStrategy, or "
            "CoordinateMedian, TrimmedMean, GeometricMedian or Krum here."
        )


def check_gossip(strategy: GossipStrategy) -> None:
    """Refuse a rule or an attack that a way of gossip cannot have.

    Raises:
        ValueError: naming the setting and the way out.
    """
    check_kinds(RobustMix, **given(robust=strategy.robust))
    check_kinds(Attack, **given(attack=strategy.attack))
    check_ranks_live(strategy)
    asked = given(robust=strategy.robust, attack=strategy.attack)
    for name, value in asked.items():
        if strategy.method != "average":
            raise ValueError(
                f"{name}={value!r} is about rows that clients send each other as they are, but with "
                f"method={strategy.method!r} they keep accounts of what was sent: use method='average'."
            )
    if strategy.robust is not None and strategy.message_dtype != "row":
        raise ValueError(
            f"robust={strategy.robust!r} compares rows, and message_dtype={strategy.message_dtype!r} would round all "
            "but one's own: use message_dtype='row'."
        )


def check_ranks_live(strategy: FedAvgStrategy | GossipStrategy | MoDeSTStrategy) -> None:
    """Refuse ranks that may die.

    Raises:
        ValueError: naming the setting and the way out.
    """
    asked = given(robust=strategy.robust, attack=strategy.attack)
    for name, value in asked.items():
        if strategy.on_peer_loss == "drop":
            raise ValueError(
                f"{name}={value!r} needs the rows of all ranks at the same time, which on_peer_loss='drop' does not "
                "promise: use on_peer_loss='raise'."
            )


def check_number_of_clients(strategy: FedAvgStrategy | GossipStrategy | MoDeSTStrategy) -> None:
    """Refuse attackers that do not exist.

    Raises:
        ValueError: naming the setting and the way out.
    """
    if strategy.attack is not None:
        strategy.attack.validate(strategy.num_clients)


def check_neighbours(strategy: GossipStrategy) -> None:
    """Refuse a topology in which a client has too few neighbours for the rule, as far as it is known before rounds.

    Raises:
        ValueError: naming the rule and the topology.
    """
    if strategy.robust is None or not isinstance(strategy.participation, FullParticipation):
        return  # who is there is known round by round
    topology = strategy.topology
    for step in range(topology.period(strategy.num_clients) or 1):
        fewest = fewest_combined(topology.weights(strategy.num_clients, step))
        strategy.robust.check(
            fewest, f"with topology={type(topology).__name__} a client has {fewest - 1} neighbours; use one of more"
        )

"""DFedSAM and DFedSAM-MGS (Shi, Shen, Wei, Sun, Yuan, Wang, Tao; ICML 2023)."""

from __future__ import annotations

from typing import Any

from lightning_fed.federation.local_rules import SharpnessAwareRule
from lightning_fed.federation.settings import check_undecided
from lightning_fed.strategies.gossip import GossipStrategy
from lightning_fed.topology import Topology, TopologyName


class DFedSAMStrategy(GossipStrategy):
    """SAM at every local step, then Q gossip steps (Algorithm 1; Q > 1 is DFedSAM-MGS).

    Each client, from ``y = x_i``: ``e = rho g(y) / ||g(y)||``, ``y <- y - eta g(y + e)`` on the same minibatch; then
    ``x_i <- sum_l w_il y_l``, Q times. The paper's local optimizer is SGD without momentum.

    Args:
        topology: who talks to whom, or the short name of a topology that needs no arguments.
        rho: radius of SAM's ball. 0.05 is the default of the SAM paper (Foret et al. 2021); tune it.
        gossip_steps: Q. More of them cost Q times the bytes.
        **federation: see :class:`~lightning_fed.federation.strategy.FederatedStrategy`.

    Raises:
        ValueError: if a setting is out of range, or the topology is not connected or not doubly stochastic.
    """

    def __init__(
        self,
        topology: Topology | TopologyName = "ring",
        rho: float = 0.05,
        gossip_steps: int = 1,
        **federation: Any,
    ) -> None:
        check_undecided(federation, local_rule="it is SAM, whose radius is rho")
        super().__init__(topology=topology, gossip_steps=gossip_steps, local_rule=SharpnessAwareRule(rho), **federation)

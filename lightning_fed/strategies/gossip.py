"""Gossip: clients average with their neighbours of a topology.

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lightning_fed.federation.exchange import Exchange
from lightning_fed.federation.participation import FullParticipation
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.mixing_matrix import SUM_TOLERANCE, restrict
from lightning_fed.topology import Topology, TopologyName, by_name


class GossipStrategy(FederatedStrategy):
    """Local steps, then ``X <- W X`` over a topology.

    With one local SGD step it is D-PSGD in its adapt-then-combine form, ``x_i <- sum_j w_ij (x_j - eta g_j)`` (Lian et
    al. 2017; the paper's own form takes the gradient before mixing, ``sum_j w_ij x_j - eta g_i``); with more steps
    DFedAvg, and with ``torch.optim.SGD(momentum=theta)`` DFedAvgM, whose heavy ball restarts every round (Sun, Li, Wang
    2022, Algorithm 1).

    Args:
        topology: who talks to whom, or the short name of a topology that needs no arguments.
        gossip_steps: Q, times that the rows are mixed in one round.
        **federation: see :class:`~lightning_fed.federation.strategy.FederatedStrategy`.

    Raises:
        ValueError: if a setting is out of range, or the topology is not connected or not doubly stochastic.
    """

    def __init__(self, topology: Topology | TopologyName = "ring", gossip_steps: int = 1, **federation: Any) -> None:
        super().__init__(**federation)
        if gossip_steps < 1:
            raise ValueError(f"gossip_steps={gossip_steps} must be at least 1.")
        self.topology = by_name(topology) if isinstance(topology, str) else topology
        self.gossip_steps = gossip_steps

    def setup_distributed(self) -> None:
        super().setup_distributed()
        weights = self.topology.weights(self.num_clients)  # refuses a bad graph before anything is loaded
        if self.is_elastic and not np.allclose(weights, weights.T, rtol=0, atol=SUM_TOLERANCE):
            raise ValueError(
                "the weights of a directed topology are not doubly stochastic when ranks die: with "
                "on_peer_loss='drop' use an undirected topology (ring, torus, star, complete, ...)."
            )
        if not isinstance(self.participation, FullParticipation):
            restrict(weights, np.arange(self.num_clients) > 0)  # likewise a directed graph under partial participation

    def mix(self, rows: Tensor, exchange: Exchange) -> None:
        for step in range(self.round * self.gossip_steps, (self.round + 1) * self.gossip_steps):
            exchange.mix_(rows, self.weights(step))  # X <- W X

    def weights(self, gossip_step: int) -> np.ndarray:
        """W ``[N, N]`` of one gossip step: the topology's, restricted to the cohort."""
        weights = self.topology.weights(self.num_clients, gossip_step)
        if isinstance(self.participation, FullParticipation):
            return weights
        present = np.zeros(self.num_clients, dtype=bool)
        present[self.cohort] = True
        return restrict(weights, present)

"""FedAvg and its server-side family: FedAvgM, FedAdam, FedAdagrad (a server optimizer), FedProx (a proximal term).

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_fed.federation.clients import ClientBank
from lightning_fed.federation.exchange import Exchange
from lightning_fed.federation.local_rules import Proximal
from lightning_fed.federation.participation import FullParticipation, UniformSample
from lightning_fed.federation.server_model import ServerModel
from lightning_fed.federation.strategy import FederatedStrategy


class FedAvgStrategy(FederatedStrategy):
    """A (virtual) server sends its model to a cohort, and averages what comes back (McMahan et al. 2017, Algorithm 1).

    The pseudo-gradient of a round is ``x - sum_k p_k x_k``. Without a server optimizer the server takes the average as
    it is; with one (Reddi et al. 2021, Algorithm 2) it steps along the pseudo-gradient: SGD with momentum is FedAvgM,
    Adam FedAdam, Adagrad FedAdagrad. ``torch.optim.Adam`` corrects its moments' bias, which the paper does not.

    Args:
        cohort_size: clients a round; by default all.
        cohort_fraction: the same as a fraction, C in the paper.
        weighting: p_k proportional to the clients' numbers of ``"samples"``, over the cohort, or ``"uniform"``.
        server_optimizer: makes an optimizer from the server's parameters, for example ``torch.optim.Adam`` with ``lr``.
        mu: weight of FedProx's term ``mu / 2 ||y - x||^2`` in every local loss (Li et al. 2020); 0 is FedAvg.
        **federation: see :class:`~lightning_fed.federation.strategy.FederatedStrategy`.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        cohort_size: int | None = None,
        cohort_fraction: float | None = None,
        weighting: Literal["samples", "uniform"] = "samples",
        server_optimizer: OptimizerCallable | None = None,
        mu: float = 0.0,
        **federation: Any,
    ) -> None:
        sampled = cohort_size is not None or cohort_fraction is not None
        super().__init__(
            participation=UniformSample(cohort_size, cohort_fraction) if sampled else FullParticipation(),
            local_rule=Proximal(mu, anchor=self.server_row) if mu else None,
            **federation,
        )
        if weighting not in ("samples", "uniform"):
            raise ValueError(f"weighting={weighting!r} is not one of ('samples', 'uniform').")
        self.weighting = weighting
        self.server_optimizer = server_optimizer

    @property
    def keeps_rows(self) -> bool:
        """Idle clients have nothing of their own, unless somebody is going to look at it; it costs P numbers each."""
        return self.evaluate != "consensus" or self.float_buffers == "local" or self.is_elastic

    def setup_distributed(self) -> None:
        if self.is_elastic and self.server_optimizer is not None:
            raise ValueError(
                "a server_optimizer has a state that ranks would lack when they come back: with on_peer_loss='drop' "
                "leave it out."
            )
        super().setup_distributed()

    def setup_algorithm(self, bank: ClientBank, exchange: Exchange) -> None:
        self._server = ServerModel(bank.consensus[0], self.server_optimizer)
        self._server_buffers = bank.consensus[1].clone()

    def server_row(self) -> Tensor:
        """The server's model x, ``[P]``."""
        return self._server.row

    def start_round(self, rows: Tensor, buffers: Tensor, exchange: Exchange) -> None:
        exchange.download(self.server_row(), rows, self.cohort)
        if self.float_buffers == "mix":
            exchange.download(self._server_buffers, buffers, self.cohort)

    def mix(self, rows: Tensor, exchange: Exchange) -> None:
        average = exchange.upload_mean(rows, self.aggregation_weights())  # sum_k p_k x_k
        if self._server.has_optimizer:
            self._server.step(self._server.row - average.to(self._server.row))  # along -Delta
        else:
            self._server.become(average)  # x <- sum_k p_k x_k

    def mix_buffers(self, buffers: Tensor, exchange: Exchange) -> None:
        self._server_buffers = exchange.upload_mean(buffers, self.aggregation_weights())

    def aggregation_weights(self) -> np.ndarray:
        """p_k ``[N]``: zero outside the cohort, sum 1 over it."""
        weights = np.zeros(self.num_clients)
        contributors = np.setdiff1d(self.cohort, self.dropped)
        weights[contributors] = [len(self.shards[k]) if self.weighting == "samples" else 1 for k in contributors]
        return weights / weights.sum()

    def consensus(self, rows: Tensor, exchange: Exchange) -> Tensor:
        return self.server_row()

    def consensus_buffers(self, buffers: Tensor, exchange: Exchange) -> Tensor:
        return super().consensus_buffers(buffers, exchange) if self.float_buffers == "local" else self._server_buffers

    def algorithm_state(self) -> dict[str, Any]:
        return {"server": self._server.state(), "server_buffers": self._server_buffers}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        self._server.load_state(state["server"])
        self._server_buffers = state["server_buffers"].to(self._server_buffers)

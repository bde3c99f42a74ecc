"""FedAvg and its server-side family: FedAvgM, FedAdam, FedAdagrad (a server optimizer), FedProx (a proximal term).

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_fed.attacks import Attack
from lightning_fed.checks import check_callables, check_choice, check_counts, check_kinds, check_numbers, given
from lightning_fed.federation.clients import ClientBank
from lightning_fed.federation.exchange import Exchange
from lightning_fed.federation.local_rules import Proximal
from lightning_fed.federation.participation import FullParticipation, UniformSample
from lightning_fed.federation.robust_mixing import robust_average
from lightning_fed.federation.server_model import ServerModel
from lightning_fed.federation.settings import check_undecided
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.federation.update_clipping import UpdateClipping, contributing_slots
from lightning_fed.privacy import (
    Secret,
    SecretSample,
    UserLevelPrivacy,
    announce,
    check_private,
    check_private_training,
    cohort_size_of,
)
from lightning_fed.robust import RobustMix
from lightning_fed.strategies.robust_settings import check_number_of_clients, check_server


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
        max_update_norm: clip every client's update ``x_k - x`` to this 2-norm before it is averaged.
        privacy: user-level differential privacy of the server's model (docs/privacy.md); needs ``weighting="uniform"``.
        robust: what takes the place of ``sum_k p_k x_k``, to bear hostile clients (docs/robustness.md); all but
            ``GeometricMedian`` need ``weighting="uniform"``.
        attack: simulated hostile clients.
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
        max_update_norm: float | None = None,
        privacy: UserLevelPrivacy | None = None,
        robust: RobustMix | None = None,
        attack: Attack | None = None,
        **federation: Any,
    ) -> None:
        check_undecided(
            federation,
            participation="set cohort_size or cohort_fraction",
            local_rule="it is FedProx's term, whose weight is mu",
        )
        check_choice("weighting", weighting, "samples", "uniform")
        check_numbers("[0, inf)", mu=mu)
        check_callables(**given(server_optimizer=server_optimizer))
        check_counts(**given(cohort_size=cohort_size))
        check_numbers("(0, 1]", **given(cohort_fraction=cohort_fraction))
        check_numbers("(0, inf)", **given(max_update_norm=max_update_norm))
        check_kinds(UserLevelPrivacy, **given(privacy=privacy))
        sampled = cohort_size is not None or cohort_fraction is not None
        sample = UniformSample if privacy is None else SecretSample
        super().__init__(
            participation=sample(cohort_size, cohort_fraction) if sampled else FullParticipation(),
            local_rule=Proximal(mu, anchor=self.server_row) if mu else None,
            **federation,
        )
        self.weighting = weighting
        self.server_optimizer = server_optimizer
        self.max_update_norm = max_update_norm
        self.privacy = privacy
        self.robust = robust
        self.attack = attack
        self._clipping: UpdateClipping | None = None
        if privacy is not None:
            check_private(self)
        check_server(self)

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
        check_number_of_clients(self)
        if self.robust is not None:
            self.robust.check(
                cohort_size_of(self), "raise cohort_size (or num_clients), or expect fewer hostile clients"
            )

    def setup_algorithm(self, bank: ClientBank, exchange: Exchange) -> None:
        self._server = ServerModel(bank.consensus[0], self.server_optimizer)
        self._server_buffers = bank.consensus[1].clone()
        if self.max_update_norm is not None:
            self._clipping = UpdateClipping(self.max_update_norm, "whole", bank.layers)
        if self.privacy is not None:
            self._clipping = UpdateClipping(self.privacy.clip, self.privacy.clipping, bank.layers)
            self._keep_secret(self.gather_plain(Secret.draw(self.privacy.secret_seed).key.hex())[0])

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if self.privacy is not None and trainer.state.fn == TrainerFn.FITTING:
            check_private_training(self, self.privacy)
            announce(self, self.privacy, trainer)

    def _keep_secret(self, key: str) -> None:
        """Draw noise and cohorts from this secret from now on."""
        self._secret, self._cohort = Secret(bytes.fromhex(key)), None
        if isinstance(self.participation, SecretSample):
            self.participation.secret = self._secret

    def server_row(self) -> Tensor:
        """The server's model x, ``[P]``."""
        return self._server.row

    def start_round(self, rows: Tensor, buffers: Tensor, exchange: Exchange) -> None:
        exchange.download(self.server_row(), rows, self.cohort)
        if self.float_buffers == "mix":
            exchange.download(self._server_buffers, buffers, self.cohort)

    def corrupt_rows(self, rows: Tensor, exchange: Exchange) -> None:
        if self.attack is not None:
            starts = self.server_row().to(rows).expand_as(rows)
            self.attack.corrupt(rows, starts, exchange, self.cohort, (self.seed, self.round))

    def mix(self, rows: Tensor, exchange: Exchange) -> None:
        if self._clipping is not None:
            self._clip_updates(rows, self._clipping)
        if self.privacy is not None:
            self._server.step(-self._private_update(rows, exchange, self.privacy))  # along -Delta
            return
        average = self._average(rows, exchange)  # sum_k p_k x_k
        if self._server.has_optimizer:
            self._server.step(self._server.row - average.to(self._server.row))  # along -Delta
        else:
            self._server.become(average)  # x <- sum_k p_k x_k

    def _clip_updates(self, rows: Tensor, clipping: UpdateClipping) -> None:
        """``x_k <- x + clip(x_k - x)`` for the cohort's clients of this rank."""
        start = self.server_row().to(rows.device)
        for slot in contributing_slots(self):
            clipping.clip_(rows[slot], start)

    def _private_update(self, rows: Tensor, exchange: Exchange, privacy: UserLevelPrivacy) -> Tensor:
        """``Delta = 1/S (sum_k clip(x_k - x) + N(0, (z C)^2))``, float64 ``[P]``: the same on every rank.

        S counts the clients that were dropped too: their updates are zero.
        """
        x, size = self.server_row().to(rows.device, torch.float64), cohort_size_of(self)
        weights = (self.aggregation_weights() > 0) / size
        noise = torch.from_numpy(self._secret.noise(self.round, len(x))).to(x)
        delta = exchange.upload_mean(rows, weights, torch.float64) - weights.sum() * x
        return delta + privacy.noise_multiplier * privacy.clip / size * noise

    def epsilon(self, rounds: int | None = None) -> float:
        """The accountant's epsilon after so many rounds, by default those so far; infinite without privacy."""
        if self.privacy is None:
            return math.inf
        return self.privacy.epsilon(self.round if rounds is None else rounds, cohort_size_of(self), self.num_clients)

    def measure(self, exchange: Exchange) -> dict[str, float]:
        return {"epsilon": self.epsilon()} if self.privacy is not None else {}

    def fixed_settings(self) -> dict[str, Any]:
        return {"privacy": f"{self.privacy}, cohorts of {cohort_size_of(self)}" if self.privacy is not None else None}

    def mix_buffers(self, buffers: Tensor, exchange: Exchange) -> None:
        self._server_buffers = self._average(buffers, exchange)

    def _average(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """``sum_k p_k x_k``, or what the robust rule makes of the x_k; ``[P]``."""
        if self.robust is not None:
            return robust_average(self.robust, rows, self.aggregation_weights(), exchange)
        return exchange.upload_mean(rows, self.aggregation_weights())

    def aggregation_weights(self) -> np.ndarray:
        """p_k ``[N]``: zero outside the cohort, sum 1 over it."""
        weights = np.zeros(self.num_clients)
        contributors = np.setdiff1d(self.cohort, self.dropped)
        weights[contributors] = [len(self.shards[k]) if self.weighting == "samples" else 1 for k in contributors]
        return weights / weights.sum()

    def consensus(self, rows: Tensor, exchange: Exchange) -> Tensor:
        return self.server_row()

    def consensus_buffers(self, buffers: Tensor, exchange: Exchange) -> Tensor:
        if self.float_buffers == "local" and self.privacy is None:
            return super().consensus_buffers(buffers, exchange)
        return self._server_buffers

    def algorithm_state(self) -> dict[str, Any]:
        secret = self._secret.key.hex() if self.privacy is not None else None
        return {"server": self._server.state(), "server_buffers": self._server_buffers, "secret": secret}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        self._server.load_state(state["server"])
        self._server_buffers = state["server_buffers"].to(self._server_buffers)
        if self.privacy is not None:
            self._keep_secret(state["secret"])

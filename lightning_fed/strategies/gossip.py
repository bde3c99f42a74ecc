"""Gossip: clients average with their neighbours of a topology, plainly, compressed, or with tracked gradients.

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_fed.attacks import Attack
from lightning_fed.checks import check_choice, check_counts, check_kinds, check_numbers, given
from lightning_fed.compression import Compressor, Identity
from lightning_fed.federation.algorithm import RoundFacts
from lightning_fed.federation.clients import ClientBank
from lightning_fed.federation.compressed_channel import CompressedChannel
from lightning_fed.federation.error_feedback import all_finite
from lightning_fed.federation.exchange import Exchange
from lightning_fed.federation.gradient_step import state_dtype
from lightning_fed.federation.participation import FullParticipation
from lightning_fed.federation.public_copies import PublicCopies
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.federation.update_clipping import UpdateClipping, contributing_slots
from lightning_fed.mixing_matrix import SUM_TOLERANCE, restrict
from lightning_fed.proximal import ProximalOperator
from lightning_fed.robust import RobustMix
from lightning_fed.strategies.gossip_methods import (
    Beer,
    Choco,
    CompressedTracking,
    GossipMethod,
    GradientTracking,
    RobustGossip,
)
from lightning_fed.strategies.robust_settings import check_gossip, check_neighbours, check_number_of_clients
from lightning_fed.topology import Topology, TopologyName, by_name


class GossipStrategy(FederatedStrategy):
    """Local steps, then communication with the neighbours of a topology.

    With ``method="average"`` it is ``X <- W X``: with one local SGD step D-PSGD in its adapt-then-combine form,
    ``x_i <- sum_j w_ij (x_j - eta g_j)`` (Lian et al. 2017; the paper's own form takes the gradient before mixing,
    ``sum_j w_ij x_j - eta g_i``); with more steps DFedAvg, and with ``torch.optim.SGD(momentum=theta)`` DFedAvgM, whose
    heavy ball restarts every round (Sun, Li, Wang 2022, Algorithm 1).

    ``"choco"`` sends compressed differences (CHOCO-SGD); ``"tracking"`` lets clients follow the mean gradient (DSGT;
    with ``proximal`` DProxSGT; with ``compressor`` CDProxSGT); ``"beer"`` does both (BEER). The last two communicate at
    every step, so they need ``local_steps=1``; the module's optimizer steps along the tracker. See
    :mod:`~lightning_fed.strategies.gossip_methods`.

    Args:
        topology: who talks to whom, or the short name of a topology that needs no arguments.
        gossip_steps: Q, times that the rows are mixed in one round; 1 if gradients are tracked.
        method: what clients tell their neighbours.
        compressor: of the messages; ``"choco"`` and ``"beer"`` need one, ``"tracking"`` may have one.
        gamma: mixing rate of compressed messages, in (0, 1]. It must be the smaller, the more a compressor leaves out;
            papers tune it. 0.3 is ours, for a tenth of the entries.
        start: public copies of the models at the start: ``"zero"`` as in the papers, or the initial ``"model"``, which
            all clients know without a message.
        proximal: the proximal operator of a regularizer, with ``method="tracking"``.
        message_dtype: with ``method="average"``, what clients send their neighbours: their ``"row"`` as it is, or
            rounded to ``"bf16"``, which halves what float32 rows cost. A client's own row enters its average exactly,
            and all neighbours see the same rounded one, wherever they are hosted. The mean over clients is then
            conserved up to that rounding (2^-9 of each number that travels) only.
        max_update_norm: clip what a round's local steps have changed of a client's row to this 2-norm before it is
            mixed; with ``method="average"`` or ``"choco"``. It costs a second matrix of rows.
        robust: with ``method="average"``, how a client combines its own row and its neighbours', to bear hostile ones
            (docs/robustness.md). The topology's weights then only say who is a neighbour.
        attack: simulated hostile clients, with ``method="average"``.
        **federation: see :class:`~lightning_fed.federation.strategy.FederatedStrategy`.

    Raises:
        ValueError: if a setting is out of range, or the topology is not connected or not doubly stochastic.
    """

    def __init__(
        self,
        topology: Topology | TopologyName = "ring",
        gossip_steps: int = 1,
        method: Literal["average", "choco", "tracking", "beer"] = "average",
        compressor: Compressor | None = None,
        gamma: float = 0.3,
        start: Literal["zero", "model"] = "zero",
        proximal: ProximalOperator | None = None,
        message_dtype: Literal["row", "bf16"] = "row",
        max_update_norm: float | None = None,
        robust: RobustMix | None = None,
        attack: Attack | None = None,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        check_counts(gossip_steps=gossip_steps)
        check_choice("method", method, "average", "choco", "tracking", "beer")
        check_choice("start", start, "zero", "model")
        check_choice("message_dtype", message_dtype, "row", "bf16")
        check_kinds((Topology, str), topology=topology)
        check_kinds(Compressor, **given(compressor=compressor))
        check_kinds(ProximalOperator, **given(proximal=proximal))
        check_numbers(gamma=gamma)
        check_numbers("(0, inf)", **given(max_update_norm=max_update_norm))
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma={gamma} must be above 0 and at most 1: it is the mixing rate.")
        self.topology = by_name(topology) if isinstance(topology, str) else topology
        self.gossip_steps = gossip_steps
        self.method = method
        self.compressor = compressor
        self.gamma = gamma
        self.start = start
        self.proximal = proximal
        self.message_dtype = message_dtype
        self.max_update_norm = max_update_norm
        self.robust = robust
        self.attack = attack
        self.gathers_gradients = method in ("tracking", "beer")
        self._left_out = False
        self._skipped = 0
        self._check_method()
        check_gossip(self)

    def _check_method(self) -> None:
        if self.method in ("choco", "beer") and self.compressor is None:
            raise ValueError(f"method={self.method!r} sends compressed messages: give it a compressor=TopK(0.1).")
        if self.method == "average" and self.compressor is not None:
            raise ValueError(
                f"compressor={self.compressor} does not go with method='average', where clients would drift apart: use "
                "method='choco', 'beer' or 'tracking'."
            )
        if self.compressor is not None and not self.compressor.is_contractive:
            raise ValueError(
                f"compressor={self.compressor} is scaled to be unbiased, which may enlarge a vector, so the public "
                "copies would not follow the models: leave out the scaling (unbiased=False)."
            )
        if self.proximal is not None and self.method != "tracking":
            raise ValueError(f"proximal={self.proximal} goes with method='tracking', not with {self.method!r}.")
        if self.gathers_gradients and (self.local_steps != 1 or self.gossip_steps != 1):
            raise ValueError(
                f"method={self.method!r} communicates once at every step, but local_steps={self.local_steps} and "
                f"gossip_steps={self.gossip_steps}: set both to 1 (and rounds_per_epoch='pass')."
            )
        if self.message_dtype == "bf16" and self.method != "average":
            raise ValueError(
                f"message_dtype='bf16' rounds the rows of method='average', but method={self.method!r} keeps accounts "
                "of what was sent: leave it out, or use a compressor."
            )
        if self.max_update_norm is not None and self.gathers_gradients:
            raise ValueError(
                f"max_update_norm={self.max_update_norm} clips what local steps change, but with "
                f"method={self.method!r} clients step along what they have agreed on: leave it out, or use "
                "method='average' or 'choco'."
            )
        if self.method == "average":
            return
        if not isinstance(self.participation, FullParticipation):
            raise ValueError(
                f"participation={type(self.participation).__name__} leaves clients out, but with "
                f"method={self.method!r} neighbours keep an account of each other: use full participation "
                "(participation=None)."
            )
        if self.on_peer_loss == "drop":
            raise ValueError(
                f"with method={self.method!r} neighbours keep an account of each other, which a rank that was away "
                "would not have: use on_peer_loss='raise', or method='average'."
            )

    def setup_distributed(self) -> None:
        super().setup_distributed()
        self.exchange.message_dtype = torch.bfloat16 if self.message_dtype == "bf16" else None
        weights = self.topology.weights(self.num_clients)  # refuses a bad graph before anything is loaded
        if self.is_elastic and not np.allclose(weights, weights.T, rtol=0, atol=SUM_TOLERANCE):
            raise ValueError(
                "the weights of a directed topology are not doubly stochastic when ranks die: with "
                "on_peer_loss='drop' use an undirected topology (ring, torus, star, complete, ...)."
            )
        if not isinstance(self.participation, FullParticipation):
            restrict(weights, np.arange(self.num_clients) > 0)  # likewise a directed graph under partial participation
        if self.compressor is not None and self.topology.period(self.num_clients) != 1:
            raise ValueError(
                f"topology={type(self.topology).__name__} changes from round to round, but with a compressor clients "
                "keep the sum of what their neighbours have sent: use a topology that stays."
            )
        check_number_of_clients(self)
        check_neighbours(self)

    def setup_algorithm(self, bank: ClientBank, exchange: Exchange) -> None:
        rows = bank.rows.matrix
        if self.method != "average" and state_dtype(rows) != rows.dtype:
            rank_zero_info(f"GossipStrategy keeps copies and trackers in float32: {rows.dtype} would lose differences.")
        self._gossip = self._make_method(bank)
        self._clipping = None
        if self.max_update_norm is not None:
            self._clipping = UpdateClipping(self.max_update_norm, "whole", bank.layers)
        if self._looks_back:
            self._start_of_round = rows.clone()

    def _make_method(self, bank: ClientBank) -> GossipMethod:
        rows = bank.rows.matrix
        if self.method == "average":
            if self.robust is not None:
                return RobustGossip(self.weights, self.gossip_steps, self.robust)
            return GossipMethod(self.weights, self.gossip_steps)
        if self.compressor is None:
            return GradientTracking(self.weights, rows, self._apply_proximal)

        def copies(start: Tensor, number: int) -> PublicCopies:
            start = start.to(state_dtype(rows), copy=True)
            channel = CompressedChannel(self.compressor or Identity(), bank.layers, start, self.seed, number)
            return PublicCopies(channel, self.weights(0), start)

        zero = rows.new_zeros(()).expand_as(rows)
        x_hat = copies(rows if self.start == "model" else zero, number=0)
        if self.method == "choco":
            return Choco(self.weights, self.gossip_steps, x_hat, self.gamma)
        kind = Beer if self.method == "beer" else CompressedTracking
        return kind(self.weights, rows, self._apply_proximal, x_hat, copies(zero, number=1), self.gamma)

    def _apply_proximal(self, rows: Tensor) -> None:
        """prox with each parameter's own learning rate, on the rows after the optimizers' step."""
        if self.proximal is None:
            return
        groups = self.optimizers[0].param_groups
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        start = 0
        for parameter in self.bank.parameters:
            stop = start + parameter.numel()
            if id(parameter) in rates:
                self.proximal.apply_(rows[:, start:stop], float(rates[id(parameter)]))
            start = stop

    # -------------------------------------------------------------------------------------------------------- rounds

    @property
    def _looks_back(self) -> bool:
        """Whether somebody wants to know the rows with which a round began."""
        return self.max_update_norm is not None or self.attack is not None

    def start_round(self, rows: Tensor, buffers: Tensor, exchange: Exchange) -> None:
        if self._looks_back:
            self._start_of_round.copy_(rows)

    def directions(self, gradients: Tensor, exchange: Exchange) -> Tensor | None:
        self._left_out = not all_finite(gradients, exchange)()
        if self._left_out:
            self._skipped += 1
            rank_zero_warn(f"round {self.round}: a gradient is not finite, so all clients leave this step out.")
            return None
        return self._gossip.directions(gradients, exchange, self.round - self._skipped)

    def corrupt_rows(self, rows: Tensor, exchange: Exchange) -> None:
        if self.attack is not None:
            self.attack.corrupt(rows, self._start_of_round, exchange, self.cohort, (self.seed, self.round))

    def mix(self, rows: Tensor, exchange: Exchange) -> None:
        if self._clipping is not None:
            for slot in contributing_slots(self):
                self._clipping.clip_(rows[slot], self._start_of_round[slot])
        if not self._left_out:
            self._gossip.mix(rows, exchange, self.round - self._skipped)
        if self.attack is not None:
            self.attack.regroup(rows, exchange, self.cohort)

    def mix_buffers(self, buffers: Tensor, exchange: Exchange) -> None:
        for step in range(self.round * self.gossip_steps, (self.round + 1) * self.gossip_steps):
            self._gossip.average(buffers, exchange, step)

    def weights(self, gossip_step: int) -> np.ndarray:
        """W ``[N, N]`` of one gossip step: the topology's, restricted to the cohort."""
        weights = self.topology.weights(self.num_clients, gossip_step)
        if isinstance(self.participation, FullParticipation):
            return weights
        present = np.zeros(self.num_clients, dtype=bool)
        present[self.cohort] = True
        return restrict(weights, present)

    # ----------------------------------------------------------------------------------------- monitors, checkpoints

    def round_facts(self, round: int) -> RoundFacts:
        return RoundFacts(numbers={"skipped_steps": float(self._skipped)} if self.gathers_gradients else {})

    def measure(self, exchange: Exchange) -> dict[str, float]:
        return self._gossip.measure(exchange)

    def fixed_settings(self) -> dict[str, Any]:
        if self.method == "average":
            return {"method": self.method}
        # Clients keep sums that these weights have made.
        digest = hashlib.blake2b(self.weights(0).tobytes(), digest_size=4).hexdigest()
        topology = f"{type(self.topology).__name__} (weights {digest})"
        return {"method": self.method, "compressor": repr(self.compressor), "topology": topology}

    def client_matrices(self) -> dict[str, Tensor]:
        start = {"start_of_round": self._start_of_round} if self._looks_back else {}
        return {**self._gossip.client_matrices(), **start}

    def algorithm_state(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        self._skipped = state["skipped"]

"""EControl and its relatives: data-parallel training in which only compressed gradients travel.

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_fed.checks import check_callables, check_choice, check_kinds, check_numbers, given
from lightning_fed.compression import Compressor, TopK
from lightning_fed.federation.algorithm import RoundFacts
from lightning_fed.federation.clients import ClientBank
from lightning_fed.federation.error_feedback import CompressedMean, ErrorFeedbackName, FirstEstimate
from lightning_fed.federation.exchange import Exchange
from lightning_fed.federation.gradient_step import state_dtype
from lightning_fed.federation.participation import FullParticipation
from lightning_fed.federation.rounds import nonfinite_error, nonfinite_slots, restore_buffers
from lightning_fed.federation.server_model import ServerModel
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.federation.virtual_clock import VirtualClock


class EControlStrategy(FederatedStrategy):
    """Each client sends one compressed message a round: ``C(eta e_i + g_i - h_i)`` (Gao, Islamov, Stich, ICLR 2024).

    With ``local_steps=1`` (the default) ``g_i`` is the gradient of a minibatch. All clients train one model with the
    module's own optimizer, which steps along the estimate h where it would step along the gradient: momentum, AdamW,
    schedulers and clipping work as always. With more local steps, or ``local_steps=None`` and ``local_epochs``, the
    module's optimizer does the local work, ``g_i = x - y_i`` is the pseudo-gradient of the round, and the server's
    model moves by ``x <- x - h``, or with ``server_optimizer``.

    Args:
        compressor: C; by default the largest 1 % of the entries.
        error_feedback: ``"econtrol"``; or ``"ef21"``, ``"ef"`` and ``"none"``, see
            :class:`~lightning_fed.federation.error_feedback.CompressedMean`.
        eta: how strongly EControl feeds its error back; by default the compressor's delta (0.03 for ``ScaledSign`` and
            ``LowRank``). The paper's theory needs ``delta / 400``, its experiments tune it; a few times delta diverges.
        h0: the clients' estimates after the first step: ``"compressed"``, as EF21 begins; ``"zero"``; or ``"exact"``,
            as the paper's theory begins, which takes one message that is not compressed.
        local_steps: 1 to exchange gradients at every step, more to exchange what a round has changed.
        rounds_per_epoch: by default ``"pass"``, for an epoch that sees the largest shard once.
        optimizer_state: of the module's optimizer; by default ``"keep"`` with one local step, else ``"reset"``.
        server_optimizer: for more than one local step, makes an optimizer from the server's parameters.
        **federation: see :class:`~lightning_fed.federation.strategy.FederatedStrategy`.

    Raises:
        ValueError: if a setting is out of range, or if the compressor is no contraction and the method needs one.
    """

    settles_nonfinite = True

    def __init__(
        self,
        compressor: Compressor | None = None,
        error_feedback: ErrorFeedbackName = "econtrol",
        eta: float | None = None,
        h0: FirstEstimate = "compressed",
        local_steps: int | None = 1,
        rounds_per_epoch: int | Literal["pass"] = "pass",
        optimizer_state: Literal["reset", "keep"] | None = None,
        server_optimizer: OptimizerCallable | None = None,
        **federation: Any,
    ) -> None:
        one_model = local_steps == 1
        super().__init__(
            local_steps=local_steps,
            rounds_per_epoch=rounds_per_epoch,
            optimizer_state=("keep" if one_model else "reset") if optimizer_state is None else optimizer_state,
            **federation,
        )
        check_kinds(Compressor, **given(compressor=compressor))
        check_callables(**given(server_optimizer=server_optimizer))
        check_choice("error_feedback", error_feedback, "econtrol", "ef21", "ef", "none")
        check_choice("h0", h0, "exact", "zero", "compressed")
        check_numbers(**given(eta=eta))
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be between 0 (EF21) and 1.")
        self.compressor = compressor if compressor is not None else TopK(0.01)
        self.error_feedback = error_feedback
        self.eta = eta
        self.h0 = h0
        self.server_optimizer = server_optimizer
        self.gathers_gradients = self.one_model = one_model
        self._check()

    def _check(self) -> None:
        if self.error_feedback != "none" and not self.compressor.is_contractive:
            raise ValueError(
                f"compressor={self.compressor} is scaled to be unbiased, which may enlarge a vector, so the error that "
                f"error_feedback={self.error_feedback!r} feeds back would grow without bound: leave out the scaling "
                "(unbiased=False), or use error_feedback='none'."
            )
        if not isinstance(self.participation, FullParticipation):
            raise ValueError(
                f"participation={type(self.participation).__name__} leaves clients out, but h is the mean of what all "
                "clients send: use full participation (participation=None)."
            )
        if self.on_peer_loss == "drop":
            raise ValueError(
                "on_peer_loss='drop' would lose messages, and h would never again be the mean of the clients' h_i: use "
                "on_peer_loss='raise', and checkpoints to go on after a failure."
            )
        if self.server_optimizer is not None and self.one_model:
            raise ValueError(
                "server_optimizer is for rounds of several local steps; with local_steps=1 the module's own optimizer "
                "steps along the estimate: leave it out, or set local_steps."
            )
        if self.one_model and self.optimizer_state_policy == "reset":
            raise ValueError(
                "optimizer_state='reset' would forget momentum at every step, because with local_steps=1 each step is "
                "a round: leave it out."
            )

    def setup_algorithm(self, bank: ClientBank, exchange: Exchange) -> None:
        rows = bank.rows.matrix
        like = torch.zeros(rows.shape, dtype=state_dtype(rows), device=rows.device)
        if like.dtype != rows.dtype:
            rank_zero_info(
                f"EControlStrategy keeps e and h in float32: in {rows.dtype} small differences would vanish."
            )
        self._mean = CompressedMean(
            self.compressor, self.error_feedback, self.eta, self.h0, bank.layers, like, exchange, self.seed
        )
        self._server = None if self.one_model else ServerModel(bank.consensus[0], self.server_optimizer)
        self._complete = np.full((self.num_clients, self.num_clients), 1 / self.num_clients)

    # ------------------------------------------------------------------------------------- gradients, at every step

    def directions(self, gradients: Tensor, exchange: Exchange) -> Tensor | None:
        if self.clock is not None:
            super().pass_time(self.clock, self.cohort, np.ones(len(self.cohort), dtype=np.int64))
        h = self._estimate(gradients, exchange)
        return None if h is None else h.expand(len(gradients), -1)

    def pass_time(self, clock: VirtualClock, cohort: np.ndarray, local_steps: np.ndarray) -> None:
        if not self.one_model:  # else it has passed before the gradients were sent
            super().pass_time(clock, cohort, local_steps)

    # ---------------------------------------------------------------------------------- pseudo-gradients, each round

    def start_round(self, rows: Tensor, buffers: Tensor, exchange: Exchange) -> None:
        if self._server is not None:
            rows.copy_(self._server.row)  # nobody sends it: every client knows h, and so x

    def mix(self, rows: Tensor, exchange: Exchange) -> None:
        if self._server is not None:
            x = self._server.row.to(rows.device)
            h = self._estimate(x - rows.to(self._mean.mean.dtype), exchange)  # of g_i = x - y_i
            if h is None:
                restore_buffers(self)
                for slot in nonfinite_slots(self):
                    self.bank.forget(self.bank.clients[slot])  # its momentum is not finite either
            else:
                self._server.step(h)  # x <- x - h
        if not bool(torch.isfinite(self._current(rows).sum())):
            raise nonfinite_error(self, list(range(self.num_clients)))

    def _estimate(self, vectors: Tensor, exchange: Exchange) -> Tensor | None:
        h = self._mean.estimate(vectors, exchange)
        if h is None:
            rank_zero_warn(f"round {self.round}: a gradient is not finite, so all clients leave this step out.")
        return h

    def mix_buffers(self, buffers: Tensor, exchange: Exchange) -> None:
        exchange.mix_(buffers, self._complete)

    def _current(self, rows: Tensor) -> Tensor:
        return rows[0] if self._server is None else self._server.row

    def consensus(self, rows: Tensor, exchange: Exchange) -> Tensor:
        return self._current(rows).clone()

    # ----------------------------------------------------------------------------------------- monitors, checkpoints

    def round_facts(self, round: int) -> RoundFacts:
        return RoundFacts(numbers={"skipped_steps": float(self._mean.skipped)})

    def measure(self, exchange: Exchange) -> dict[str, float]:
        return self._mean.measure(exchange)

    def fixed_settings(self) -> dict[str, Any]:
        return {"compressor": repr(self.compressor), "error_feedback": self.error_feedback, "one_model": self.one_model}

    def client_matrices(self) -> dict[str, Tensor]:
        return self._mean.client_matrices()

    def algorithm_state(self) -> dict[str, Any]:
        server = self._server.state() if self._server is not None else None
        return {"mean": self._mean.state(), "server": server}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        self._mean.load_state(state["mean"])
        if self._server is not None:
            self._server.load_state(state["server"])

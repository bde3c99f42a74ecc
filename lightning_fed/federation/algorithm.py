"""What an algorithm is to the engine: the methods that a strategy overrides, and nothing else.

Shapes: C = clients on this rank, P = trainable parameters, B = float buffer numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_fed.federation.exchange import Exchange

if TYPE_CHECKING:
    from lightning_fed.federation.clients import ClientBank
    from lightning_fed.federation.sampler import JointBatch
    from lightning_fed.federation.virtual_clock import VirtualClock


@dataclass(frozen=True)
class RoundFacts:
    """What an algorithm tells callbacks of a round, beside the cohort that the participation knows.

    Attributes:
        numbers: what should be logged, by name.
        aggregators: clients that averaged the round's models.
        joined: clients that came online in the round; ``left``: those that went offline, with or without a goodbye.
        offline: clients that were offline when it ended.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    aggregators: Sequence[int] = ()
    joined: Sequence[int] = ()
    left: Sequence[int] = ()
    offline: Sequence[int] = ()


class Algorithm(ABC):
    """The communication of a federated or decentralized algorithm; one round calls the methods in this order.

    Only :meth:`mix` must be written. Rows and the :class:`Exchange` are all that an algorithm sees of the federation;
    it never calls ``torch.distributed``.

    Attributes:
        gathers_gradients: the clients' gradients meet before their optimizers step: see :meth:`directions`.
        one_model: all clients train one model, with one optimizer state; only for what gathers gradients.
        settles_nonfinite: the algorithm itself deals with rows that are not finite.
    """

    gathers_gradients: bool = False
    one_model: bool = False
    settles_nonfinite: bool = False

    @property
    def keeps_rows(self) -> bool:
        """Whether a client's row outlives its round.

        If not, only the cohort has rows, from before :meth:`start_round` on, which must write all of them, until the
        next round begins. Methods then get the rows of the cohort's clients on this rank alone, there are no
        :meth:`client_matrices`, and gossip is not possible.
        """
        return True

    def setup_algorithm(self, bank: ClientBank, exchange: Exchange) -> None:
        """Make the algorithm's own state, when rows exist; called once a fit, before a checkpoint is restored."""

    def start_round(self, rows: Tensor, buffers: Tensor, exchange: Exchange) -> None:
        """What happens before the first local step of a round, for example the download of a server's model."""

    def after_joint_step(self, joint: JointBatch) -> None:
        """What happens when this rank's clients have taken a local step each, before the round is over."""

    def directions(self, gradients: Tensor, exchange: Exchange) -> Tensor | None:
        """What the clients' optimizers take for their gradients; called before each round's step on every rank.

        Args:
            gradients: of this rank's clients, ``[C, P]``, at least float32; may be changed.
            exchange: of this rank.

        Returns:
            ``[C, P]``, or None to leave out the step on all ranks (which must agree).
        """
        return gradients

    def pass_time(self, clock: VirtualClock, cohort: np.ndarray, local_steps: np.ndarray) -> None:
        """Let a round's local steps pass on the virtual clock, if there is one; called before :meth:`mix`.

        Override it in an algorithm that keeps the clock's times itself, and set ``exchange.clock`` to None after
        ``setup_distributed`` if its communication should not advance them either.

        Args:
            clock: the strategy's.
            cohort: who took part, int64 ``[cohort]``.
            local_steps: optimizer steps of each of them, int64 ``[cohort]``.
        """
        clock.local_work(cohort, local_steps)

    def corrupt_rows(self, rows: Tensor, exchange: Exchange) -> None:
        """Let simulated attackers replace their rows, before rows are checked and mixed; called on every rank."""

    @abstractmethod
    def mix(self, rows: Tensor, exchange: Exchange) -> None:
        """The communication of a round, in place on the rows ``[C, P]`` of this rank's clients.

        Called after the last local step of a round, on every rank. ``self.round`` is the round that ends,
        ``self.cohort`` who took part.
        """

    def mix_buffers(self, buffers: Tensor, exchange: Exchange) -> None:
        """The same for float buffers (BatchNorm statistics) ``[C, B]``; by default they are mixed like parameters.

        Override it if :meth:`mix` does more than average, for example if it keeps a momentum.
        """
        self.mix(buffers, exchange)

    def consensus(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """The model that is evaluated and exported, ``[P]``: by default the mean of all clients' rows."""
        return exchange.mean(rows)

    def consensus_buffers(self, buffers: Tensor, exchange: Exchange) -> Tensor:
        """The float buffers of that model, ``[B]``."""
        return exchange.mean(buffers)

    def round_facts(self, round: int) -> RoundFacts:
        """What callbacks may log and draw of a round that has ended, from 0; equal on all ranks."""
        return RoundFacts()

    def measure(self, exchange: Exchange) -> dict[str, float]:
        """What a monitor may log beside, at the price of a pass over rows or a collective call; equal on all ranks."""
        return {}

    def fixed_settings(self) -> dict[str, Any]:
        """Settings, as plain values, that a run must share with the checkpoint from which it resumes."""
        return {}

    def algorithm_state(self) -> dict[str, Any]:
        """State of the algorithm that a resumed run needs, equal on all ranks: tensors and plain values."""
        return {}

    def client_matrices(self) -> dict[str, Tensor]:
        """State that each client has of its own (control variates, error feedback), one row a client ``[C, ...]``.

        A checkpoint saves the rows by client, and restores them in place, on whichever rank hosts the client.
        """
        return {}

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`algorithm_state`."""

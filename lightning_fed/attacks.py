"""Hostile and broken clients, simulated: what some clients send instead of what they have trained.

For tests and studies of robust federations. An attack replaces the rows of its clients at the end of their local work,
before rows are checked and mixed. Only trainable parameters are replaced; float buffers stay as trained. Attackers work
together and may see all honest rows; what they learn that way costs no bytes. They begin a round with the server's
model, or in gossip with the mean of the honest clients' mixed rows, so their own state never runs away, and the mean of
all rows is that of the honest ones.

x_i is the row of client i at the end of its local work, x_i^0 at the beginning of the round, and u_i = x_i - x_i^0 its
update. :class:`~lightning_fed.data.LabelFlip` attacks the data instead.

Shapes: N = clients, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from lightning_fed.checks import check_numbers, given
from lightning_fed.federation.exchange import Exchange
from lightning_fed.federation.randomness import Stream, derive_seed
from lightning_fed.federation.robust_mixing import ordered_mean


@dataclass(frozen=True)
class Seen:
    """What attackers see of a round.

    Attributes:
        rows: x_i of this rank's clients, ``[C, P]``.
        starts: x_i^0, ``[C, P]``.
        exchange: of this rank.
        attackers: hostile clients of the cohort, sorted.
        honest: its other clients, sorted.
        key: what random numbers may depend on: the federation's seed and the round.
    """

    rows: Tensor
    starts: Tensor
    exchange: Exchange
    attackers: np.ndarray
    honest: np.ndarray
    key: tuple[int, int]

    def honest_mean(self, rows: Tensor) -> Tensor:
        """The mean over the honest clients ``[P]``; a collective call."""
        return ordered_mean(rows, self.honest, self.exchange)


Corrupted = Callable[[int], Tensor]  # the slot of an attacker on this rank -> what it sends, [P]


class Attack(ABC):
    """Clients that do not send what they have trained.

    Args:
        clients: the attackers, for example ``[0, 1]``. The strategy's rule does not know them.

    Raises:
        ValueError: if they are no client numbers, or none.
    """

    def __init__(self, clients: Sequence[int]) -> None:
        self.clients = checked_clients(clients)

    def validate(self, num_clients: int) -> None:
        """Refuse attackers that are not in the federation, or no client that is honest.

        Raises:
            ValueError: naming them.
        """
        if self.clients[-1] >= num_clients:
            raise ValueError(
                f"clients={self.clients} of {type(self).__name__} are not all among the num_clients={num_clients} "
                f"clients 0 .. {num_clients - 1}."
            )
        if len(self.clients) == num_clients:
            raise ValueError(
                f"clients={self.clients} of {type(self).__name__} are all num_clients={num_clients} clients: leave "
                "some of them honest."
            )

    @torch.no_grad()
    def corrupt(
        self, rows_CP: Tensor, starts_CP: Tensor, exchange: Exchange, cohort: np.ndarray, key: tuple[int, int]
    ) -> None:
        """Replace the attackers' rows, in place; a collective call.

        In a cohort without an honest client there is nobody to harm, and it does nothing.

        Args:
            rows_CP: x_i of this rank's clients.
            starts_CP: x_i^0.
            exchange: of this rank.
            cohort: who takes part in the round.
            key: the federation's seed, and the round.
        """
        attackers, honest = self._sides(cohort)
        if not len(attackers) or not len(honest):
            return
        corrupted = self.plan(Seen(rows_CP, starts_CP, exchange, attackers, honest, key))
        for slot in np.flatnonzero(np.isin(exchange.present, attackers)).tolist():
            rows_CP[slot] = corrupted(slot)

    @torch.no_grad()
    def regroup(self, rows_CP: Tensor, exchange: Exchange, cohort: np.ndarray) -> None:
        """After a round of gossip, let its attackers be where its honest clients are on average; a collective call."""
        attackers, honest = self._sides(cohort)
        if not len(attackers) or not len(honest):
            return
        mean = ordered_mean(rows_CP, honest, exchange)
        for slot in np.flatnonzero(np.isin(exchange.present, attackers)).tolist():
            rows_CP[slot] = mean

    def _sides(self, cohort: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Who of a cohort is hostile, and who is honest."""
        hostile = np.isin(cohort, self.clients)
        return cohort[hostile], cohort[~hostile]

    @abstractmethod
    def plan(self, seen: Seen) -> Corrupted:
        """Called on every rank, also where no attacker is; returns what each attacker sends."""


class SignFlip(Attack):
    """The update with the wrong sign: ``x_i^0 - scale u_i``.

    Args:
        clients: the attackers.
        scale: how much larger it is.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(self, clients: Sequence[int], scale: float = 1.0) -> None:
        super().__init__(clients)
        check_numbers("(0, inf)", scale=scale)
        self.scale = scale

    def plan(self, seen: Seen) -> Corrupted:
        return lambda slot: seen.starts[slot] - self.scale * (seen.rows[slot] - seen.starts[slot])


class ALittleIsEnough(Attack):
    """The mean, off by so little that it does not stand out: ``mean - z std`` (Baruch et al., NeurIPS 2019).

    Mean and standard deviation (of the population) are those of the honest rows, coordinate by coordinate. The paper's
    attackers estimate both from what they would have sent themselves; to know them is stronger, and what later work
    does.

    Args:
        clients: the attackers.
        z: by default the largest with which the honest clients that are farther from the mean are enough for a majority
            with the attackers (the paper's z_max): of n clients in a round, f of them hostile,
            ``s = floor(n / 2 + 1) - f`` and ``Phi(z) = (n - f - s) / (n - f)``.

    Raises:
        ValueError: if a setting is out of range; in a round, if the attackers are a majority of the cohort, or so few
            that there is no z.
    """

    def __init__(self, clients: Sequence[int], z: float | None = None) -> None:
        super().__init__(clients)
        check_numbers(**given(z=z))
        self.z = z

    def plan(self, seen: Seen) -> Corrupted:
        z = largest_z(len(seen.honest), len(seen.attackers)) if self.z is None else self.z
        mean = seen.honest_mean(seen.rows)
        deviation = seen.honest_mean((seen.rows - mean).square()).sqrt()
        return lambda slot: mean - z * deviation


class FallOfEmpires(Attack):
    """The mean update, backwards: ``x_i^0 - epsilon mean_j u_j`` over honest j (Xie, Koyejo, Gupta, UAI 2019).

    A small epsilon keeps close to the honest rows, a large one turns the average around.

    Args:
        clients: the attackers.
        epsilon: above 0.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(self, clients: Sequence[int], epsilon: float = 1.0) -> None:
        super().__init__(clients)
        check_numbers("(0, inf)", epsilon=epsilon)
        self.epsilon = epsilon

    def plan(self, seen: Seen) -> Corrupted:
        mean_update = seen.honest_mean(seen.rows - seen.starts)
        return lambda slot: seen.starts[slot] - self.epsilon * mean_update


class GaussianNoise(Attack):
    """Noise in place of an update: ``x_i^0 + std N(0, I)``, fresh in every round.

    Args:
        clients: the attackers.
        std: of each number. Blanchard et al. 2017 use 200.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(self, clients: Sequence[int], std: float = 1.0) -> None:
        super().__init__(clients)
        check_numbers("(0, inf)", std=std)
        self.std = std

    def plan(self, seen: Seen) -> Corrupted:
        def noisy(slot: int) -> Tensor:
            client = int(seen.exchange.present[slot])
            draw = torch.Generator().manual_seed(derive_seed(Stream.ATTACK, *seen.key, client))
            start = seen.starts[slot]
            return start + self.std * torch.randn(len(start), generator=draw, dtype=torch.float64).to(start)

        return noisy


class Silent(Attack):
    """No update: the client sends the row with which it began, ``x_i^0``, in gossip and to a server alike.

    It stands for a client that has trained nothing, or whose message was lost and is replaced by what the others know
    of it. Ranks that are really gone are another matter: ``on_peer_loss="drop"``.
    """

    def plan(self, seen: Seen) -> Corrupted:
        return lambda slot: seen.starts[slot]


class NotANumber(Attack):
    """Rows of NaN: ``on_nonfinite="raise"`` ends the run and names the clients, ``"drop"`` leaves them out."""

    def plan(self, seen: Seen) -> Corrupted:
        return lambda slot: torch.full_like(seen.rows[slot], torch.nan)


def largest_z(honest: int, attackers: int) -> float:
    """z of :class:`ALittleIsEnough`; the numbers are those of the clients in a round.

    Raises:
        ValueError: if there is none.
    """
    supporters = (honest + attackers) // 2 + 1 - attackers  # floor(n / 2 + 1) - f
    fraction = (honest - supporters) / honest
    if not 0 < fraction < 1:
        raise ValueError(
            f"z=None, but for {attackers} attackers among {honest + attackers} clients of a round the paper's formula "
            "has no solution: set z (for example z=1.0), or change the number of attackers."
        )
    return NormalDist().inv_cdf(fraction)


def checked_clients(clients: Sequence[int]) -> list[int]:
    """Client numbers, sorted.

    Raises:
        ValueError: if they are none, or one is no whole number of at least 0, or is there twice.
    """
    numbers = np.asarray(clients)
    if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu" or numbers.min() < 0:
        raise ValueError(f"clients={clients!r} must be a list of client numbers, for example [0, 1].")
    if len(np.unique(numbers)) != len(numbers):
        raise ValueError(f"clients={clients!r} names a client twice.")
    return sorted(numbers.tolist())

"""Which ranks of an elastic federation are alive, and which of them leads: logs, validates and saves checkpoints."""

from __future__ import annotations

import logging
import threading

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_fed.federation.peer_network import PeerNetwork

logger = logging.getLogger(__name__)

LEADER, OVER = "leader", "over"


class Survivors:
    """What one rank knows of the others.

    Rank 0 leads at first. Whoever finds the leader silent asks all ranks; the lowest that answers takes over, by an
    atomic exchange in the store, so that all agree on one leader. One that was only slow sees then that it no longer
    leads.

    Args:
        network: of this rank.
        ping_timeout: seconds in which a living rank answers.

    Attributes:
        leader: the rank that leads, as far as this rank knows.
        is_over: whether the leader has come to the end of the fit and is gone; nobody leads any more.
    """

    def __init__(self, network: PeerNetwork, ping_timeout: float) -> None:
        self.network = network
        self.ping_timeout = ping_timeout
        self.is_over = False
        self._look: threading.Thread | None = None
        self.leader = int(network.store.compare_set(LEADER, "", "0"))
        if self.is_leader and network.incarnation > 1:
            self._step_aside()
        self._obey()

    @property
    def is_leader(self) -> bool:
        return self.leader == self.network.rank

    def living(self) -> list[int]:
        """The ranks that answer, this one included; waits for the silent ones."""
        return sorted(self.network.ping(range(self.network.num_ranks), self.ping_timeout))

    def update(self) -> None:
        """See whether the leader has changed or is silent, and take over if this rank is the next one."""
        store = self.network.store
        self.leader = int(store.get(LEADER))
        is_silent = not self.is_leader and not self.network.ping([self.leader], self.ping_timeout)
        if is_silent and store.check([OVER]):
            self.is_over = True
        elif is_silent and self.living()[0] == self.network.rank:
            self.leader = int(store.compare_set(LEADER, str(self.leader), str(self.network.rank)))
        self._obey()

    def end(self) -> None:
        """The leader has come to the end: whoever lags must not lead, and write over what has been saved."""
        self.network.store.set(OVER, "")

    def hand_over(self, rank: int) -> None:
        """Let another rank lead from now on."""
        self.leader = int(self.network.store.compare_set(LEADER, str(self.network.rank), str(rank)))
        self._obey()

    def _step_aside(self) -> None:
        """A process that takes the place of a dead leader knows less than the others, so one of them leads."""
        others = [rank for rank in self.living() if rank != self.network.rank]
        if others:
            self.hand_over(others[0])

    def update_soon(self) -> None:
        """The same on a thread of its own, because to find a leader silent takes as long as two pings."""
        if self._look is None or not self._look.is_alive():
            self._look = threading.Thread(target=self._update_quietly, name="leader", daemon=True)
            self._look.start()

    def finish(self) -> None:
        """Wait for what :meth:`update_soon` has begun."""
        if self._look is not None:
            self._look.join()

    def _update_quietly(self) -> None:
        try:
            self.update()
        except RuntimeError as error:  # which the main thread finds out for itself
            logger.debug("the store is gone: %s", error)

    def _obey(self) -> None:
        # Lightning's loggers and messages ask for "rank zero".
        rank_zero_only.rank = 0 if self.is_leader else max(self.network.rank, 1)  # type: ignore[attr-defined]

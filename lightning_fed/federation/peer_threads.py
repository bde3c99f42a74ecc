"""The threads that work on links, so that no rank ever waits for another one's message unless it wants to."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from lightning_fed.federation.peer_links import Inbox, Link, Parcel, PeerLost, Received

logger = logging.getLogger(__name__)


class LinkThread(threading.Thread):
    """A thread that works on one link at a time, which others may break at any time."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.closed = False
        self._link: Link | None = None
        self._lock = threading.Lock()

    def adopt(self, link: Link) -> Link:
        """Take a new link.

        Raises:
            ConnectionAbortedError: if the thread was closed meanwhile.
        """
        with self._lock:
            self._link = link
        if self.closed:
            raise ConnectionAbortedError("the network was closed")
        return link

    def drop(self) -> None:
        """Break the link, if there is one."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def close(self) -> None:
        """Make the thread end soon; does not wait for that."""
        self.closed = True
        self.drop()


class ReceiverThread(LinkThread):
    """Puts into the inbox what comes over one link, until the link breaks.

    Args:
        rank: the sending rank.
        connect: makes the link.
        inbox: for messages, and the loss of the link.
        timeout: seconds that a message may take once it has begun.
        predecessor: the thread of the sender's earlier link, which the sender has given up.
    """

    def __init__(
        self,
        rank: int,
        connect: Callable[[], Link],
        inbox: Inbox,
        timeout: float,
        predecessor: ReceiverThread | None,
    ) -> None:
        super().__init__(f"receive-from-{rank}")
        self.rank, self.connect, self.inbox, self.timeout, self.predecessor = rank, connect, inbox, timeout, predecessor

    def run(self) -> None:
        if self.predecessor is not None:
            self._follow(self.predecessor)
            self.predecessor = None
        try:
            link = self.adopt(self.connect())
        except (RuntimeError, OSError) as error:
            logger.debug("no link from rank %d: %s", self.rank, error)  # which the sender learns by itself
            return self.drop()
        try:
            while True:
                header, tensors = link.receive(self.timeout)
                self.inbox.put(Received(self.rank, header, tensors))
        except (RuntimeError, ValueError) as error:
            if not self.closed:
                report = logger.warning if isinstance(error, ValueError) else logger.debug
                report("lost the link from rank %d: %s", self.rank, error)
                self.inbox.put(PeerLost(self.rank))
        self.drop()

    @staticmethod
    def _follow(predecessor: ReceiverThread) -> None:
        """End the earlier link, so that what came over it is in the inbox before what will come over this one."""
        connected = predecessor._link is not None
        predecessor.close()
        if connected:  # one that is still waiting for its sender has received nothing
            predecessor.join()


class SenderThread(LinkThread):
    """Sends one peer what is put into its queue, over a link that it makes on first use and after each loss.

    Args:
        rank: the receiving rank.
        connect: makes a link to the peer.
        is_current: whether the last link made still leads to the peer's living process, as far as the store knows.
        inbox: for the loss of the link.
        settled: told of how many messages have been delivered or lost.
        timeout: seconds that a message may take.
    """

    def __init__(
        self,
        rank: int,
        connect: Callable[[], Link],
        is_current: Callable[[], bool],
        inbox: Inbox,
        settled: Callable[[int], None],
        timeout: float,
    ) -> None:
        super().__init__(f"send-to-{rank}")
        self.rank, self.connect, self.is_current, self.inbox = rank, connect, is_current, inbox
        self.settled, self.timeout = settled, timeout
        self.parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()

    def run(self) -> None:
        while (parcel := self.parcels.get()) is not None:
            try:
                self._deliver(parcel)
                self.settled(1)
            except (RuntimeError, OSError) as error:
                self.drop()
                lost = 1 + self._discard()
                if not self.closed:
                    logger.debug("lost the link to rank %d: %s", self.rank, error)
                    self.inbox.put(PeerLost(self.rank))
                self.settled(lost)
        self.drop()

    def close(self) -> None:
        super().close()
        self.parcels.put(None)

    def _deliver(self, parcel: Parcel) -> None:
        link = self._link
        if link is None or not self.is_current():
            self.drop()
            link = self.adopt(self.connect())
        link.send(parcel, self.timeout)

    def _discard(self) -> int:
        """Throw away what waits for a peer that is lost; returns how many messages."""
        lost = 0
        while not self.parcels.empty():
            if self.parcels.get() is None:
                self.parcels.put(None)
                break
            lost += 1
        return lost

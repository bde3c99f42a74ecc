"""What a rank of an elastic federation has heard from the others, and which of them it takes for dead."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_fed.federation.pair_record import Step
from lightning_fed.federation.peer_network import Received
from lightning_fed.federation.peers import Peers

# How many times within the ping timeout a rank that waits looks whether the others live.
LOOKS = 2


class PeerMail:
    """Messages by kind and step, until the main thread needs them.

    The thread of the events writes; the main thread reads under ``events.changed``.

    Args:
        peers: of this rank.

    Attributes:
        suspects: ranks that were silent when last asked, and have said nothing since.
        lost: ranks to or from which a link has broken, until the main thread forgets it.
        cut_off: ranks to or from which a link has broken, and from which no tensor has come since. Nobody waits for
            them again, but what they should get is still sent, as soon as a link can be made.
        messages: what has come, by sender.
    """

    def __init__(self, peers: Peers) -> None:
        self.network, self.events, self.survivors = peers.network, peers.events, peers.survivors
        self.suspects: set[int] = set()
        self.lost: set[int] = set()
        self.cut_off: set[int] = set()
        self.messages: dict[tuple[str, Step], dict[int, Received]] = {}
        self._news: set[int] = set()
        self.events.on_loss = self._on_loss

    @property
    def look_interval(self) -> float:
        """Seconds of silence after which a rank that waits should ask whether the others live."""
        return self.survivors.ping_timeout / LOOKS

    def heard(self, message: Received) -> None:
        """Somebody lives."""
        self.suspects.discard(message.sender)
        if message.tensors:  # else it may have come through the store
            self.cut_off.discard(message.sender)
        self._news.add(message.sender)

    def keep(self, message: Received) -> None:
        """Keep a message for its step."""
        self.heard(message)
        self.messages.setdefault((message.header["kind"], step_of(message)), {})[message.sender] = message

    def forget_before(self, kind: str, step: Step) -> None:
        """Drop the messages of earlier steps."""
        for old in [key for key in self.messages if key[0] == kind and key[1] < step]:
            del self.messages[old]

    def await_news(self, timeout: float) -> set[int]:
        """Wait for a message or a loss; returns the ranks of which there is news since the last call."""
        self.events.wait_for(lambda: bool(self._news), max(timeout, 0))
        with self.events.changed:
            news, self._news = self._news, set()
        return news

    def look_after(self, ranks: Iterable[int]) -> None:
        """Ask ranks whether they live, and suspect those that do not answer."""
        asked = set(ranks)
        silent = asked - self.network.ping(asked, self.survivors.ping_timeout)
        with self.events.changed:
            self.suspects |= silent

    def _on_loss(self, rank: int) -> None:
        if rank == self.network.rank:
            raise RuntimeError("the store of the federation is gone")
        self.lost.add(rank)
        self.cut_off.add(rank)
        self._news.add(rank)


def step_of(message: Received) -> Step:
    """The step that a message belongs to."""
    round, number = message.header["step"]
    return round, number

"""The thread on which an elastic federation's messages and timers are handled, one after the other."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable

from lightning_fed.federation.peer_network import PeerLost, PeerNetwork, Received


class PeerTimer:
    """A callback that is due in the future."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget it."""
        self.callback = None


class PeerEvents(threading.Thread):
    """Handles what arrives from other ranks and what is due, while the main thread trains.

    Args:
        network: whose inbox it empties.

    Attributes:
        after_each: called after every handled message, call or timer.
        failure: what a handler has raised, if one has; nothing is handled after that.
        on_loss: told of a rank to or from which a link has broken.
        changed: notified after every handled message, call or timer, and by a failure.
    """

    def __init__(self, network: PeerNetwork) -> None:
        super().__init__(name="peer-events", daemon=True)
        self.network = network
        self.failure: BaseException | None = None
        self.changed = threading.Condition()
        self.after_each: Callable[[], None] = lambda: None
        self.on_loss: Callable[[int], None] = lambda rank: None
        self._handlers: dict[str, Callable[[Received], None]] = {}
        self._timers: list[tuple[float, int, PeerTimer]] = []
        self._calls: dict[int, Callable[[], None]] = {}
        self._count = itertools.count()
        self._stopped = False

    def on(self, kind: str, handler: Callable[[Received], None]) -> None:
        """Handle messages whose header has this ``kind``; before the thread starts."""
        self._handlers[kind] = handler

    def call(self, callback: Callable[[], None]) -> None:
        """Run something on this thread, soon; from any thread."""
        number = next(self._count)
        self._calls[number] = callback
        self.network.inbox.put(Received(self.network.rank, {"kind": "call", "number": number}, []))

    def call_later(self, seconds: float, callback: Callable[[], None]) -> PeerTimer:
        """Run something on this thread when so many seconds have passed; from this thread only."""
        timer = PeerTimer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), timer))
        return timer

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait, on another thread, until something that is handled here has made a condition true.

        Args:
            condition: is evaluated while nothing is handled.
            timeout: seconds; None for no limit.

        Returns:
            whether it became true in time.

        Raises:
            RuntimeError: if a handler has failed.
        """
        with self.changed:
            met = self.changed.wait_for(lambda: self.failure is not None or condition(), timeout)
        if self.failure is not None:
            raise RuntimeError(
                f"rank {self.network.rank} cannot go on without its peers: {self.failure}"
            ) from self.failure
        return met

    def stop(self) -> None:
        """End the thread, and wait for that."""
        self.call(self._stop)
        self.join()

    def run(self) -> None:
        try:
            while not self._stopped:
                self._handle_next()
        except BaseException as failure:
            with self.changed:
                self.failure = failure
                self.changed.notify_all()

    def _handle_next(self) -> None:
        """One message; or one timer, if there is no message.

        Messages first: a process that was stopped for a while finds answers in its inbox that came in time.
        """
        wait = max(self._timers[0][0] - time.monotonic(), 0) if self._timers else None
        try:
            message = self.network.inbox.get(timeout=wait) if wait != 0 else self.network.inbox.get_nowait()
        except queue.Empty:
            message = None
        with self.changed:
            if message is None:
                timer = heapq.heappop(self._timers)[2]
                callback, timer.callback = timer.callback, None
                if callback is not None:
                    callback()
            elif isinstance(message, PeerLost):
                self.on_loss(message.rank)
            else:
                self._dispatch(message)
            self.after_each()
            self.changed.notify_all()

    def _dispatch(self, message: Received) -> None:
        kind = message.header["kind"]
        if kind == "call" and message.sender == self.network.rank:
            self._calls.pop(message.header["number"])()
        elif kind in self._handlers:
            self._handlers[kind](message)

    def _stop(self) -> None:
        self._stopped = True

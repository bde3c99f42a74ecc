"""The wires of an elastic federation: ranks may die, stop or be slow at any moment, and the others go on.

Everything rests on a ``TCPStore`` that no rank hosts. Small notes are queues in the store; tensors travel over
:mod:`links <lightning_fed.federation.peer_links>` between two ranks, which are made when first used and made anew
after a loss. There is no default process group and no collective, so nobody ever waits for everybody.

A rank that died is noticed when its connections close: at once, or, if it had forked data loader workers, when those
have noticed it too (about five seconds later), or when it has not taken a message in time.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_fed.federation.peer_links import FOREVER, RECEIVER, SENDER, Inbox, Link, PeerLost, Received, pack
from lightning_fed.federation.peer_threads import ReceiverThread, SenderThread

__all__ = ["STORE_VARIABLE", "PeerLost", "PeerNetwork", "Received", "connect_store", "store_address"]

logger = logging.getLogger(__name__)

STORE_VARIABLE = "LIGHTNING_FED_STORE"
# How often a rank that waits for a link looks whether the peer has been restarted meanwhile.
SECONDS_BETWEEN_LOOKS = 0.5


def store_address() -> tuple[str, int] | None:
    """Host and port of the store that outlives the ranks; None if whatever started this rank hosts none.

    Raises:
        ValueError: if LIGHTNING_FED_STORE is set to something else than ``host:port``.
    """
    if address := os.environ.get(STORE_VARIABLE):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"{STORE_VARIABLE}={address!r} is not of the form host:port.")
        return host.strip("[]"), int(port)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return None


def connect_store(host: str, port: int, timeout: float) -> dist.TCPStore:
    """A client of the store with a connection of its own.

    Args:
        host: where the store is.
        port: where the store is.
        timeout: seconds for the connection, and for each later wait for a key.

    Raises:
        ConnectionError: if nothing answers there.
    """
    try:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise ConnectionError(f"no store of a federation can be reached at {host}:{port}: {error}") from error


class PeerNetwork:
    """One rank's connection to the other ranks of an elastic federation.

    Messages to one rank arrive in the order in which they were sent, those of ``note`` and of ``send`` each among
    themselves. A message that cannot be delivered is lost: what speaks over this network must bear that.

    Args:
        host: where the store is.
        port: where the store is.
        rank: this rank.
        num_ranks: how many ranks there are.
        prefix: of all keys in the store. Networks that follow each other (one for each ``fit``) must differ in it.
        send_timeout: seconds that a peer may take for one message.
        connect_timeout: seconds to wait for the store, and for a peer when a link to it is made.

    Attributes:
        inbox: what arrives, see :class:`Received` and :class:`PeerLost`.
        incarnation: 1 in the first process of this rank, 2 after it was restarted, and so on.
        store: a client for small reads and writes of the thread that made this object.

    Raises:
        ConnectionError: if the store cannot be reached.
    """

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        num_ranks: int,
        prefix: str = "lightning_fed",
        send_timeout: float = 30.0,
        connect_timeout: float = 30.0,
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks} ranks.")
        self.rank, self.num_ranks = rank, num_ranks
        self.send_timeout, self.connect_timeout = send_timeout, connect_timeout
        self.inbox: Inbox = queue.SimpleQueue()
        # A client serves one call at a time, so whoever may wait in it needs one alone. This one never waits.
        self._client = dist.PrefixStore(prefix, connect_store(host, port, connect_timeout))
        self.store = self._client.clone()
        # For links, one after the other: each new connection to a store looks up names, which takes seconds where the
        # name server is slow. More are made when more links are made at once.
        self._idle_clients: queue.SimpleQueue[dist.Store] = queue.SimpleQueue()
        for _ in range(2):
            self._idle_clients.put(self._client.clone())
        self.incarnation = self._client.add(f"incarnation/{rank}", 1)
        self._closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._wire_bytes = 0
        self._unsettled: Counter[int] = Counter()
        self._ping_numbers = itertools.count()
        self._answers: dict[int, set[int]] = {}
        self._accepted: dict[int, threading.Event] = {}
        self._linked_incarnation: dict[int, int] = {}
        self._senders: dict[int, SenderThread] = {}
        self._receivers: dict[int, ReceiverThread] = {}
        mail_client = connect_store(host, port, connect_timeout)
        mail_client.set_timeout(FOREVER)
        self._mail = threading.Thread(
            target=self._read_mail, args=[dist.PrefixStore(prefix, mail_client)], name="mail", daemon=True
        )
        self._mail.start()
        # An interpreter must not end under threads that wait in C++.
        atexit.register(self.close)

    @property
    def wire_bytes(self) -> int:
        """Bytes of tensors that this rank has handed to links so far."""
        return self._wire_bytes

    def note(self, rank: int, header: dict[str, Any]) -> None:
        """Send a small message through the store.

        It waits there for a rank that has not started yet, but not for the next process of a rank that died.

        Raises:
            TypeError: if the header is not a JSON object.
            RuntimeError: if the store is gone.
        """
        self._check(rank)
        if not isinstance(header, dict):
            raise TypeError(f"a header must be a dict that JSON can hold, not {type(header).__name__}.")
        text = json.dumps({"kind": "note", "sender": self.rank, "header": header})
        if rank == self.rank:
            self.inbox.put(Received(rank, json.loads(text)["header"], []))
        else:
            self._post(rank, self._incarnation_of(rank), text)

    def send(self, rank: int, header: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """Send a message with tensors, which are copied; returns at once.

        If it is lost, and with it whatever else waits for that rank, a :class:`PeerLost` arrives. (It may, rarely,
        have been received nevertheless.) The next message tries a new link.

        Raises:
            TypeError: if the header is not a JSON object, or a tensor is of a kind that links do not carry.
        """
        parcel = pack(header, tensors)
        if rank == self.rank:
            self.inbox.put(Received(rank, json.loads(json.dumps(header)), parcel.tensors))
            return
        with self._lock:
            self._check(rank)
            self._unsettled[rank] += 1
            self._wire_bytes += parcel.num_bytes
            if rank not in self._senders:
                self._senders[rank] = SenderThread(
                    rank,
                    partial(self._connect, rank),
                    partial(self._is_current, rank),
                    self.inbox,
                    partial(self._settle, rank),
                    self.send_timeout,
                )
                self._senders[rank].start()
            self._senders[rank].parcels.put(parcel)

    def ping(self, ranks: Iterable[int], timeout: float) -> set[int]:
        """Ask ranks, all at once, whether they run; their mail threads answer whatever else they do.

        Args:
            ranks: whom to ask.
            timeout: seconds to wait for the last of them.

        Returns:
            those that answered in time.

        Raises:
            RuntimeError: if the store is gone.
        """
        asked = set(ranks)
        deadline = time.monotonic() + timeout
        with self._lock:
            number = next(self._ping_numbers)
            answers = self._answers[number] = asked & {self.rank}
        try:
            text = json.dumps({"kind": "ping", "sender": self.rank, "number": number, "to": self.incarnation})
            for rank in asked - {self.rank}:
                self._check(rank)
                self._post(rank, self._incarnation_of(rank), text)
            with self._changed:
                self._changed.wait_for(lambda: answers >= asked, max(deadline - time.monotonic(), 0))
                return set(answers)
        finally:
            del self._answers[number]

    def is_sending(self, rank: int) -> bool:
        """Whether a message of ``send`` to a rank has been neither received nor lost so far."""
        with self._lock:
            return self._unsettled[rank] > 0

    def flush(self, timeout: float) -> bool:
        """Wait until each message of ``send`` has been received or lost.

        Args:
            timeout: seconds.

        Returns:
            whether that was so in time.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._unsettled.total() == 0, timeout)

    def close(self) -> None:
        """End all threads and links, at once (what is not delivered is lost). May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        try:
            self._post(self.rank, self.incarnation, json.dumps({"kind": "stop"}))
        except RuntimeError:
            logger.debug("the store is gone, and with it the mail thread")
        # The mail thread first: it starts the receivers.
        self._mail.join(self.connect_timeout)
        threads = [*self._senders.values(), *self._receivers.values()]
        for thread in threads:
            thread.close()
        deadline = time.monotonic() + self.connect_timeout  # in which a link that is being made ends
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"there is no rank {rank} among {self.num_ranks} ranks.")
        if self._closed:
            raise RuntimeError("the network of this rank has been closed.")

    def _incarnation_of(self, rank: int) -> int:
        """The newest process of a rank; 1 if there has been none, whose mail then waits for the first."""
        return max(self._client.add(f"incarnation/{rank}", 0), 1)

    def _post(self, rank: int, incarnation: int, text: str) -> None:
        self._client.queue_push(f"mail/{rank}/{incarnation}", text)

    def _settle(self, rank: int, messages: int) -> None:
        with self._changed:
            self._unsettled[rank] -= messages
            self._changed.notify_all()

    # Links, on the thread of their sender or receiver.

    def _connect(self, rank: int) -> Link:
        """Make a link to a peer.

        Raises:
            ConnectionError: if it does not answer in time.
            RuntimeError: if the link could not be made, or the store is gone.
        """
        client = self._take_client()
        # Whatever an earlier attempt has left in the store would mislead gloo, hence a number for each.
        generation = self._client.add("generation", 1)
        accepted = self._accepted[generation] = threading.Event()
        request = json.dumps({"kind": "connect", "sender": self.rank, "generation": generation, "to": self.incarnation})
        self._client.set(f"open/{generation}", "")
        try:
            self._await_acceptance(rank, accepted, request)
            return self._link(client, generation, SENDER)
        finally:
            del self._accepted[generation]
            self._client.delete_key(f"open/{generation}")

    def _await_acceptance(self, rank: int, accepted: threading.Event, request: str) -> None:
        deadline = time.monotonic() + self.connect_timeout
        asked = 0
        while not accepted.wait(SECONDS_BETWEEN_LOOKS if asked else 0):
            if self._closed or time.monotonic() > deadline:
                raise ConnectionError(f"rank {rank} did not answer within {self.connect_timeout} s.")
            if (incarnation := self._incarnation_of(rank)) != asked:
                self._post(rank, incarnation, request)
                asked = self._linked_incarnation[rank] = incarnation

    def _accept(self, sender: int, incarnation: int, generation: int) -> Link:
        """Make the other end of a link.

        Raises:
            ConnectionError: if the sender has given it up meanwhile.
            RuntimeError: if the link could not be made, or the store is gone.
        """
        client = self._take_client()
        if not self._client.check([f"open/{generation}"]):
            raise ConnectionError(f"rank {sender} no longer waits for link {generation}.")
        self._post(sender, incarnation, json.dumps({"kind": "accept", "generation": generation}))
        return self._link(client, generation, RECEIVER)

    def _take_client(self) -> dist.Store:
        """A client in which a link that is being made may wait."""
        try:
            return self._idle_clients.get(block=False)
        except queue.Empty:
            return self._client.clone()

    def _link(self, client: dist.Store, generation: int, side: int) -> Link:
        link = Link(dist.PrefixStore(f"link/{generation}", client), side, self.connect_timeout)
        self._idle_clients.put(client)  # one that failed is not used again
        return link

    def _is_current(self, rank: int) -> bool:
        return self._linked_incarnation.get(rank) == self._incarnation_of(rank)

    # Mail, on its thread.

    def _read_mail(self, client: dist.Store) -> None:
        try:
            while (mail := client.queue_pop(f"mail/{self.rank}/{self.incarnation}")) != b'{"kind": "stop"}':
                try:
                    self._handle(json.loads(mail))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    logger.warning("ignored a note that no rank writes: %r", error)
        except RuntimeError as error:
            if not self._closed:
                logger.warning("rank %d has lost the store: %s", self.rank, error)
                self.inbox.put(PeerLost(self.rank))

    def _handle(self, mail: dict[str, Any]) -> None:
        match mail["kind"]:
            case "note":
                self.inbox.put(Received(mail["sender"], mail["header"], []))
            case "ping":
                answer = {"kind": "answer", "sender": self.rank, "number": mail["number"]}
                self._post(mail["sender"], mail["to"], json.dumps(answer))
            case "answer":
                with self._changed:
                    if mail["number"] in self._answers:  # else it is late
                        self._answers[mail["number"]].add(mail["sender"])
                        self._changed.notify_all()
            case "connect":
                sender = mail["sender"]
                self._receivers[sender] = ReceiverThread(
                    sender,
                    partial(self._accept, sender, mail["to"], mail["generation"]),
                    self.inbox,
                    self.send_timeout,
                    self._receivers.get(sender),
                )
                self._receivers[sender].start()
            case "accept":
                if event := self._accepted.get(mail["generation"]):
                    event.set()
            case unknown:
                raise ValueError(f"a note of kind {unknown!r}")

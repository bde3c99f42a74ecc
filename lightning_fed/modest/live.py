"""The protocol between real processes: each rank runs its own nodes, and other ranks may die at any moment.

Everything about nodes happens on one thread (:class:`~lightning_fed.federation.peer_events.PeerEvents`), while the main
thread trains. Between them there are tasks (train this client from this model) and what has come out. A model is one
CPU vector: parameters, then float buffers.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fed.federation.layout import Layout
from lightning_fed.federation.peer_network import Received
from lightning_fed.federation.peers import Peers
from lightning_fed.modest.environment import Environment, Timer
from lightning_fed.modest.membership import View, hash_order
from lightning_fed.modest.messages import (
    SMALL_MESSAGE_BYTES,
    AggregatedModel,
    Announcement,
    Message,
    ModelMessage,
    Ping,
    Pong,
    TrainedModel,
)
from lightning_fed.modest.node import Node
from lightning_fed.modest.rules import Rules

logger = logging.getLogger(__name__)

MESSAGES = {kind.__name__: kind for kind in (Ping, Pong, Announcement, TrainedModel, AggregatedModel)}
# How many times within the restart timeout a rank looks for signs of progress, and gives some while it trains.
LOOKS = 8


class LiveFederation(Environment):
    """The nodes of one rank, and what they know of the world.

    Args:
        peers: of this rank.
        layout: which rank hosts which clients.
        rules: of the protocol.
        seed: of the federation.
        round: in which the nodes begin; 1 but for a resumed run.
        model: which all nodes know for that round, for round 1 the common seed model.
        sent_bytes: int64 ``[N]``, that clients have sent before.
        last_round: whose aggregated model is the result of the fit.
        leader: tells the rank that should see every aggregated model, because it evaluates them.

    Attributes:
        progress: the newest round that has an aggregated model, as far as this rank has heard.
        newest: that of the newest round which this rank holds, and its round.
        sent_bytes: int64 ``[N]``, of this rank's clients.
        ping_timeouts: candidates that did not answer this rank's nodes.
        models_received: model messages that have reached them.
        restarts: times that this rank has started a round again.
    """

    def __init__(
        self,
        peers: Peers,
        layout: Layout,
        rules: Rules,
        seed: int,
        round: int,
        model: Tensor,
        sent_bytes: np.ndarray,
        last_round: float,
        leader: Callable[[], int],
    ) -> None:
        self._peers, self.network, self.events = peers, peers.network, peers.events
        self.layout, self.rules, self.seed, self.leader = layout, rules, seed, leader
        self.last_round = last_round
        self.host = self.network.rank
        self._first_round = self.progress = round
        self.newest: tuple[int, Tensor] = round, model
        self.sent_bytes = sent_bytes.copy()
        self.ping_timeouts = self.models_received = self.restarts = 0
        self._main_store, self._store = self.network.store, self.network.store.clone()
        self._suspects: set[int] = set()
        self._counted: dict[str, int] = {}
        self._tasks: dict[int, dict[int, Tensor]] = {}
        self._outbox: dict[tuple[Any, ...], tuple[dict[str, Any], list[Tensor]]] = {}
        self._host_of = {client: host for host in range(layout.num_hosts) for client in layout.clients_of(host)}
        self._quiet_since, self._last_signs = time.monotonic(), (0, 0, 0)
        self._last_sign_given = 0.0
        everyone = np.ones(layout.num_clients, dtype=bool)
        self.nodes = {c: Node(c, View(everyone), rules, self, model) for c in layout.clients_of(self.host)}
        self.events.on("modest", self._arrived)
        self.events.on("observed", lambda message: self._hold(message.header["round"], message.tensors[0]))
        self.events.on("progress", lambda message: self._progressed(message.header["round"]))
        self.events.after_each = self._post
        self.events.on_loss = self._suspect
        self.events.call(self._rejoin if peers.has_returned else self._bootstrap)
        self.events.call(self._watch)

    # -------------------------------------------------------------------------------------------- for the main thread

    def take(self, round: int) -> dict[int, Tensor] | None:
        """Wait for clients of this rank to train in a round; the models from which they start.

        None when the round is over (an aggregated model of the next one exists), or the fit.
        """
        self.give_sign()
        self.events.wait_for(lambda: bool(self._tasks.get(round)) or self.progress > round or self._peers.is_stopped)
        with self.events.changed:
            for old in [number for number in self._tasks if number < min(round, self.progress)]:
                del self._tasks[old]
            return self._tasks.pop(round, None) if self.progress <= round and not self._peers.is_stopped else None

    def give_sign(self) -> None:
        """Tell the others, from time to time, that this rank is at work: the round is not stuck."""
        if time.monotonic() - self._last_sign_given > self.rules.restart_timeout / LOOKS:
            self._last_sign_given = time.monotonic()
            self._main_store.add("signs", 1)

    def trained(self, client: int, round: int, model: Tensor) -> None:
        """A client has done its work."""
        self.events.call(lambda: self.nodes[client].trained(round, model))

    def counts_of_round(self) -> dict[str, float]:
        """What this rank has seen since it was asked last; nobody knows all of a round."""
        with self.events.changed:
            totals = {
                "ping_timeouts": self.ping_timeouts,
                "models_received": self.models_received,
                "restarts": self.restarts,
            }
            living = [client for client in self._host_of if not self.is_suspected(client)]
        counts = {name: total - self._counted.get(name, 0) for name, total in totals.items()}
        self._counted = totals
        return {"live_nodes": len(living), **counts}

    def count_bytes(self) -> np.ndarray:
        """Bytes that each client has sent, as far as the ranks have told; int64 ``[N]``."""
        with self.events.changed:
            counts = self.sent_bytes.copy()
        self._main_store.set(f"bytes/{self.host}", json.dumps(counts[list(self.nodes)].tolist()))
        for host in range(self.layout.num_hosts):
            if host != self.host and self._main_store.check([f"bytes/{host}"]):
                clients = self.layout.clients_of(host)
                counts[clients.start : clients.stop] = json.loads(self._main_store.get(f"bytes/{host}"))
        return counts

    def await_model(self, round: int, timeout: float) -> Tensor:
        """The aggregated model of a round, or of the newest that this rank holds if that one does not come in time."""
        self.events.wait_for(lambda: self.newest[0] >= round, timeout)
        return self.newest[1]

    # ------------------------------------------------------------------------------------ what nodes ask of the world

    def send(self, sender: int, receiver: int, message: Message) -> None:
        if isinstance(message, AggregatedModel) and not message.attempt:
            self._announce(message)
        if sender != receiver:
            self.sent_bytes[sender] += size_of(message)
        if receiver in self.nodes:
            self.events.call(lambda: self._deliver(sender, receiver, message))
            return
        header, tensors = encode(sender, message)
        if isinstance(message, ModelMessage):  # one message to a rank, however many of its clients should have it
            rank = self._host_of[receiver]
            key = (rank, sender, type(message), message.round, id(message.model))
            self._outbox.setdefault(key, (header, tensors))[0]["receivers"].append(receiver)
        else:
            header["receivers"].append(receiver)
            self.network.note(self._host_of[receiver], header)

    def call_later(self, client: int, seconds: float, callback: Callable[[], None], phase: int | None) -> Timer:
        return self.events.call_later(seconds, callback)

    def train(self, client: int, round: int, model: Tensor) -> None:
        for tasks in self._tasks.values():
            tasks.pop(client, None)
        self._tasks.setdefault(round, {})[client] = model

    def average(self, aggregator: int, round: int, models: dict[int, Tensor]) -> Tensor:
        total = torch.zeros_like(self.newest[1], dtype=torch.float64)
        for sender in sorted(models):
            total += models[sender]
        mean = (total / len(models)).to(self.newest[1].dtype)
        self._hold(round, mean)
        return mean

    def is_suspected(self, client: int) -> bool:
        return self._host_of[client] in self._suspects

    def ping_timed_out(self, client: int, phase: int) -> None:
        self.ping_timeouts += 1
        self._suspect(self._host_of[client])

    # ------------------------------------------------------------------------------------------------------- messages

    def _arrived(self, received: Received) -> None:
        self._suspects.discard(received.sender)
        message = decode(received)
        for client in received.header["receivers"]:
            if client in self.nodes:
                self._deliver(received.header["sender"], client, message)

    def _deliver(self, sender: int, receiver: int, message: Message) -> None:
        if isinstance(message, AggregatedModel):
            self._hold(message.round, message.model)
            self._progressed(message.round)
        self.models_received += isinstance(message, ModelMessage)
        self.nodes[receiver].receive(sender, message)

    def _post(self) -> None:
        """Hand over what was sent while one event was handled."""
        for (rank, *_), (header, tensors) in self._outbox.items():
            self.network.send(rank, header, tensors)
        self._outbox.clear()

    def _announce(self, message: AggregatedModel) -> None:
        """Tell all ranks that a round has an aggregated model, once; show it to the leader, the last one to all."""
        first = int(self._store.compare_set(f"aggregated/{message.round}", "", str(self.host)))
        if first != self.host or message.round <= self.progress:
            return
        for rank in range(self.network.num_ranks):
            if rank != self.host:
                self.network.note(rank, {"kind": "progress", "round": message.round})
        is_last = message.round >= self.last_round
        for rank in range(self.network.num_ranks) if is_last else [self.leader()]:
            if rank != self.host and rank not in self._suspects:
                self.network.send(rank, {"kind": "observed", "round": message.round}, [message.model])
        self._progressed(message.round)

    def _hold(self, round: int, model: Tensor) -> None:
        if round > self.newest[0]:
            self.newest = round, model
            self._store.set(f"holds/{self.host}", str(round))

    def _progressed(self, round: int) -> None:
        if round > self.progress:
            self.progress = round
            self._quiet_since = time.monotonic()

    # ------------------------------------------------------------------------------------------------ start and restart

    def _bootstrap(self) -> None:
        sample = hash_order(self.layout.num_clients, self._first_round)[: self.rules.sample_size].tolist()
        for client, node in self.nodes.items():
            if self._first_round > 1:
                node.observe(self._first_round, self.newest[1])
                node.view.last_active[:] = self._first_round
            if client in sample:
                node.bootstrap(len(sample), self._first_round)

    def _rejoin(self) -> None:
        """Announce the nodes of a process that was started again, with a higher counter than its predecessor's."""
        self._look_for_progress()
        for client, node in self.nodes.items():
            node.view.change(client, self.network.incarnation - 2, True)
            node.join(self.progress)

    def _look_for_progress(self) -> None:
        while self._store.check([f"aggregated/{self.progress + 1}"]):
            self._progressed(self.progress + 1)

    def _watch(self) -> None:
        """Look for signs of progress; after too long without one, ask who is alive and can start the round again."""
        self._look_for_progress()
        if self._suspects:
            self._ask(self._suspects, lambda answered: self._suspects.difference_update(answered))
        signs = self._signs()
        if signs != self._last_signs:
            self._last_signs, self._quiet_since = signs, time.monotonic()
        elif time.monotonic() - self._quiet_since > self.rules.restart_timeout:
            self._quiet_since = time.monotonic()
            self._ask(range(self.network.num_ranks), self._restart)
        self.events.call_later(self.rules.restart_timeout / LOOKS, self._watch)

    def _signs(self) -> tuple[int, int, int]:
        """What changes when something goes on anywhere: rounds, work, restarts."""
        return self.progress, self._store.add("signs", 0), self._store.add("restarts", 0)

    def _ask(self, ranks: Iterable[int], then: Callable[[set[int]], None]) -> None:
        """Which ranks are alive; asked on a thread of its own, because it waits for the silent ones."""
        asked = set(ranks)

        def wait_for_answers() -> None:
            answered = self.network.ping(asked, self.rules.ping_timeout)
            self.events.call(lambda: then(answered))

        threading.Thread(target=wait_for_answers, name="ask", daemon=True).start()

    def _suspect(self, rank: int) -> None:
        """A rank is silent, or a link to it broke: its nodes are not asked again before it has shown to be alive."""
        if rank not in self._suspects and rank != self.host:
            self._suspects.add(rank)
            for node in self.nodes.values():
                node.lost(self.layout.clients_of(rank))

    def _restart(self, living: set[int]) -> None:
        """Start the round again, if of all living ranks this one has the newest model, and nothing happened since."""
        self._look_for_progress()
        if self._signs() != self._last_signs:
            return
        held = {rank: self._held_by(rank) for rank in living}
        best = sorted(rank for rank in held if held[rank] == max(held.values()))
        number = self._store.add("restarts", 0)
        if self.host != best[number % len(best)]:  # in turn, as one may know less of who is there than another
            return
        logger.warning("round %d is stuck; rank %d starts it again", self.progress, self.host)
        self.restarts += 1
        order = hash_order(self.layout.num_clients, self.progress).tolist()
        mine = [self.nodes[client] for client in order if client in self.nodes]
        node = mine[number % len(mine)]
        node.observe(self.progress, self.newest[1])
        node.restart(self.progress, self._store.add("restarts", 1))

    def _held_by(self, rank: int) -> int:
        key = f"holds/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 1


def size_of(message: Message) -> int:
    """Bytes that a message counts for."""
    if isinstance(message, ModelMessage):
        return int(message.model.nbytes) + message.view.num_bytes
    return SMALL_MESSAGE_BYTES


def encode(sender: int, message: Message) -> tuple[dict[str, Any], list[Tensor]]:
    """A message as a JSON header and tensors; the receivers are filled in later."""
    header: dict[str, Any] = {"kind": "modest", "type": type(message).__name__, "sender": sender, "receivers": []}
    header["fields"] = {f.name: getattr(message, f.name) for f in fields(message) if f.name not in ("model", "view")}
    if not isinstance(message, ModelMessage):
        return header, []
    return header, [message.model, torch.from_numpy(message.view.to_array().view(np.uint8))]


def decode(received: Received) -> Message:
    """Inverse of :func:`encode`."""
    content = dict(received.header["fields"])
    if received.tensors:
        content["model"] = received.tensors[0]
        content["view"] = View.from_array(received.tensors[1].numpy().view(np.int32))
    return MESSAGES[received.header["type"]](**content)

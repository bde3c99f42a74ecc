"""The protocol on one machine: all nodes in virtual time, with symbols for models.

The simulation says who trains from which model in a round, and whose models an aggregator averages. It moves no
numbers: the strategy does that with rows, one round after the other. It is a function of its arguments alone, so that
every rank can run it for itself, and a resumed run repeats it from the start, in milliseconds a round.

Shapes: N = clients.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lightning_fed.federation.availability import Availability
from lightning_fed.federation.virtual_clock import VirtualClock
from lightning_fed.modest.environment import Environment, Timer
from lightning_fed.modest.membership import View, hash_order
from lightning_fed.modest.messages import SMALL_MESSAGE_BYTES, Announcement, Message, ModelMessage
from lightning_fed.modest.node import Node
from lightning_fed.modest.rules import Rules

# Beyond this there is no hope that a round ends.
MAX_RESTARTS = 200


class Model(NamedTuple):
    """The symbol of a model: the average that an aggregator has made for a round, or what a client has trained in it.

    ``client`` is -1 for the common seed model.
    """

    round: int
    client: int
    is_trained: bool


SEED_MODEL = Model(1, -1, False)


class FederationDied(RuntimeError):
    """No node is left that could go on, or the nodes that come back do not stay for long enough."""


@dataclass
class RoundPlan:
    """What happened in one round of training.

    Attributes:
        starts: for each client that trained, the model that it began with.
        averages: for each aggregator of the next round, the sorted clients whose models it averaged; in the order in
            which they were done.
        cancelled: clients that began to train, and were interrupted by a newer model or a crash.
        left: clients that left or crashed in the round; ``joined``: those that came.
        live: clients that were online when the round began.
        offline: sorted clients that were not there any more when the round was settled.
        sent_bytes: int64 ``[N]``, by each client.
        models_received: model messages that arrived.
        ping_timeouts: candidates that did not answer.
        restarts: times that the round had to be started again.
        training_seconds: that all clients have computed in this round, also in vain.
        began: virtual seconds at which the first client began to train; ``ended``: at which the first average was done.
    """

    starts: dict[int, Model] = field(default_factory=dict)
    averages: dict[int, tuple[int, ...]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)
    live: int = 0
    offline: list[int] = field(default_factory=list)
    sent_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    models_received: int = 0
    ping_timeouts: int = 0
    restarts: int = 0
    training_seconds: float = 0.0
    began: float = 0.0
    ended: float = 0.0


class Event:
    """A callback in the simulation's queue.

    Attributes:
        phase: the round that is not settled before this has happened; None if no round waits for it.
        is_progress: whether something may follow from it; if nothing of this kind is left, a round is stuck.
    """

    def __init__(
        self, simulation: Simulation, phase: int | None, is_progress: bool, callback: Callable[[], None]
    ) -> None:
        self.simulation = simulation
        self.phase = phase
        self.is_progress = is_progress
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget it."""
        if self.callback is not None:
            self.callback = None
            self.simulation.ended(self)


class Simulation(Environment):
    """All nodes of a federation, and the queue of what happens next.

    Args:
        num_clients: N.
        rules: of the protocol.
        availability: when nodes are there.
        clock: how long training and transfers take; without one, a client's round takes one second, messages none.
        model_bytes: of one model on the wire.
        local_steps: of a client in a round.
        seed: of the federation.
    """

    def __init__(
        self,
        num_clients: int,
        rules: Rules,
        availability: Availability,
        clock: VirtualClock | None,
        model_bytes: int,
        local_steps: Callable[[int], int],
        seed: int,
    ) -> None:
        self.rules = rules
        self.availability = availability
        self.clock = clock
        self.model_bytes = model_bytes
        self.local_steps = local_steps
        self.seed = seed
        self.now = 0.0
        self.online = availability.present_at_start(num_clients).copy()
        self._changes = availability.changes(num_clients, seed)
        self._next_change = next(self._changes, None)
        self._queue: list[tuple[float, int, Event]] = []
        self._count = itertools.count()
        self._unfinished: Counter[int] = Counter()
        self._training: dict[int, tuple[int, Event, float]] = {}
        self._plans: dict[int, RoundPlan] = {}
        self._settled = 0
        self._first_known = 1
        self._averaged = 1
        self._members = self.online.copy()
        self._attempts = 0
        self._hopes = 0
        self._last_progress = 0.0
        self.nodes = [Node(c, View(self.online), rules, self, SEED_MODEL) for c in range(num_clients)]
        self._apply_changes_of_round(1)
        sample = [c for c in hash_order(num_clients, 1).tolist() if self.online[c]][: rules.sample_size]
        for client in sample:
            self.nodes[client].bootstrap(len(sample))

    def plan(self, round: int) -> RoundPlan:
        """Everything that happens in a round, from 1; rounds that are not forgotten may be asked for in any order.

        Raises:
            FederationDied: if the federation does not get through that round.
            LookupError: if the round is forgotten.
        """
        if round < self._first_known:
            raise LookupError(f"the plan of round {round} is forgotten; a new simulation begins with the first.")
        while self._settled < round:
            self._step()
            while self._is_settled(self._settled + 1):
                self._settled += 1
                self._settle_members(self._plan(self._settled))
        return self._plan(round)

    def forget_before(self, round: int) -> None:
        """Drop the plans of earlier rounds, which nobody will ask for again: a long run must not grow."""
        self._first_known = max(self._first_known, round)
        for old in [number for number in self._plans if number < round]:
            del self._plans[old]

    # ------------------------------------------------------------------------------------ what nodes ask of the world

    def send(self, sender: int, receiver: int, message: Message) -> None:
        if sender == receiver:
            self.nodes[receiver].receive(sender, message)
            return
        is_model = isinstance(message, ModelMessage)
        size = self.model_bytes + message.view.num_bytes if isinstance(message, ModelMessage) else SMALL_MESSAGE_BYTES
        message.phase = self._open(message.phase)
        self._plan(message.phase).sent_bytes[sender] += size
        seconds = self.clock.transfer_seconds(sender, receiver, size) if self.clock is not None else 0.0

        def arrive() -> None:
            if self.online[receiver]:
                self._plan(message.phase).models_received += is_model
                self.nodes[receiver].receive(sender, message)

        self._push(seconds, message.phase, arrive, is_progress=not isinstance(message, Announcement))

    def call_later(self, client: int, seconds: float, callback: Callable[[], None], phase: int | None) -> Timer:
        return self._push(seconds, phase if phase is None else self._open(phase), callback)

    def train(self, client: int, round: int, model: Model) -> None:
        self._interrupt(client)
        if round <= self._settled:  # so late that the whole federation is rounds ahead
            return
        seconds = 1.0 if self.clock is None else self.clock.compute_seconds(client, self.local_steps(client))
        plan = self._plan(round)
        if not plan.starts and not plan.cancelled:
            plan.began, plan.live = self.now, int(self.online.sum())
        plan.starts[client] = model

        def finish() -> None:
            del self._training[client]
            plan.training_seconds += seconds
            self.nodes[client].trained(round, Model(round, client, True))

        self._training[client] = round, self._push(seconds, round, finish), self.now

    def average(self, aggregator: int, round: int, models: dict[int, Model]) -> Model:
        plan = self._plan(round - 1)
        if not plan.averages:
            plan.ended = self.now
        if round > self._averaged:
            self._averaged = round
            # After what the aggregator is doing now, which may be its last deed; before its pings arrive.
            self._push(0.0, None, lambda: self._apply_changes_of_round(round))
        plan.averages[aggregator] = tuple(sorted(models))
        return Model(round, aggregator, False)

    def ping_timed_out(self, client: int, phase: int) -> None:
        self._plan(self._open(phase)).ping_timeouts += 1

    # -------------------------------------------------------------------------------------------------- the event loop

    def ended(self, event: Event) -> None:
        """An event has happened, or was cancelled."""
        if event.phase is not None:
            self._unfinished[event.phase] -= 1
        if event.is_progress:
            self._hopes -= 1
            self._last_progress = self.now

    def _push(self, seconds: float, phase: int | None, callback: Callable[[], None], is_progress: bool = True) -> Event:
        event = Event(self, phase, is_progress, callback)
        if phase is not None:
            self._unfinished[phase] += 1
        self._hopes += is_progress
        heapq.heappush(self._queue, (self.now + seconds, next(self._count), event))
        return event

    def _step(self) -> None:
        """The next event, or change of membership, or the restart of a round in which nothing happens any more."""
        while self._queue and self._queue[0][2].callback is None:
            heapq.heappop(self._queue)
        event_at = self._queue[0][0] if self._queue else math.inf
        timed = self._next_change if self.availability.unit == "seconds" else None
        change_at = timed.at if timed is not None else math.inf
        is_stuck = self._hopes == 0 and bool(self.online.any())
        restart_at = self._last_progress + self.rules.restart_timeout if is_stuck else math.inf
        soonest = min(event_at, change_at, restart_at)
        if soonest == math.inf:
            raise FederationDied(f"no node of the federation is left in round {self._settled + 1}")
        self.now = max(self.now, soonest)
        if change_at == soonest:
            self._apply_next_change()
        elif event_at == soonest:
            event = heapq.heappop(self._queue)[2]
            callback, event.callback = event.callback, None
            assert callback is not None
            callback()
            self.ended(event)
        else:
            self._restart()

    def _is_settled(self, round: int) -> bool:
        """Whether nothing that belongs to a round can happen any more, and the next round has begun."""
        if any(count and phase <= round for phase, count in self._unfinished.items()):
            return False
        for phase in [phase for phase in self._unfinished if phase <= round]:
            del self._unfinished[phase]
        return round + 1 in self._plans and bool(self._plans[round + 1].starts)

    def _settle_members(self, plan: RoundPlan) -> None:
        for client in plan.joined + plan.left:  # every change of a client undoes the one before
            self._members[client] = not self._members[client]
        plan.offline = np.flatnonzero(~self._members).tolist()

    def _restart(self) -> None:
        """Let a live node with the newest model begin the round again, each time another one.

        Its view goes out with the model. If one and the same node did that again and again, and did not know an
        aggregator that the others know, their models would never meet.
        """
        live = [self.nodes[client] for client in np.flatnonzero(self.online)]
        round = max(self._settled + 1, *(node.newest_round for node in live))
        order = hash_order(len(self.nodes), round).tolist()
        newest = max(node.best_model(round)[0] for node in live)
        able = [self.nodes[c] for c in order if self.online[c] and self.nodes[c].best_model(round)[0] == newest]
        if self._plan(round).restarts == MAX_RESTARTS:
            raise FederationDied(
                f"round {round} was started {MAX_RESTARTS} times and never finished, as nodes go away too soon for "
                f"ping_timeout={self.rules.ping_timeout} s and the time that training takes"
            )
        best = able[self._plan(round).restarts % len(able)]
        self._attempts += 1
        self._plan(round).restarts += 1
        model = best.best_model(round)[1]
        if not model.is_trained and model.round < round:  # an average that nobody has trained on is not kept for ever
            model = SEED_MODEL
        best.restart(round, self._attempts, model)

    def _interrupt(self, client: int) -> None:
        if client in self._training:
            round, event, began = self._training.pop(client)
            event.cancel()
            plan = self._plan(round)
            plan.training_seconds += self.now - began
            del plan.starts[client]
            plan.cancelled.append(client)

    def _plan(self, round: int) -> RoundPlan:
        if round not in self._plans:
            self._plans[round] = RoundPlan(sent_bytes=np.zeros(len(self.nodes), dtype=np.int64))
        return self._plans[round]

    def _open(self, phase: int) -> int:
        """What belongs to a settled round and comes late is counted in the first round that is not settled."""
        return max(phase, self._settled + 1)

    # ------------------------------------------------------------------------------------------------------ membership

    def _apply_changes_of_round(self, round: int) -> None:
        while self._next_change is not None and self.availability.unit == "rounds" and self._next_change.at <= round:
            self._apply_next_change(round)

    def _apply_next_change(self, round: int = 0) -> None:
        change, self._next_change = self._next_change, next(self._changes, None)
        assert change is not None
        client, node, phase = change.client, self.nodes[change.client], self._open(round)
        if change.kind == "join":
            self._plan(phase).joined.append(client)
            self.online[client] = True
            node.join(phase)
            return
        self._plan(phase).left.append(client)
        if change.kind == "leave":
            node.leave(phase)
        self._interrupt(client)
        node.stop()
        self.online[client] = False

"""One node of MoDeST: what it does on a message, a timer, or the end of its training. It knows no transport, no clock.

Rounds are numbered from 1, as in the paper. A node trains in round k if it receives the aggregated model of round k;
it sends what it has trained to the aggregators of round k + 1, who send their average to the sample of round k + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_fed.federation.randomness import Stream, derive_seed
from lightning_fed.modest.environment import Environment, Timer
from lightning_fed.modest.membership import View
from lightning_fed.modest.messages import (
    AggregatedModel,
    Announcement,
    Message,
    ModelMessage,
    Ping,
    Pong,
    TrainedModel,
)
from lightning_fed.modest.rules import Rules

PING_AGAIN_SECONDS = 1.0


class Node:
    """One client's part in the protocol.

    Args:
        client: its number.
        view: whom it knows.
        rules: the protocol's settings.
        environment: the world.
        model: the common seed model.

    Attributes:
        train_round: the newest round in which it trains or has trained; 0 at first.
        aggregate_round: the newest round that it aggregates, or has aggregated.
    """

    def __init__(self, client: int, view: View, rules: Rules, environment: Environment, model: Any) -> None:
        self.client = client
        self.view = view
        self.rules = rules
        self.environment = environment
        self.train_round = 0
        self.aggregate_round = 0
        self._trains = False
        self._sample_size = rules.sample_size
        self._attempt = 0
        self._result: tuple[int, Any] | None = None  # the last round that it has trained in, and what came out
        self._aggregated: tuple[int, Any] = 1, model  # the newest aggregated model that it has seen
        self._received: dict[int, Any] = {}
        self._waiting: Timer | None = None
        self._collects = False
        self._pending: list[tuple[int, Announcement]] = []
        self._searches: dict[int, Search] = {}
        self._next_search = 0

    @property
    def round_estimate(self) -> int:
        """The newest round that it has heard of."""
        return max(self.train_round, self.aggregate_round, self.view.newest_round)

    @property
    def newest_round(self) -> int:
        """Of the newest aggregated model that it has made or received; 1 at first."""
        return self._aggregated[0]

    def receive(self, sender: int, message: Message) -> None:
        """React to a message."""
        if isinstance(message, ModelMessage):
            self.view.merge(message.view)
        self.view.saw(sender, max(message.round, self.round_estimate))
        if isinstance(message, Ping):
            answer = Pong(self.round_estimate, message.phase, message.search)
            self.environment.send(self.client, sender, answer)
        elif isinstance(message, Pong):
            if message.search in self._searches:
                self._searches[message.search].answered(sender)
        elif isinstance(message, Announcement):
            self._announced(sender, message)
        elif isinstance(message, AggregatedModel):
            self._begin(message)
        elif isinstance(message, TrainedModel):
            self._collect(sender, message)

    # ---------------------------------------------------------------------------------------------------- training

    def bootstrap(self, sample_size: int, round: int = 1) -> None:
        """Begin a federation, in round 1 with the common seed model."""
        self._train(round, self._aggregated[1], sample_size, attempt=0)

    def _begin(self, message: AggregatedModel) -> None:
        """Train on the first aggregated model of a round; of a restart, deliver once more what is trained already."""
        if message.round > self._aggregated[0] or (message.round == self._aggregated[0] and message.attempt):
            self._aggregated = message.round, message.model
        if message.round > self.train_round:
            self._train(message.round, message.model, message.sample_size, message.attempt)
        elif message.round == self.train_round and message.attempt > self._attempt:
            self._attempt, self._sample_size = message.attempt, message.sample_size
            if not self._trains:
                self._deliver()

    def _train(self, round: int, model: Any, sample_size: int, attempt: int) -> None:
        self.train_round, self._sample_size, self._attempt, self._trains = round, sample_size, attempt, True
        self.view.saw(self.client, round)
        self.environment.train(self.client, round, model)

    def trained(self, round: int, model: Any) -> None:
        """Local work is done: send the model to the aggregators of the next round."""
        if round == self.train_round and self._trains:
            self._trains = False
            self._result = round, model
            self._deliver()

    def _deliver(self) -> None:
        assert self._result is not None
        round, model = self._result
        sample_size, attempt = self._sample_size, self._attempt

        def to_aggregators(aggregators: list[int]) -> None:
            for aggregator in aggregators:
                message = TrainedModel(round + 1, round, model, self.view.copy(), sample_size, attempt)
                self.environment.send(self.client, aggregator, message)
            self._apply_pending()

        self._search(round + 1, self.rules.num_aggregators, round, to_aggregators)

    # ------------------------------------------------------------------------------------------------- aggregation

    def _collect(self, sender: int, message: TrainedModel) -> None:
        """Keep one model a sender, of the newest round; average when there are enough."""
        dropped = message.round == self.aggregate_round > self._aggregated[0] and not self._collects
        if message.round > self.aggregate_round or dropped:
            self._stop_collecting()
            self.aggregate_round, self._received, self._collects = message.round, {}, True
            if self.rules.aggregation_timeout is not None:
                seconds, round = self.rules.aggregation_timeout, message.round
                self._waiting = self.environment.call_later(self.client, seconds, lambda: self._give_up(round), None)
        if message.round == self.aggregate_round and self._collects:
            self._received[sender] = message.model
            if len(self._received) >= self.rules.models_needed(message.sample_size):
                self._aggregate()

    def _give_up(self, round: int) -> None:
        """The aggregation timeout: go on with fewer models, or drop them."""
        if self._collects and round == self.aggregate_round:
            if len(self._received) >= self.rules.min_models and self.round_estimate <= round:
                self._aggregate()
            else:
                self._stop_collecting()

    def _stop_collecting(self) -> None:
        self._collects = False
        self._received = {}
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _aggregate(self) -> None:
        round = self.aggregate_round
        model = self.environment.average(self.client, round, self._received)
        self._stop_collecting()
        self._aggregated = round, model
        self.view.saw(self.client, round)
        self._distribute(round, model, phase=round - 1, attempt=0)

    def _distribute(self, round: int, model: Any, phase: int, attempt: int) -> None:
        def to_sample(sample: list[int]) -> None:
            if self.round_estimate > round and not attempt:  # who was asked has told of a newer round
                return
            for participant in sample:
                message = AggregatedModel(round, phase, model, self.view.copy(), len(sample), attempt)
                self.environment.send(self.client, participant, message)
            self._apply_pending()

        self._search(round, self.rules.sample_size, phase, to_sample)

    # ---------------------------------------------------------------------------------------------------- restarts

    def best_model(self, round: int) -> tuple[tuple[int, int], Any]:
        """What it could restart a round with, and how good that is (compare the first items).

        The aggregated model of that round; else what it has trained itself; else the seed model.
        """
        if self._aggregated[0] == round:
            return (round, 1), self._aggregated[1]
        if self._result is not None:
            return (self._result[0], 0), self._result[1]
        return (0, 0), self._aggregated[1]

    def observe(self, round: int, model: Any) -> None:
        """Take note of an aggregated model that it was not asked to train."""
        if round > self._aggregated[0]:
            self._aggregated = round, model

    def restart(self, round: int, attempt: int, model: Any = None) -> None:
        """Send out a model, by default its best, for a round in which nothing happens any more, to whoever answers."""
        model = self.best_model(round)[1] if model is None else model
        self._distribute(round, model, phase=round, attempt=attempt)

    # -------------------------------------------------------------------------------------------------- membership

    def join(self, phase: int) -> None:
        """Come online, and say so."""
        self._announce(True, phase)

    def leave(self, phase: int) -> None:
        """Say goodbye; the environment takes it offline after that."""
        self._announce(False, phase)

    def stop(self) -> None:
        """Everything that was going on is lost, as in a crash."""
        self._stop_collecting()
        for search in list(self._searches.values()):
            search.cancel()
        if self._trains:
            self._trains = False
            self.train_round = self._result[0] if self._result is not None else 0  # as if it had not begun

    def lost(self, clients: Collection[int]) -> None:
        """Do not wait for the answers of nodes that are known to be gone."""
        for search in list(self._searches.values()):
            search.lost(clients)

    def _announce(self, joins: bool, phase: int) -> None:
        counter = self.view.counter(self.client) + 1
        self.view.change(self.client, counter, joins)
        peers = np.flatnonzero(self.view.joined)
        peers = peers[peers != self.client]
        draw = np.random.default_rng(derive_seed(Stream.MEMBERSHIP, self.environment.seed, self.client, counter))
        for peer in draw.choice(peers, min(self.rules.sample_size, len(peers)), replace=False):
            message = Announcement(self.round_estimate, phase, counter, joins)
            self.environment.send(self.client, int(peer), message)

    def _announced(self, sender: int, message: Announcement) -> None:
        if message.joins:  # not at once: it should not be in a sample that is being drawn
            self._pending.append((sender, message))
        else:
            self.view.change(sender, message.counter, False)

    def _apply_pending(self) -> None:
        for client, message in self._pending:
            self.view.change(client, message.counter, message.joins)
        self._pending = []

    def _search(self, round: int, wanted: int, phase: int, then: Callable[[list[int]], None]) -> None:
        self._next_search += 1
        window = self.rules.window(len(self.view.membership))
        candidates = self.view.candidates(round, window, self.client)
        search = Search(self, self._next_search, candidates, wanted, phase, then)
        self._searches[search.number] = search
        search.start()

    def forget_search(self, number: int) -> None:
        """It has ended."""
        self._searches.pop(number, None)


@dataclass
class Search:
    """The availability check: the first ``wanted`` candidates that answer a ping.

    The first ones are asked at once, each a second time if it is silent after a second (or half the timeout); whoever
    is silent for ``ping_timeout`` is replaced by the next in order. With no candidate left it goes on with those found.
    """

    node: Node
    number: int
    candidates: np.ndarray
    wanted: int
    phase: int
    then: Callable[[list[int]], None]
    found: list[int] = field(default_factory=list)
    _asked: dict[int, list[Timer]] = field(default_factory=dict)
    _rest: Iterator[int] = field(init=False)
    _out_of_candidates: bool = False
    _ended: bool = False

    def start(self) -> None:
        """Ask as many as are wanted."""
        self._rest = iter(self.candidates.tolist())
        for _ in range(self.wanted):
            self._ask_next()

    def answered(self, client: int) -> None:
        """A candidate is there."""
        if client in self._asked:
            for timer in self._asked.pop(client):
                timer.cancel()
            self._add(client)

    def lost(self, clients: Collection[int]) -> None:
        """Replace candidates that are known to be gone."""
        for client in [client for client in self._asked if client in clients]:
            for timer in self._asked.get(client, ()):
                timer.cancel()
            self._silent(client)

    def cancel(self) -> None:
        """Stop asking."""
        self._ended = True
        self.node.forget_search(self.number)
        for timers in self._asked.values():
            for timer in timers:
                timer.cancel()
        self._asked.clear()

    def _ask_next(self) -> None:
        environment, phase = self.node.environment, self.phase
        client = next(self._rest, None)
        while client is not None and client != self.node.client and environment.is_suspected(client):
            environment.ping_timed_out(client, phase)
            client = next(self._rest, None)
        if client is None:
            self._out_of_candidates = True
            self._end_if_done()
        elif client == self.node.client:
            self._add(client)
        else:
            rules = self.node.rules
            deadlines: tuple[tuple[float, Callable[[], None]], ...] = (
                (min(PING_AGAIN_SECONDS, rules.ping_timeout / 2), lambda: self._ping(client)),
                (rules.ping_timeout, lambda: self._silent(client)),
            )
            self._asked[client] = [
                environment.call_later(self.node.client, seconds, callback, phase) for seconds, callback in deadlines
            ]
            self._ping(client)

    def _ping(self, client: int) -> None:
        ping = Ping(self.node.round_estimate, self.phase, self.number)
        self.node.environment.send(self.node.client, client, ping)

    def _silent(self, client: int) -> None:
        if self._ended:
            return
        del self._asked[client]
        self.node.environment.ping_timed_out(client, self.phase)
        self._ask_next()

    def _add(self, client: int) -> None:
        self.found.append(client)
        self._end_if_done()

    def _end_if_done(self) -> None:
        enough = len(self.found) == self.wanted
        if not self._ended and (enough or (self._out_of_candidates and not self._asked)):
            self.cancel()
            self.then(self.found)

"""One node by hand: the test delivers every message, fires every timer and ends every training itself.

With 8 clients, round 1 asks for 6 5 4 2 7 0 3 1, round 2 for 6 4 2 7 1 3 5 0, round 3 for 5 1 4 0 3 2 7 6 (spelt out in
test_membership.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from lightning_fed.modest.environment import Environment, Timer
from lightning_fed.modest.membership import View
from lightning_fed.modest.messages import AggregatedModel, Announcement, Message, Ping, Pong, TrainedModel
from lightning_fed.modest.node import Node
from lightning_fed.modest.rules import Rules

CLIENTS = 8
Kind = TypeVar("Kind", bound=Message)


class HandTimer(Timer):
    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due, self.callback = due, callback
        self.is_pending = True

    def cancel(self) -> None:
        self.is_pending = False


class ByHand(Environment):
    """A world in which nothing happens by itself. Models are strings: an average of a and b is ``(a+b)``."""

    seed = 0

    def __init__(self) -> None:
        self.now = 0.0
        self.sent: list[tuple[int, Message]] = []  # receiver and message, in the order of sending
        self.timers: list[HandTimer] = []
        self.trainings: list[tuple[int, str]] = []  # round and model
        self.averages: list[tuple[int, dict[int, str]]] = []  # round and models
        self.timeouts: list[int] = []
        self.node: Node

    def send(self, sender: int, receiver: int, message: Message) -> None:
        if sender == receiver:
            self.node.receive(sender, message)
        else:
            self.sent.append((receiver, message))

    def call_later(self, client: int, seconds: float, callback: Callable[[], None], phase: int | None) -> Timer:
        self.timers.append(HandTimer(self.now + seconds, callback))
        return self.timers[-1]

    def train(self, client: int, round: int, model: Any) -> None:
        self.trainings.append((round, model))

    def average(self, aggregator: int, round: int, models: dict[int, Any]) -> Any:
        self.averages.append((round, dict(models)))
        return "(" + "+".join(models[sender] for sender in sorted(models)) + ")"

    def ping_timed_out(self, client: int, phase: int) -> None:
        self.timeouts.append(client)

    # -------------------------------------------------------------------------------------------------- for the test

    def take(self, kind: type[Kind]) -> list[tuple[int, Kind]]:
        """Everything of a kind that was sent since it was last asked for."""
        found = [(receiver, message) for receiver, message in self.sent if isinstance(message, kind)]
        self.sent = [(receiver, message) for receiver, message in self.sent if not isinstance(message, kind)]
        return found

    def asked(self) -> list[int]:
        """Who was pinged since it was last asked for; they stay silent."""
        return [receiver for receiver, _ in self.take(Ping)]

    def answer(self, *silent: int) -> list[int]:
        """Everybody who was pinged answers, but for some; returns who was pinged."""
        pinged = self.take(Ping)
        for receiver, ping in pinged:
            if receiver not in silent:
                self.node.receive(receiver, Pong(ping.round, ping.phase, ping.search))
        return [receiver for receiver, _ in pinged]

    def wait(self, seconds: float) -> None:
        """Let time pass: timers that are due fire, in their order."""
        self.now += seconds
        while due := [timer for timer in self.timers if timer.is_pending and timer.due <= self.now]:
            timer = min(due, key=lambda timer: timer.due)
            timer.cancel()
            timer.callback()


def node_of(client: int = 6, members: Any = None, **rules: Any) -> tuple[Node, ByHand]:
    defaults: dict[str, Any] = {
        "sample_size": 3,
        "num_aggregators": 1,
        "success_fraction": 1.0,
        "success_rounding": "up",
        "aggregation_timeout": None,
        "min_models": 2,
        "ping_timeout": 5.0,
        "activity_window": 50,
        "restart_timeout": 60.0,
    }
    world = ByHand()
    present = np.isin(np.arange(CLIENTS), range(CLIENTS) if members is None else members)
    world.node = Node(client, View(present), Rules(**{**defaults, **rules}), world, "seed")
    return world.node, world


def trained(round: int, model: str, sample_size: int = 3, attempt: int = 0, view: View | None = None) -> TrainedModel:
    view = view or View(np.zeros(CLIENTS, dtype=bool))
    return TrainedModel(round, round - 1, model, view, sample_size, attempt)


def aggregated(round: int, model: str, sample_size: int = 3, attempt: int = 0) -> AggregatedModel:
    return AggregatedModel(round, round - 1, model, View(np.zeros(CLIENTS, dtype=bool)), sample_size, attempt)


# ----------------------------------------------------------------------------------------------------------- training


def test_what_is_trained_goes_to_the_next_rounds_aggregator_that_answers() -> None:
    node, world = node_of(2)
    node.bootstrap(sample_size=3)
    assert world.trainings == [(1, "seed")] and world.sent == []
    node.trained(1, "mine")
    assert world.answer() == [6]  # the first in the order of round 2
    [(receiver, message)] = world.take(TrainedModel)
    assert (receiver, message.round, message.model, message.sample_size) == (6, 2, "mine", 3)
    assert world.sent == []


def test_several_aggregators_get_a_copy_each() -> None:
    node, world = node_of(1, num_aggregators=3)
    node.bootstrap(3)
    node.trained(1, "mine")
    assert world.answer() == [6, 4, 2]
    assert [receiver for receiver, _ in world.take(TrainedModel)] == [6, 4, 2]


def test_copies_of_other_aggregators_are_ignored_while_it_trains_and_after() -> None:
    node, world = node_of()
    node.receive(6, aggregated(2, "first"))
    node.receive(4, aggregated(2, "second"))
    node.trained(2, "mine")
    node.receive(2, aggregated(2, "third"))
    assert world.trainings == [(2, "first")]
    world.answer()
    assert [message.model for _, message in world.take(TrainedModel)] == ["mine"]


def test_a_newer_round_cancels_the_older_one() -> None:
    node, world = node_of()
    node.receive(4, aggregated(2, "old"))
    node.receive(5, aggregated(3, "new"))
    assert world.trainings == [(2, "old"), (3, "new")]
    node.trained(2, "too late")
    assert world.sent == []
    node.trained(3, "mine")
    world.answer()
    assert [(message.round, message.model) for _, message in world.take(TrainedModel)] == [(4, "mine")]


def test_an_older_round_is_ignored() -> None:
    node, world = node_of()
    node.receive(5, aggregated(3, "new"))
    node.receive(4, aggregated(2, "old"))
    assert world.trainings == [(3, "new")]


# -------------------------------------------------------------------------------------------------------- aggregation


def test_the_mean_goes_to_the_first_of_the_round_who_answer_and_oneself_is_not_asked() -> None:
    node, world = node_of(6)
    for sender, model in ((1, "a"), (2, "b"), (3, "c")):
        assert world.averages == []
        node.receive(sender, trained(2, model))
    assert world.averages == [(2, {1: "a", 2: "b", 3: "c"})]
    assert world.trainings == []
    assert world.answer() == [4, 2]
    assert [(receiver, message.model) for receiver, message in world.take(AggregatedModel)] == [
        (4, "(a+b+c)"),
        (2, "(a+b+c)"),
    ]
    assert world.trainings == [(2, "(a+b+c)")]  # it is in its own sample


def test_one_model_a_sender() -> None:
    node, world = node_of()
    for model in ("a", "a again", "and again"):
        node.receive(1, trained(2, model))
    assert world.averages == []
    node.receive(2, trained(2, "b"))
    node.receive(3, trained(2, "c"))
    assert [sorted(models) for _, models in world.averages] == [[1, 2, 3]]


def test_a_newer_round_discards_the_older_ones_models() -> None:
    node, world = node_of()
    node.receive(1, trained(2, "a"))
    node.receive(2, trained(2, "b"))
    node.receive(3, trained(3, "c"))
    node.receive(4, trained(2, "late"))
    node.receive(4, trained(3, "d"))
    assert world.averages == []
    node.receive(5, trained(3, "e"))
    assert world.averages == [(3, {3: "c", 4: "d", 5: "e"})]


def test_what_comes_after_the_average_changes_nothing() -> None:
    node, world = node_of(success_fraction=0.5)
    for sender in (1, 2, 3, 4):
        node.receive(sender, trained(2, "abcde"[sender], attempt=sender // 3))
    assert [sorted(models) for _, models in world.averages] == [[1, 2]]
    assert world.answer() == [4, 2]


@pytest.mark.parametrize(
    ("success_fraction", "rounding", "sample_size", "needed"),
    [
        (1.0, "up", 7, 7),
        (0.75, "up", 7, 6),  # 5.25
        (0.75, "down", 7, 5),
        (0.7, "up", 10, 7),  # 10 * 0.7 is no integer in binary
        (0.7, "down", 10, 7),
        (0.29, "down", 100, 29),  # 28.999999999999996
        (0.55, "up", 100, 55),  # 55.00000000000001
        (0.1, "down", 5, 1),  # never nobody
        (0.5, "up", 3, 2),  # of a sample that was found to be short
        (0.5, "down", 3, 1),
    ],
)
def test_how_many_models_are_enough(success_fraction: float, rounding: Any, sample_size: int, needed: int) -> None:
    node, _ = node_of(sample_size=100, success_fraction=success_fraction, success_rounding=rounding)
    assert node.rules.models_needed(sample_size) == needed


def test_no_more_models_are_awaited_than_the_settings_ask_for() -> None:
    assert node_of(sample_size=4)[0].rules.models_needed(sample_size=9) == 4


def test_the_size_of_the_sample_travels_with_its_models() -> None:
    node, world = node_of(members=[1, 6])
    node.bootstrap(sample_size=2)
    node.trained(1, "mine")  # for round 2, whose aggregator it is itself
    node.receive(1, trained(2, "b", sample_size=2, view=node.view.copy()))
    assert world.averages == [(2, {1: "b", 6: "mine"})]
    assert world.answer() == [1]
    [(_, message)] = world.take(AggregatedModel)
    assert message.sample_size == 2


def test_without_a_timeout_it_waits_for_ever() -> None:
    node, world = node_of()
    node.receive(1, trained(2, "a"))
    assert world.timers == []


def test_after_the_timeout_it_goes_on_with_enough_models() -> None:
    node, world = node_of(aggregation_timeout=300.0, min_models=2)
    node.receive(1, trained(2, "a"))
    world.wait(100)
    node.receive(2, trained(2, "b"))
    world.wait(199)
    assert world.averages == []
    world.wait(1)  # from the first model on, not from the last one
    assert world.averages == [(2, {1: "a", 2: "b"})]


def test_after_the_timeout_it_drops_too_few_and_collects_again_after_a_restart() -> None:
    node, world = node_of(aggregation_timeout=300.0, min_models=2)
    node.receive(1, trained(2, "a"))
    world.wait(300)
    assert world.averages == []
    node.receive(2, trained(2, "b", attempt=1))
    node.receive(3, trained(2, "c", attempt=1))
    assert world.averages == []  # the model that it dropped is gone
    world.wait(300)  # the timeout is counted anew
    assert world.averages == [(2, {2: "b", 3: "c"})]


def test_a_timeout_does_not_revive_a_round_that_others_are_past() -> None:
    node, world = node_of(aggregation_timeout=300.0, min_models=1)
    node.receive(1, trained(2, "a"))
    node.receive(4, Ping(3, 2, search=1))
    world.wait(300)
    assert world.averages == []


def test_the_timeout_of_an_older_round_does_not_touch_the_newer_one() -> None:
    node, world = node_of(aggregation_timeout=300.0, min_models=1)
    node.receive(1, trained(2, "a"))
    world.wait(200)
    node.receive(2, trained(3, "b"))
    world.wait(200)
    assert world.averages == []
    world.wait(100)
    assert world.averages == [(3, {2: "b"})]


# ----------------------------------------------------------------------------------------------------- who is there


def test_silent_candidates_are_replaced_in_hash_order() -> None:
    node, world = node_of(0, num_aggregators=2)
    node.bootstrap(3)
    node.trained(1, "mine")
    assert world.answer(6, 4) == [6, 4]
    world.wait(4.9)
    assert set(world.asked()) == {6, 4}  # once more, see below
    world.wait(0.2)
    assert world.answer(7) == [2, 7]
    assert world.timeouts == [6, 4]
    world.wait(5)
    assert world.answer() == [7, 1]  # the repeat, and the next one
    assert [receiver for receiver, _ in world.take(TrainedModel)] == [2, 1]
    assert world.timeouts == [6, 4, 7]


def test_a_ping_is_repeated_once_after_a_second() -> None:
    node, world = node_of(0)
    node.bootstrap(3)
    node.trained(1, "mine")
    assert world.asked() == [6]
    world.wait(0.9)
    assert world.asked() == []
    world.wait(0.1)
    [(receiver, ping)] = world.take(Ping)
    world.wait(3.9)
    assert (receiver, world.asked()) == (6, [])
    node.receive(6, Pong(1, 1, ping.search))  # the second one reached it
    assert [receiver for receiver, _ in world.take(TrainedModel)] == [6]
    world.wait(100)
    assert world.sent == [] and world.timeouts == []


def test_a_short_timeout_leaves_time_for_the_repeat() -> None:
    node, world = node_of(0, ping_timeout=1.0)
    node.bootstrap(3)
    node.trained(1, "mine")
    world.wait(0.5)
    assert world.asked() == [6, 6]
    world.wait(0.5)
    assert world.asked() == [4] and world.timeouts == [6]


def test_whoever_answers_too_late_or_twice_is_not_taken() -> None:
    node, world = node_of(0)
    node.bootstrap(3)
    node.trained(1, "mine")
    [(_, ping)] = world.take(Ping)
    world.wait(5)
    late = Pong(1, 1, ping.search)
    node.receive(6, late)
    node.receive(6, late)
    assert world.take(TrainedModel) == []
    world.answer()
    node.receive(6, late)
    assert [receiver for receiver, _ in world.take(TrainedModel)] == [4]


def test_out_of_candidates_it_goes_on_with_those_found() -> None:
    node, world = node_of(2, members=[2, 4, 6], sample_size=3, num_aggregators=3)
    node.bootstrap(3)
    node.trained(1, "mine")
    assert world.answer(4) == [6, 4]
    world.wait(4)
    assert world.take(TrainedModel) == []
    world.wait(1)  # nobody is left to be asked instead of 4
    assert [receiver for receiver, _ in world.take(TrainedModel)] == [6]
    assert node.aggregate_round == 2  # and itself


def test_a_short_sample_goes_on_as_soon_as_all_of_it_has_answered() -> None:
    node, world = node_of(2, members=[2, 4, 6], sample_size=5, num_aggregators=5)
    node.bootstrap(3)
    node.trained(1, "mine")
    assert world.answer() == [6, 4]
    assert [receiver for receiver, _ in world.take(TrainedModel)] == [6, 4]


def test_alone_it_is_its_own_aggregator_and_sample() -> None:
    node, world = node_of(3, members=[3])
    node.bootstrap(1)
    for round in (1, 2, 3):
        node.trained(round, f"m{round}")
    assert world.trainings == [(1, "seed"), (2, "(m1)"), (3, "(m2)"), (4, "(m3)")]
    assert world.sent == []


def test_pings_are_answered_with_the_newest_round_that_it_knows() -> None:
    node, world = node_of()
    node.receive(4, Ping(7, 6, search=13))
    [(receiver, pong)] = world.take(Pong)
    assert (receiver, pong.round, pong.search) == (4, 7, 13)
    assert node.view.last_active[4] == 7
    node.receive(3, Ping(2, 2, search=1))
    assert [(receiver, pong.round) for receiver, pong in world.take(Pong)] == [(3, 7)]
    assert node.view.last_active[3] == 7  # it lives now, even if it is behind


def test_views_ride_on_models_and_are_copies() -> None:
    node, world = node_of()
    theirs = View(np.ones(CLIENTS, dtype=bool))
    theirs.saw(7, 5)
    theirs.change(3, counter=1, joins=False)
    node.receive(1, trained(2, "a", view=theirs))
    assert node.view.last_active[7] == 5 and not node.view.joined[3]
    assert theirs.last_active[1] == -1
    node.bootstrap(3)
    node.trained(1, "mine")
    world.answer()
    node.receive(2, trained(2, "b"))
    node.receive(3, trained(2, "c"))
    world.answer()
    for _, message in world.sent:
        assert isinstance(message, AggregatedModel)
        assert message.view is not node.view and message.view.last_active[7] == 5


# -------------------------------------------------------------------------------------------------------- membership


def test_a_joiner_is_asked_only_after_the_next_models_were_sent() -> None:
    node, world = node_of(0, members=[0, 1, 2, 3])
    node.bootstrap(3)
    for joiner in (5, 6):
        node.receive(joiner, Announcement(0, 1, counter=1, joins=True))
    node.trained(1, "mine")
    assert world.answer() == [2]  # not 6, the first of round 2
    [(_, message)] = world.take(TrainedModel)
    assert message.view.joined.nonzero()[0].tolist() == [0, 1, 2, 3]
    node.receive(2, aggregated(2, "next"))
    node.trained(2, "mine")
    assert world.answer() == [5]  # the first of round 3


def test_a_leave_is_applied_at_once_and_outlives_an_older_join() -> None:
    node, world = node_of(0, members=[0, 1, 2, 4])
    node.bootstrap(3)
    node.receive(6, Announcement(0, 1, counter=1, joins=True))
    node.receive(6, Announcement(0, 1, counter=2, joins=False))
    node.receive(4, Announcement(0, 1, counter=1, joins=False))
    node.trained(1, "mine")
    assert world.answer() == [2]  # neither 6 nor 4
    assert node.view.joined.nonzero()[0].tolist() == [0, 1, 2]


def test_announcements_go_to_as_many_others_as_are_in_a_sample() -> None:
    node, world = node_of(6, sample_size=3)
    node.leave(phase=1)
    goodbyes = world.take(Announcement)
    receivers = [receiver for receiver, _ in goodbyes]
    assert len(set(receivers)) == 3 and 6 not in receivers
    assert {(message.counter, message.joins) for _, message in goodbyes} == {(1, False)}
    assert not node.view.joined[6]
    node.join(phase=1)
    assert {(message.counter, message.joins) for _, message in world.take(Announcement)} == {(2, True)}
    assert node.view.joined[6]


def test_who_knows_nobody_announces_itself_to_nobody() -> None:
    node, world = node_of(6, members=[6])
    node.join(phase=1)
    assert world.sent == []


# ------------------------------------------------------------------------------------------------- crash and restart


def test_a_crash_loses_what_was_going_on() -> None:
    node, world = node_of(aggregation_timeout=300.0, min_models=1)
    node.receive(1, trained(2, "a"))
    node.receive(4, aggregated(2, "x"))
    node.stop()
    node.trained(2, "mine")
    world.wait(1000)
    assert world.averages == [] and world.sent == []
    node.receive(5, aggregated(2, "y"))  # it may begin the round again
    assert world.trainings == [(2, "x"), (2, "y")]


def test_after_a_crash_it_may_be_asked_for_any_round_that_it_has_not_trained() -> None:
    node, world = node_of()
    node.receive(4, aggregated(5, "lost"))
    node.stop()
    node.receive(5, aggregated(4, "again", attempt=1))
    assert world.trainings == [(5, "lost"), (4, "again")]


def test_a_crash_ends_its_searches() -> None:
    node, world = node_of(0)
    node.bootstrap(3)
    node.trained(1, "mine")
    [(_, ping)] = world.take(Ping)
    node.stop()
    node.receive(6, Pong(1, 1, ping.search))
    world.wait(1000)
    assert world.sent == [] and world.timeouts == []


def test_a_restart_sends_the_newest_aggregated_model_to_a_new_sample() -> None:
    node, world = node_of(0)
    node.receive(4, aggregated(2, "average"))
    node.restart(2, attempt=1)
    assert world.answer(6) == [6, 4, 2]
    world.wait(5)
    world.answer()
    messages = world.take(AggregatedModel)
    assert [receiver for receiver, _ in messages] == [4, 2, 7]
    assert {(message.round, message.model, message.attempt) for _, message in messages} == {(2, "average", 1)}


def test_without_that_rounds_model_it_restarts_from_its_own() -> None:
    node, _ = node_of(0)
    assert node.best_model(1) == ((1, 1), "seed")
    assert node.best_model(2) == ((0, 0), "seed")
    node.receive(4, aggregated(2, "average"))
    node.trained(2, "mine")
    assert node.best_model(2) == ((2, 1), "average")
    assert node.best_model(3) == ((2, 0), "mine")


def test_a_restart_makes_a_node_deliver_again_once_and_train_nothing_anew() -> None:
    node, world = node_of(0)
    node.bootstrap(3)
    node.trained(1, "mine")
    world.answer()
    assert len(world.take(TrainedModel)) == 1
    for attempt in (1, 1, 2):
        node.receive(5, aggregated(1, "seed", sample_size=2, attempt=attempt))
        world.answer()
    delivered = [(message.model, message.sample_size, message.attempt) for _, message in world.take(TrainedModel)]
    assert delivered == [("mine", 2, 1), ("mine", 2, 2)]
    assert world.trainings == [(1, "seed")]


def test_a_restart_while_it_trains_changes_only_what_it_delivers() -> None:
    node, world = node_of(0)
    node.bootstrap(3)
    node.receive(5, aggregated(1, "another", sample_size=2, attempt=1))
    assert world.trainings == [(1, "seed")] and world.sent == []
    node.trained(1, "mine")
    world.answer()
    assert [(m.model, m.sample_size, m.attempt) for _, m in world.take(TrainedModel)] == [("mine", 2, 1)]


def test_whoever_was_not_in_the_first_sample_trains_after_a_restart() -> None:
    node, world = node_of(0)
    node.receive(5, aggregated(1, "seed", attempt=1))
    assert world.trainings == [(1, "seed")]


def test_an_average_that_is_outdated_before_it_is_sent_is_not_sent() -> None:
    node, world = node_of(0, success_fraction=0.3)
    node.receive(1, trained(2, "a"))
    for receiver, ping in world.take(Ping):
        node.receive(receiver, Pong(3, ping.phase, ping.search))
    assert world.averages == [(2, {1: "a"})] and world.sent == []

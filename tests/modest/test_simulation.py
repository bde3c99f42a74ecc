"""The whole protocol in virtual time: against md5 and arithmetic by hand while nobody fails, and alive when many do."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from lightning_fed.federation.availability import (
    AlwaysOn,
    Availability,
    AvailabilityTrace,
    MembershipSchedule,
    RandomChurn,
)
from lightning_fed.federation.virtual_clock import Uniform, VirtualClock
from lightning_fed.modest.rules import Rules
from lightning_fed.modest.simulation import SEED_MODEL, FederationDied, Model, RoundPlan, Simulation

MODEL_BYTES = 1000


class Bounded(Simulation):
    """A simulation that fails instead of going on for ever."""

    steps_left = 100_000

    def _step(self) -> None:
        self.steps_left -= 1
        assert self.steps_left > 0, f"round {self._settled + 1} does not end"
        super()._step()


def rules_of(**settings: Any) -> Rules:
    defaults: dict[str, Any] = {
        "sample_size": 4,
        "num_aggregators": 1,
        "success_fraction": 1.0,
        "success_rounding": "up",
        "aggregation_timeout": None,
        "min_models": 3,
        "ping_timeout": 5.0,
        "activity_window": 50,
        "restart_timeout": 60.0,
    }
    return Rules(**{**defaults, **settings})


def simulate(
    num_clients: int,
    availability: Availability | None = None,
    clock: VirtualClock | None = None,
    steps: int = 1,
    model_bytes: int = MODEL_BYTES,
    seed: int = 0,
    **rules: Any,
) -> Bounded:
    if clock is not None:
        clock.bind(num_clients, seed)
    availability = availability or AlwaysOn()
    return Bounded(num_clients, rules_of(**rules), availability, clock, model_bytes, lambda client: steps, seed)


def order(num_clients: int, round: int) -> list[int]:
    """Independent of the package."""
    return sorted(range(num_clients), key=lambda client: hashlib.md5(f"{client}-{round}".encode()).hexdigest())


def devices(directory: Path, seconds_per_step: list[float]) -> VirtualClock:
    lines = [f"{client},{seconds},inf,inf" for client, seconds in enumerate(seconds_per_step)]
    (directory / "devices.csv").write_text("\n".join(["client,seconds_per_step,upload,download", *lines]))
    return VirtualClock(devices_csv=str(directory / "devices.csv"), latency=0.0)


def online_until(
    directory: Path, num_clients: int, until: dict[int, float], again: float | None = None
) -> Availability:
    """Clients that crash at a second, and perhaps come back; all others stay."""
    lines = [f"{client},0,{until.get(client, math.inf)}" for client in range(num_clients)]
    if again is not None:
        lines += [f"{client},{again},inf" for client in until]
    (directory / "trace.csv").write_text("\n".join(["client,from,to", *lines]))
    return AvailabilityTrace(str(directory / "trace.csv"))


# ----------------------------------------------------------------------------------------------------- without failures


@pytest.mark.parametrize("clock", [None, VirtualClock(latency=Uniform(0.01, 0.3))])
@pytest.mark.parametrize(
    ("num_clients", "sample_size", "num_aggregators"), [(12, 4, 1), (9, 5, 3), (5, 5, 5), (1, 1, 1)]
)
def test_without_failures_samples_and_aggregators_are_the_first_of_the_hash_order(
    num_clients: int, sample_size: int, num_aggregators: int, clock: Any
) -> None:
    simulation = simulate(num_clients, clock=clock, sample_size=sample_size, num_aggregators=num_aggregators)
    for round in range(1, 31):
        plan = simulation.plan(round)
        sample, aggregators = order(num_clients, round)[:sample_size], order(num_clients, round + 1)[:num_aggregators]
        assert set(plan.starts) == set(sample)
        assert plan.averages == {aggregator: tuple(sorted(sample)) for aggregator in aggregators}
        sources = {Model(round, client, False) for client in sample[:num_aggregators]} if round > 1 else {SEED_MODEL}
        assert set(plan.starts.values()) <= sources
        assert (plan.cancelled, plan.ping_timeouts, plan.restarts, plan.live) == ([], 0, 0, num_clients)


def churning() -> Bounded:
    churn = RandomChurn(0.01, 0.05, 0.5, unit="seconds")
    clock = VirtualClock(seconds_per_step=Uniform(0.5, 2), latency=Uniform(0, 0.2))
    return simulate(15, churn, clock, num_aggregators=2, success_fraction=0.75, seed=3)


def assert_same(plan: RoundPlan, other: RoundPlan) -> None:
    np.testing.assert_array_equal(plan.sent_bytes, other.sent_bytes)
    assert {**vars(plan), "sent_bytes": 0} == {**vars(other), "sent_bytes": 0}


def test_it_is_a_function_of_its_arguments_and_not_of_the_order_of_questions() -> None:
    forwards, backwards = churning(), churning()
    one = [forwards.plan(round) for round in range(1, 31)]
    backwards.plan(30)
    other = [backwards.plan(round) for round in range(30, 0, -1)][::-1]
    for plan, again in zip(one, other):
        assert_same(plan, again)


def test_what_is_forgotten_changes_nothing_of_what_follows() -> None:
    remembers, forgets = churning(), churning()
    for round in range(1, 61):
        forgets.forget_before(round)
        assert_same(remembers.plan(round), forgets.plan(round))
    assert len(remembers._plans) >= 60 and len(forgets._plans) <= 5
    with pytest.raises(LookupError, match="round 59 is forgotten"):
        forgets.plan(59)


def test_a_settled_round_tells_who_is_not_there() -> None:
    online = np.array([True] * 30)
    simulation = simulate(30, RandomChurn(0.02, 0.3, 0.5, unit="rounds"), seed=1)
    for round in range(1, 31):
        plan = simulation.plan(round)
        for client in plan.joined + plan.left:
            online[client] = not online[client]
        assert plan.offline == np.flatnonzero(~online).tolist()
    assert any(simulation.plan(round).offline for round in range(1, 31))


def test_a_settled_round_does_not_change_any_more() -> None:
    churn = RandomChurn(0.01, 0.05, 0.5, unit="seconds")
    simulation = simulate(
        15, churn, VirtualClock(Uniform(0.5, 2)), num_aggregators=3, success_fraction=0.5, aggregation_timeout=5.0
    )
    said = []
    for round in range(1, 61):
        plan = simulation.plan(round)
        said.append((dict(plan.starts), plan.sent_bytes.copy(), plan.training_seconds, plan.ended))
    for round, (starts, sent_bytes, training_seconds, ended) in enumerate(said, start=1):
        plan = simulation.plan(round)
        assert (plan.starts, plan.training_seconds, plan.ended) == (starts, training_seconds, ended)
        np.testing.assert_array_equal(plan.sent_bytes, sent_bytes)


def test_the_seconds_of_two_rounds_by_hand() -> None:
    # Three nodes, all in every sample. Round 2 is averaged by node 2, round 3 by node 1 (order: 2 1 0, and 1 0 2).
    clock = VirtualClock(seconds_per_step=1.0, latency=0.2, bandwidth=100.0)
    simulation = simulate(3, clock=clock, steps=3, model_bytes=76, sample_size=3)
    there_and_back = 2 * (0.2 + 16 / 100)
    model = 0.2 + (76 + 3 * 8) / 100
    first, second = simulation.plan(1), simulation.plan(2)
    assert (first.began, first.ended) == (0, pytest.approx(3 + there_and_back + model))
    # The aggregator has its own model as soon as all have answered, the others when it has arrived.
    assert second.began == pytest.approx(first.ended + there_and_back)
    assert second.ended == pytest.approx(first.ended + there_and_back + model + 3 + there_and_back + model)
    assert first.training_seconds == second.training_seconds == 9
    assert [first.models_received, second.models_received] == [2 + 2, 2 + 2]


def test_a_fraction_takes_the_fastest_and_leaves_the_slowest_behind(tmp_path: Path) -> None:
    speeds = [1.0, 1.3, 1.7, 2.3, 2.9, 3.1, 3.7, 20.0]
    simulation = simulate(8, clock=devices(tmp_path, speeds), success_fraction=0.75)
    now, busy_until = 0.0, np.zeros(8)
    for round in range(1, 21):
        plan, sample = simulation.plan(round), order(8, round)[:4]
        fastest = sorted(sample, key=lambda client: speeds[client])[:3]
        assert plan.averages == {order(8, round + 1)[0]: tuple(sorted(fastest))}
        assert plan.began == pytest.approx(now)
        now += speeds[fastest[-1]]
        assert plan.ended == pytest.approx(now)
        assert set(plan.starts) | set(plan.cancelled) == set(sample)
        busy_until[sample] = plan.began + np.array(speeds)[sample]
    # Node 7 is slower than several rounds, so a newer model interrupts it.
    everyone = [simulation.plan(round) for round in range(1, 21)]
    assert any(plan.cancelled == [7] for plan in everyone)
    assert all(set(plan.cancelled) <= {3, 4, 5, 6, 7} for plan in everyone)


def test_interrupted_work_counts_for_as_long_as_it_went_on(tmp_path: Path) -> None:
    # Everybody is in every sample, so whoever is too slow for a round is interrupted by the next one's model.
    simulation = simulate(4, clock=devices(tmp_path, [1, 2, 3, 50]), success_fraction=0.75)
    for round in range(1, 6):
        plan = simulation.plan(round)
        assert (set(plan.starts), plan.cancelled) == ({0, 1, 2}, [3])
        assert plan.training_seconds == 1 + 2 + 3 + 3


# -------------------------------------------------------------------------------------------------------- by schedule


def test_a_joiner_is_not_in_the_very_next_sample_but_in_later_ones() -> None:
    joiner = order(8, 5)[0]
    simulation = simulate(8, MembershipSchedule(joins={5: [joiner]}), num_aggregators=2)
    for round in range(1, 6):
        others = [client for client in order(8, round) if client != joiner]
        assert set(simulation.plan(round).starts) == set(others[:4])
    plans = [simulation.plan(round) for round in range(1, 41)]
    assert [plan.joined for plan in plans[3:6]] == [[], [joiner], []] and plans[3].live == plans[4].live - 1 == 7
    for round in range(12, 41):  # by now everybody has heard of it
        assert set(plans[round - 1].starts) == set(order(8, round)[:4])


@pytest.mark.parametrize("kind", ["leaves", "crashes"])
def test_who_is_gone_is_replaced_by_the_next_in_order(kind: str) -> None:
    gone = order(8, 6)[0]
    simulation = simulate(8, MembershipSchedule(**{kind: {5: [gone]}}), num_aggregators=2, activity_window=10)
    plans = [simulation.plan(round) for round in range(1, 41)]
    assert plans[4].left == [gone]
    for round in range(6, 41):
        others = [client for client in order(8, round) if client != gone]
        assert set(plans[round - 1].starts) == set(others[:4])
    timeouts = [plan.ping_timeouts for plan in plans]
    assert not any(timeouts[:3]) and not any(timeouts[16:])  # forgotten once the activity window has passed
    if kind == "leaves":
        assert not any(timeouts[8:])  # it has said goodbye
    else:
        assert any(timeouts[8:16])


def test_a_crashed_client_that_comes_back_trains_again() -> None:
    simulation = simulate(6, MembershipSchedule(crashes={5: [2, 3]}, joins={10: [2, 3]}))
    away = [set(simulation.plan(round).starts) for round in range(6, 10)]
    back = [set(simulation.plan(round).starts) for round in range(14, 30)]
    assert not any({2, 3} & starts for starts in away)
    assert back == [set(order(6, round)[:4]) for round in range(14, 30)]


@pytest.mark.parametrize("num_aggregators", [1, 3])
def test_rounds_go_on_when_four_of_five_crash(num_aggregators: int) -> None:
    crashed = sorted(np.random.default_rng(0).choice(50, 40, replace=False).tolist())
    schedule = MembershipSchedule(crashes={20: crashed})
    simulation = simulate(50, schedule, sample_size=10, num_aggregators=num_aggregators)
    survivors = set(range(50)) - set(crashed)
    for round in range(1, 61):
        plan = simulation.plan(round)
        expected = survivors if round >= 20 else set(order(50, round)[:10])
        if round != 19:  # the aggregators of round 20 may crash before they have sent anything
            assert set(plan.starts) == expected
            assert set(plan.averages.values()) == {tuple(sorted(expected))}
    assert simulation.plan(20).live == 10 and len(simulation.plan(20).left) == 40


def test_a_sample_may_be_shorter_than_asked_for() -> None:
    simulation = simulate(6, MembershipSchedule(crashes={3: [0, 1, 2, 3]}), sample_size=4, success_fraction=0.75)
    for round in range(4, 20):
        plan = simulation.plan(round)
        assert set(plan.starts) == {4, 5} and set(plan.averages.values()) == {(4, 5)}


def test_when_everybody_is_dead_it_says_so() -> None:
    simulation = simulate(8, MembershipSchedule(crashes={5: list(range(8))}))
    assert set(simulation.plan(3).starts) == set(order(8, 3)[:4])
    with pytest.raises(FederationDied, match="no node of the federation is left in round 4"):
        simulation.plan(4)
    with pytest.raises(FederationDied):
        simulation.plan(6)


def test_a_federation_of_nodes_that_never_stay_says_so() -> None:
    simulation = simulate(20, RandomChurn(2.0, 1.0, unit="seconds"), ping_timeout=5.0, restart_timeout=1.0)
    with pytest.raises(FederationDied, match=r"was started 200 times and never finished, as .* ping_timeout=5\.0"):
        simulation.plan(50)


def test_the_last_one_goes_on_alone() -> None:
    simulation = simulate(8, MembershipSchedule(crashes={5: [0, 1, 2, 3, 4, 6, 7]}))
    for round in range(6, 30):
        plan = simulation.plan(round)
        assert list(plan.starts) == [5] and plan.averages == {5: (5,)}


# ------------------------------------------------------------------------------------------------------- in mid-round

# With 8 nodes, round 1 asks for 6 5 4 2 7 0 3 1 and round 2 for 6 4 2 7 1 3 5 0. A round's training takes a second.


def test_when_all_aggregators_crash_the_round_is_delivered_to_others(tmp_path: Path) -> None:
    # Models are on their way from 1.6 s to 1.9 s.
    availability = online_until(tmp_path, 8, {6: 1.7, 4: 1.7})
    clock = VirtualClock(seconds_per_step=1.0, latency=0.3, bandwidth=math.inf)
    simulation = simulate(8, availability, clock, sample_size=3, num_aggregators=2)
    plan = simulation.plan(1)
    assert plan.restarts == 1 and plan.left == [4, 6]
    assert set(plan.starts) == {6, 5, 4} | {2, 7}  # 5 has trained already, 2 and 7 replace the dead
    assert plan.averages == {2: (2, 5, 7), 7: (2, 5, 7)}
    assert 1.9 + 60 < plan.ended < 1.9 + 60 + 20
    assert simulation.plan(2).restarts == 0
    assert set(simulation.plan(2).starts) == {2, 7, 1}


def test_when_the_whole_sample_crashes_the_round_begins_again_elsewhere(tmp_path: Path) -> None:
    simulation = simulate(8, online_until(tmp_path, 8, {6: 0.5, 5: 0.5, 4: 0.5}), sample_size=3)
    plan = simulation.plan(1)
    assert (sorted(plan.cancelled), plan.restarts) == ([4, 5, 6], 1)
    assert plan.starts == {2: SEED_MODEL, 7: SEED_MODEL, 0: SEED_MODEL}
    assert plan.training_seconds == 3 * 0.5 + 3 * 1
    assert plan.began == 0
    assert plan.averages == {2: (0, 2, 7)}


def test_a_later_round_begins_again_from_the_newest_model_that_lives(tmp_path: Path) -> None:
    # Round 2's sample is 6 4 2; 6 has averaged. All three crash while they train, so that nobody else has the average.
    simulation = simulate(8, online_until(tmp_path, 8, {6: 1.5, 4: 1.5, 2: 1.5}), sample_size=3)
    assert set(simulation.plan(1).starts) == {6, 5, 4}
    plan = simulation.plan(2)
    assert set(plan.starts) == {7, 1, 3} and set(plan.starts.values()) == {Model(1, 5, True)}
    assert sorted(plan.cancelled) == [2, 4, 6]
    assert simulation.plan(3).restarts == 0


def test_nodes_that_know_different_aggregators_find_each_other() -> None:
    # Every departure is a crash, and everybody comes back, but is forgotten by then: views are never the same.
    simulation = simulate(7, RandomChurn(0.5, 1.0), seed=275, sample_size=3, activity_window=1)
    for round in range(1, 31):
        assert simulation.plan(round).restarts < 7


@pytest.mark.parametrize("seed", range(10))
def test_a_restart_never_needs_an_average_of_an_older_round(seed: int) -> None:
    # Lives of 20 s, and rounds of as long: at times, whoever lives has averaged, but never finished a training.
    clock = VirtualClock(Uniform(0.5, 6), Uniform(0, 0.2))
    churn = RandomChurn(0.05, 0.03, unit="seconds")
    settings: dict[str, Any] = {"sample_size": 2, "success_fraction": 0.5, "restart_timeout": 5.0}
    assert_sound(simulate(8, churn, clock, seed=seed, **settings), 20)


def test_when_everybody_sleeps_it_goes_on_after_they_wake(tmp_path: Path) -> None:
    simulation = simulate(8, online_until(tmp_path, 8, {client: 2.5 for client in range(8)}, again=1000.0))
    plans = [simulation.plan(round) for round in range(1, 11)]
    assert sorted(plans[2].left) == plans[2].joined == list(range(8))
    assert plans[2].began == 2 and plans[2].ended > 1000 and plans[2].restarts == 1
    assert all(plan.restarts == 0 for plan in plans[3:])


# --------------------------------------------------------------------------------------------------------- under churn


def assert_sources(simulation: Simulation, round: int) -> None:
    """Whoever trains begins with a model of the round before: an average, or what a client trained, or the seed."""
    plan = simulation.plan(round)
    before = simulation.plan(round - 1) if round > 1 else RoundPlan()
    for source in set(plan.starts.values()) - {SEED_MODEL}:
        if source.is_trained:
            assert source.round < round and source.client in simulation.plan(source.round).starts
            for later in range(source.round + 1, round):  # its row still holds that
                assert source.client not in simulation.plan(later).starts
            assert plan.restarts
        else:
            assert source.round == round and source.client in before.averages


def assert_sound(simulation: Simulation, rounds: int) -> None:
    ended = 0.0
    for round in range(1, rounds + 1):
        plan = simulation.plan(round)
        assert_sources(simulation, round)
        assert plan.starts and plan.averages
        rules = simulation.rules
        fewest = 1 if rules.aggregation_timeout is None else min(rules.min_models, rules.sample_size)
        for contributors in plan.averages.values():
            assert fewest <= len(contributors) or rules.models_needed(len(contributors)) <= len(contributors)
            assert set(contributors) <= set(plan.starts)
        assert ended <= plan.ended and plan.began <= plan.ended
        ended = plan.ended
        if round < rounds:
            assert set(plan.cancelled) & set(plan.starts) <= comers(simulation, round + 1)
        assert plan.training_seconds > 0 and (plan.sent_bytes >= 0).all()


def comers(simulation: Simulation, round: int) -> set[int]:
    """Who has come online up to a round: they may begin once more what they lost in a crash.

    Changes before a round come with its first average, when some of the round before may still go on.
    """
    return {client for earlier in range(1, round + 1) for client in simulation.plan(earlier).joined}


def rounds_until_death(simulation: Bounded, rounds: int) -> int:
    """How many rounds a federation lives, at most as many as given; it may only die when nobody is online."""
    for round in range(1, rounds + 1):
        try:
            simulation.plan(round)
        except FederationDied:
            assert not simulation.online.any()
            return round - 1
    return rounds


CHURN: list[Availability] = [
    RandomChurn(0.1, 0.3),
    RandomChurn(0.3, 0.3, leave_fraction=0.5),
    RandomChurn(0.01, 0.05, unit="seconds"),
    RandomChurn(0.02, 0.05, leave_fraction=0.3, unit="seconds"),
]


@pytest.mark.parametrize("success_fraction", [1.0, 0.5])
@pytest.mark.parametrize("churn", CHURN)
def test_a_hundred_rounds_of_churn_end(churn: Availability, success_fraction: float) -> None:
    simulation = simulate(30, churn, num_aggregators=2, success_fraction=success_fraction, restart_timeout=10.0)
    assert_sound(simulation, 100)
    plans = [simulation.plan(round) for round in range(1, 101)]
    assert sum(len(plan.left) for plan in plans) > 50 and sum(plan.ping_timeouts for plan in plans) > 10


def clocks() -> st.SearchStrategy[VirtualClock | None]:
    slow = st.builds(
        lambda low, spread, latency: VirtualClock(Uniform(low, low + spread), Uniform(0, latency), 1e5),
        st.floats(0.01, 1),
        st.floats(0, 3),
        st.floats(0, 0.6),
    )
    return st.none() | slow


def churns() -> st.SearchStrategy[Availability]:
    by_round = st.builds(RandomChurn, st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 1))
    rates = st.floats(0, 0.01)  # lives of 100 seconds and more, rounds of some seconds
    return by_round | st.builds(RandomChurn, rates, rates, st.floats(0, 1), st.just("seconds"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_federation_either_goes_on_or_dies_out(data: st.DataObject) -> None:
    num_clients = data.draw(st.integers(1, 12), "clients")
    sample_size = data.draw(st.integers(1, num_clients), "sample size")
    churn = data.draw(churns(), "churn")
    note(f"churn: {vars(churn)}")
    simulation = simulate(
        num_clients,
        churn,
        data.draw(clocks()),
        seed=data.draw(st.integers(0, 1000), "seed"),
        sample_size=sample_size,
        num_aggregators=data.draw(st.integers(1, sample_size), "aggregators"),
        success_fraction=data.draw(st.floats(0.05, 1), "success fraction"),
        success_rounding=data.draw(st.sampled_from(["up", "down"])),
        aggregation_timeout=data.draw(st.none() | st.floats(1, 30), "aggregation timeout"),
        min_models=data.draw(st.integers(1, 4), "min models"),
        ping_timeout=data.draw(st.floats(0.5, 5), "ping timeout"),
        activity_window=data.draw(st.integers(1, 20), "activity window"),
        restart_timeout=data.draw(st.floats(1, 60), "restart timeout"),
    )
    assert_sound(simulation, rounds_until_death(simulation, 12))

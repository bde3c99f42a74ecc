"""When nodes are there: sorted, alternating, a function of (clients, seed), and refused when it makes no sense."""

from __future__ import annotations

from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_fed.federation.availability import (
    AlwaysOn,
    Availability,
    AvailabilityTrace,
    MembershipChange,
    MembershipSchedule,
    RandomChurn,
)

RATES = st.floats(0.05, 1.0)


def online(availability: Availability, num_clients: int, seed: int, until: float) -> np.ndarray:
    """Who is online just after the changes up to a time, bool ``[N]``; every change must be one."""
    present = availability.present_at_start(num_clients).copy()
    for change in takewhile(lambda change: change.at <= until, availability.changes(num_clients, seed)):
        assert present[change.client] != (change.kind == "join"), change
        present[change.client] = change.kind == "join"
    return present


def trace(directory: Path, text: str) -> str:
    path = directory / "trace.csv"
    path.write_text(text)
    return str(path)


def test_always_on_is_always_on() -> None:
    AlwaysOn().validate(3)
    assert AlwaysOn().present_at_start(3).tolist() == [True] * 3
    assert list(AlwaysOn().changes(3, seed=0)) == []


# ------------------------------------------------------------------------------------------------------ random churn


@settings(max_examples=40, deadline=None)
@given(RATES, RATES, st.floats(0, 1), st.sampled_from(["rounds", "seconds"]), st.integers(1, 20), st.integers(0, 2**31))
def test_churn_is_sorted_and_alternates(
    crash: float, back: float, leave: float, unit: Any, clients: int, seed: int
) -> None:
    churn = RandomChurn(crash, back, leave, unit)
    changes = list(islice(churn.changes(clients, seed), 300))
    assert changes == sorted(changes)
    assert changes == list(islice(RandomChurn(crash, back, leave, unit).changes(clients, seed), 300))
    present = churn.present_at_start(clients)
    for change in changes:
        assert change.at > (1 if unit == "rounds" else 0)
        assert unit == "seconds" or change.at == int(change.at)
        assert present[change.client] == (change.kind != "join")
        present[change.client] = change.kind == "join"


def test_a_clients_churn_does_not_depend_on_the_others() -> None:
    few = [change for change in islice(RandomChurn(0.1, 0.3).changes(3, seed=5), 60) if change.client == 1]
    many = [change for change in islice(RandomChurn(0.1, 0.3).changes(40, seed=5), 2000) if change.client == 1]
    assert many[: len(few)] == few
    other = [change for change in islice(RandomChurn(0.1, 0.3).changes(3, seed=6), 60) if change.client == 1]
    assert other != few


@pytest.mark.parametrize("unit", ["rounds", "seconds"])
@pytest.mark.parametrize(("crash", "back"), [(0.1, 0.3), (0.3, 0.1), (0.05, 0.05)])
def test_the_share_online_settles(unit: Any, crash: float, back: float) -> None:
    clients = 3000
    share = online(RandomChurn(crash, back, unit=unit), clients, seed=1, until=80.0).mean()
    expected = back / (crash + back)
    assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / clients))


def test_periods_have_the_mean_that_the_rates_say() -> None:
    away = [next(RandomChurn(0.25, 1.0).changes(1, seed)).at - 1 for seed in range(4000)]
    assert min(away) == 1
    assert np.mean(away) == pytest.approx(4.0, abs=0.25)


def test_some_departures_say_goodbye() -> None:
    changes = list(islice(RandomChurn(0.2, 0.5, leave_fraction=0.3).changes(50, seed=0), 8000))
    goodbyes = sum(change.kind == "leave" for change in changes)
    assert goodbyes / sum(change.kind != "join" for change in changes) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("unit", ["rounds", "seconds"])
def test_rates_of_zero_and_one(unit: Any) -> None:
    assert list(RandomChurn(0.0, 0.5, unit=unit).changes(10, seed=0)) == []
    never_back = list(RandomChurn(0.5, 0.0, unit=unit).changes(10, seed=0))
    assert sorted(change.client for change in never_back) == list(range(10))
    assert {change.kind for change in never_back} == {"crash"}
    flicker = [change.at for change in islice(RandomChurn(1.0, 1.0).changes(1, seed=0), 3)]
    assert flicker == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crash_rate": 1.5, "return_rate": 0.1}, r"crash_rate=1.5 must be in \[0, 1\].*unit='seconds'"),
        ({"crash_rate": 0.1, "return_rate": -1.0}, r"return_rate=-1.0 must be in \[0, 1\]"),
        ({"crash_rate": -1.0, "return_rate": 2.0, "unit": "seconds"}, "crash_rate=-1.0 must be a rate per second"),
    ],
)
def test_churn_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomChurn(**arguments)


# ------------------------------------------------------------------------------------------------------------ traces


def test_a_trace_is_read_as_written(tmp_path: Path) -> None:
    lines = "client,from,to\n0,0,10\n1,5.5,7\n1,20,inf\n\n3,-4,3\n"
    recorded = AvailabilityTrace(trace(tmp_path, lines))
    recorded.validate(4)
    assert recorded.present_at_start(4).tolist() == [True, False, False, True]
    assert list(recorded.changes(4, seed=0)) == [
        MembershipChange(3.0, 3, "crash"),
        MembershipChange(5.5, 1, "join"),
        MembershipChange(7.0, 1, "crash"),
        MembershipChange(10.0, 0, "crash"),
        MembershipChange(20.0, 1, "join"),
    ]


def test_intervals_that_overlap_or_touch_are_one(tmp_path: Path) -> None:
    path = trace(tmp_path, "client,from,to\n0,8,9\n0,1,4\n0,3,6\n0,6,7\n0,2,3\n")
    changes = list(AvailabilityTrace(path).changes(1, seed=0))
    assert [(change.at, change.kind) for change in changes] == [(1, "join"), (7, "crash"), (8, "join"), (9, "crash")]


def test_a_trace_of_rounds_starts_at_round_one(tmp_path: Path) -> None:
    recorded = AvailabilityTrace(trace(tmp_path, "client,from,to\n0,1,3\n1,2,5\n2,0,1\n"), unit="rounds")
    assert recorded.present_at_start(3).tolist() == [True, False, False]
    assert [(change.at, change.client) for change in recorded.changes(3, seed=0)] == [(2, 1), (3, 0), (5, 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-5, 40), st.integers(1, 15)), max_size=25), st.integers(0, 50))
def test_a_trace_is_online_within_its_intervals_and_nowhere_else(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[int, int, int]], moment: int
) -> None:
    text = "".join(f"{client},{begin},{begin + length}\n" for client, begin, length in lines)
    recorded = AvailabilityTrace(trace(tmp_path_factory.mktemp("trace"), "client,from,to\n" + text))
    changes = list(recorded.changes(5, seed=0))
    assert changes == sorted(changes)
    expected = [any(c == client and a <= moment < a + n for c, a, n in lines) for client in range(5)]
    assert online(recorded, 5, seed=0, until=moment).tolist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client,from,to\n0,0,1\n7,0,1\n", r"trace.csv', line 3: client=7 is not a client .*num_clients=3"),
        ("client,from,to\n1.5,0,1\n", "line 2: client=1.5 is not a client"),
        ("client,from,to\n1,4,4\n", "line 2: from=4 is not before to=4"),
        ("client,from,to\n1,x,4\n", "line 2: from='x' is not a number"),
        ("client,from,to\n1,nan,4\n", "line 2: from='nan' is not a number"),
        ("client,from,to\n1,2\n", "line 2: to=None is not a number"),
        ("client,start,to\n1,2,3\n", r"line 1: the columns \['from'\] are missing: .* header client,from,to"),
        ("", r"line 1: the columns \['client', 'from', 'to'\] are missing"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AvailabilityTrace(trace(tmp_path, text)).validate(3)


def test_a_missing_trace_is_refused() -> None:
    with pytest.raises(ValueError, match=r"path='nowhere.csv' is not a file: give the path of a CSV file"):
        AvailabilityTrace("nowhere.csv").validate(3)


# --------------------------------------------------------------------------------------------------------- schedules


def test_a_schedule_is_sorted_and_knows_who_comes_later() -> None:
    schedule = MembershipSchedule(joins={1: [3], 9: [0]}, leaves={20: [3]}, crashes={4: [0, 1]})
    schedule.validate(4)
    assert schedule.present_at_start(4).tolist() == [True, True, True, False]
    assert [(change.at, change.client, change.kind) for change in schedule.changes(4, seed=0)] == [
        (1.0, 3, "join"),
        (4.0, 0, "crash"),
        (4.0, 1, "crash"),
        (9.0, 0, "join"),
        (20.0, 3, "leave"),
    ]
    assert list(MembershipSchedule().changes(4, seed=0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crashes": {3: [0], 5: [0]}}, "client 0 has a crash in round 5, but it is away since its crash in round 3"),
        ({"joins": {3: [0], 5: [0]}}, "client 0 has a join in round 5, but it is present since its join in round 3"),
        ({"leaves": {3: [0]}, "crashes": {5: [0]}}, "has a crash in round 5, but it is away since its leave"),
        ({"joins": {3: [2]}, "crashes": {3: [2]}}, "client 2 has a join in round 3, and a crash in the same round"),
        ({"joins": {3: [2, 2]}}, "client 2 has a join in round 3, and a join in the same round"),
        ({"joins": {0: [2]}}, "joins: round 0 must be a whole number of at least 1"),
        ({"leaves": {"two": [2]}}, "leaves: round 'two' must be a whole number"),
        ({"crashes": {2: [-1]}}, r"crashes: \[-1\] of round 2 must be numbers of clients"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MembershipSchedule(**arguments)


def test_a_schedule_for_more_clients_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clients \[5\], but num_clients=4 has clients 0 to 3.*raise num_clients"):
        MembershipSchedule(crashes={2: [5]}).validate(4)


# ------------------------------------------------------------------------------------------------------- from a file


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AlwaysOn", {}),
        ("RandomChurn", {"crash_rate": 0.1, "return_rate": 2.5, "leave_fraction": 0.5, "unit": "seconds"}),
        ("AvailabilityTrace", {"path": "trace.csv", "unit": "rounds"}),
        ("MembershipSchedule", {"joins": {3: [1, 2]}, "leaves": {"5": [1]}, "crashes": None}),
    ],
)
def test_each_class_comes_from_yaml(in_tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    trace(in_tmp_path, "client,from,to\n0,3,8\n")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--availability", type=Availability)
    entry = {"class_path": f"lightning_fed.federation.availability.{name}", "init_args": arguments}
    text = parser.dump(parser.parse_object({"availability": entry}))
    Path("config.yaml").write_text(text)
    parsed = parser.parse_args(["--config=config.yaml"])
    assert parser.dump(parsed) == text
    availability = parser.instantiate_classes(parsed).availability
    assert type(availability).__name__ == name
    written = type(availability)(**arguments)
    assert availability.unit == written.unit
    changes = [list(islice(one.changes(3, seed=0), 20)) for one in (availability, written)]
    assert changes[0] == changes[1]

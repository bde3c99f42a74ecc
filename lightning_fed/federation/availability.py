"""When nodes are there: who joins, leaves or crashes, as a function of (number of clients, seed) alone."""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_fed.checks import check_choice, check_kinds, check_numbers, check_paths, given
from lightning_fed.federation.randomness import Stream, derive_seed
from lightning_fed.federation.tables import read_table

Kind = Literal["join", "leave", "crash"]
Unit = Literal["rounds", "seconds"]
# Where a protocol begins: its first round, or the virtual clock's zero.
START = {"rounds": 1.0, "seconds": 0.0}


@dataclass(frozen=True, order=True)
class MembershipChange:
    """A client comes or goes.

    Attributes:
        at: a round, counted from 1 (20.0: just before the sample of round 20 is drawn), or seconds of the virtual
            clock; see :attr:`Availability.unit`.
        client: its number in the federation.
        kind: ``"join"``: comes online, perhaps again, and says so; ``"leave"``: says goodbye; ``"crash"``: is silent
            from now on.
    """

    at: float
    client: int
    kind: Kind


class Availability(ABC):
    """When the nodes of a federation are online, equal on every rank because it depends on its arguments alone.

    Attributes:
        unit: what ``MembershipChange.at`` counts.
    """

    unit: Unit = "rounds"

    @abstractmethod
    def present_at_start(self, num_clients: int) -> np.ndarray:
        """Who is online before the first change, bool ``[N]``."""

    @abstractmethod
    def changes(self, num_clients: int, seed: int) -> Iterator[MembershipChange]:
        """Who comes and goes, sorted by time, perhaps without end; the same whenever it is asked."""

    def validate(self, num_clients: int) -> None:
        """Refuse a number of clients that does not fit.

        Raises:
            ValueError: naming the setting and the way out.
        """


class AlwaysOn(Availability):
    """Every client is online all the time."""

    def present_at_start(self, num_clients: int) -> np.ndarray:
        return np.ones(num_clients, dtype=bool)

    def changes(self, num_clients: int, seed: int) -> Iterator[MembershipChange]:
        return iter(())


class RandomChurn(Availability):
    """Clients come and go independently; everybody is online at the start.

    Periods are geometric (rounds) or exponential (seconds), so that in the long run a client is online for a share
    ``return_rate / (crash_rate + return_rate)`` of the time.

    Args:
        crash_rate: probability that an online client goes away before a round, or its rate per second; 0: nobody goes.
        return_rate: the same for an offline client's return; 0: nobody comes back.
        leave_fraction: share of the departures that say goodbye; by default all of them are crashes.
        unit: whether the rates are per round or per second.

    Raises:
        ValueError: for a rate out of range.
    """

    def __init__(
        self, crash_rate: float, return_rate: float, leave_fraction: float = 0.0, unit: Unit = "rounds"
    ) -> None:
        check_choice("unit", unit, *START)
        check_numbers(crash_rate=crash_rate, return_rate=return_rate)
        check_numbers("[0, 1]", leave_fraction=leave_fraction)
        most = 1.0 if unit == "rounds" else math.inf
        for name, rate in (("crash_rate", crash_rate), ("return_rate", return_rate)):
            if not 0 <= rate <= most:
                raise ValueError(
                    f"{name}={rate} must be in [0, 1]: it is a probability per round. Use unit='seconds' for a rate."
                    if unit == "rounds"
                    else f"{name}={rate} must be a rate per second, finite and at least 0."
                )
        self.crash_rate = crash_rate
        self.return_rate = return_rate
        self.leave_fraction = leave_fraction
        self.unit = unit

    def present_at_start(self, num_clients: int) -> np.ndarray:
        return np.ones(num_clients, dtype=bool)

    def changes(self, num_clients: int, seed: int) -> Iterator[MembershipChange]:
        return heapq.merge(*(self._changes_of(client, seed) for client in range(num_clients)))

    def _changes_of(self, client: int, seed: int) -> Iterator[MembershipChange]:
        generator = np.random.default_rng(derive_seed(Stream.AVAILABILITY, seed, client))
        at = START[self.unit]
        while True:
            at += self._period(generator, self.crash_rate)
            if math.isinf(at):
                return
            yield MembershipChange(at, client, "leave" if generator.random() < self.leave_fraction else "crash")
            at += self._period(generator, self.return_rate)
            if math.isinf(at):
                return
            yield MembershipChange(at, client, "join")

    def _period(self, generator: np.random.Generator, rate: float) -> float:
        if rate == 0:
            return math.inf
        return float(generator.geometric(rate) if self.unit == "rounds" else generator.exponential(1 / rate))


class AvailabilityTrace(Availability):
    """Recorded online times: a CSV file with the header ``client,from,to`` and one line an interval ``[from, to)``.

    Intervals that overlap or touch are one. A client without a line is offline throughout. Going offline is a crash:
    devices in traces do not say goodbye. What lies before the start (round 1, or second 0) has happened by then.

    Args:
        path: of the file. ``inf`` in the column ``to`` means for ever.
        unit: what ``from`` and ``to`` count.
    """

    def __init__(self, path: str, unit: Unit = "seconds") -> None:
        check_paths(path=path)
        check_choice("unit", unit, *START)
        self.path = path
        self.unit = unit

    def present_at_start(self, num_clients: int) -> np.ndarray:
        start = START[self.unit]
        present = np.zeros(num_clients, dtype=bool)
        for client, intervals in self._intervals(num_clients).items():
            present[client] = any(begin <= start < end for begin, end in intervals)
        return present

    def changes(self, num_clients: int, seed: int) -> Iterator[MembershipChange]:
        found = []
        for client, intervals in self._intervals(num_clients).items():
            for begin, end in intervals:
                found += [MembershipChange(begin, client, "join"), MembershipChange(end, client, "crash")]
        return iter(sorted(change for change in found if START[self.unit] < change.at < math.inf))

    def validate(self, num_clients: int) -> None:
        self._intervals(num_clients)

    def _intervals(self, num_clients: int) -> dict[int, list[tuple[float, float]]]:
        """The online times of each client that has some, sorted and apart."""
        intervals: dict[int, list[tuple[float, float]]] = {}
        for line in read_table("path", self.path, ("client", "from", "to")):
            begin, end = line.values["from"], line.values["to"]
            if begin >= end:
                raise line.error(f"from={begin:g} is not before to={end:g}: an interval ends after it begins.")
            intervals.setdefault(line.client("client", num_clients), []).append((begin, end))
        return {client: merge_intervals(found) for client, found in intervals.items()}


class MembershipSchedule(Availability):
    """Who joins, leaves and crashes in which round, written down.

    A client whose first change is a join is absent at the start, all others are present.

    Args:
        joins: for a round (from 1), the clients that come online just before it.
        leaves: the same for those that say goodbye.
        crashes: the same for those that fall silent.

    Raises:
        ValueError: if the changes of a client contradict each other, or a round or client is out of range.
    """

    def __init__(
        self,
        joins: dict[int, list[int]] | None = None,
        leaves: dict[int, list[int]] | None = None,
        crashes: dict[int, list[int]] | None = None,
    ) -> None:
        self.joins = by_round("joins", joins)
        self.leaves = by_round("leaves", leaves)
        self.crashes = by_round("crashes", crashes)
        kinds: tuple[tuple[Kind, dict[int, list[int]]], ...] = (
            ("join", self.joins),
            ("leave", self.leaves),
            ("crash", self.crashes),
        )
        self._changes = sorted(
            MembershipChange(float(round), client, kind)
            for kind, clients_of_round in kinds
            for round, clients in clients_of_round.items()
            for client in clients
        )
        self._first = check_changes(self._changes)

    def present_at_start(self, num_clients: int) -> np.ndarray:
        return np.array([self._first.get(client) != "join" for client in range(num_clients)])

    def changes(self, num_clients: int, seed: int) -> Iterator[MembershipChange]:
        return iter(self._changes)

    def validate(self, num_clients: int) -> None:
        unknown = sorted(client for client in self._first if client >= num_clients)
        if unknown:
            raise ValueError(
                f"the membership schedule (joins, leaves, crashes) names clients {unknown[:10]}, but num_clients="
                f"{num_clients} has clients 0 to {num_clients - 1}: correct the schedule or raise num_clients."
            )


def merge_intervals(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times as sorted intervals that neither overlap nor touch."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def by_round(setting: str, clients_of_round: dict[int, list[int]] | None) -> dict[int, list[int]]:
    """A schedule with whole numbers as keys: in YAML and on the command line they may arrive as text.

    Raises:
        ValueError: for a round that is not a whole number of at least 1, or a client that is not one of at least 0.
    """
    rounds: dict[int, list[int]] = {}
    check_kinds(Mapping, **given(**{setting: clients_of_round}))
    for key, clients in (clients_of_round or {}).items():
        if not str(key).isdecimal() or int(key) < 1:
            raise ValueError(f"{setting}: round {key!r} must be a whole number of at least 1.")
        check_kinds((list, tuple), **{f"{setting}[{key}]": clients})
        wrong = [client for client in clients if not str(client).isdecimal()]
        if wrong:
            raise ValueError(f"{setting}: {wrong} of round {key} must be numbers of clients, counted from 0.")
        rounds[int(key)] = [int(client) for client in clients]
    return rounds


def check_changes(changes: list[MembershipChange]) -> dict[int, Kind]:
    """The kind of each client's first change.

    Raises:
        ValueError: if a client joins while it is present, goes while it is away, or changes twice before one round.
    """
    first: dict[int, Kind] = {}
    last: dict[int, MembershipChange] = {}
    for change in changes:
        before = last.get(change.client)
        first.setdefault(change.client, change.kind)
        last[change.client] = change
        if before is None:
            continue
        here = f"client {change.client} has a {change.kind} in round {change.at:g}"
        if before.at == change.at:
            raise ValueError(f"{here}, and a {before.kind} in the same round: keep one of them, or move one.")
        if (before.kind == "join") == (change.kind == "join"):
            state = "present" if change.kind == "join" else "away"
            raise ValueError(
                f"{here}, but it is {state} since its {before.kind} in round {before.at:g}: take one of the two out "
                "of joins, leaves and crashes, or add what happens between them."
            )
    return first

"""The server of an elastic federation: the leader averages what the ranks upload, and another one follows if it dies.

Whoever holds the average of a step gives it to a rank that asks for it or uploads its part late. A new leader asks all
ranks before it averages, so an average of its predecessor that has reached anybody is taken over.

Two ranks may live and yet not reach each other. One that does not reach the leader says so through the store, and gets
the average from another rank; the leader goes on without its part. If that happens to most of them, it is the leader
who is cut off, and another one takes over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fed.federation.pair_record import BEFORE_ALL, Step
from lightning_fed.federation.peer_mail import PeerMail, step_of
from lightning_fed.federation.peer_network import Received


@dataclass
class Average:
    """What the leader has made of a round's uploads.

    Attributes:
        round: of the step.
        ranks: whose uploads are in it.
        vector: the weighted mean, on the CPU.
    """

    round: int
    ranks: list[int]
    vector: Tensor


class ElasticServer:
    """One rank's part in averaging.

    Args:
        mail: of this rank.
        send: sends a rank a header and tensors.
    """

    def __init__(self, mail: PeerMail, send: Callable[[int, dict[str, Any], list[Tensor]], None]) -> None:
        self.mail, self._send = mail, send
        self.network, self.events, self.survivors = mail.network, mail.events, mail.survivors
        self._others = [rank for rank in range(self.network.num_ranks) if rank != self.network.rank]
        self._averages: dict[int, Average] = {}  # the newest, by number in the round
        self._obeyed = self.survivors.leader
        self._newest_asked: Step = BEFORE_ALL  # by a leader
        self._wanted: dict[int, Step] = {}  # by ranks that do not reach the leader
        self._wanted_from: set[int] = set()  # by this rank
        self._wants = 0
        self.events.on("part", self._on_part)
        self.events.on("ask", self._on_ask)
        self.events.on("want", self._on_want)
        self.events.on("average", self._on_average)

    def held(self, step: Step) -> Average | None:
        """The average of a step or of a newer one, if it is here."""
        with self.events.changed:
            average = self._averages.get(step[1])
        return average if average is not None and average.round >= step[0] else None

    def agree(self, step: Step, part: list[Tensor], weight: float, like: Tensor) -> Average:
        """Bring this rank's part to the leader, or be the leader.

        Args:
            step: this rank's present one.
            part: the weighted sum of its clients' rows, float64 ``[P]``; empty if none of them takes part.
            weight: the sum of their weights.
            like: a row ``[P]``, of the dtype of the average; also what it is if nobody ever takes part.

        Returns:
            the average of this step, or of a newer one if the others have gone on; of an older one if they have ended.
        """
        header = {"kind": "part", "step": step, "weight": weight}
        with self.events.changed:
            self.mail.forget_before("part", step)
            self.mail.messages.setdefault(("part", step), {})[self.network.rank] = Received(
                self.network.rank, header, part
            )
            self._wanted_from.clear()
        served_by, is_sent, patience = None, False, math.inf
        while True:
            if (average := self.held(step)) is None:
                self.survivors.update()
                if self.survivors.is_over:
                    return self._as_before(step, like)
            with self.events.changed:
                leader = self.survivors.leader
                if (average := self.held(step)) is not None:
                    return average
                # From now on what an earlier leader has sent is refused: the new one counts on that.
                self._obeyed = leader
                lost, was_left_behind = leader in self.mail.lost, self._newest_asked > step
                is_cut_off = leader in self.mail.cut_off
                self.mail.lost.discard(leader)
            if leader == self.network.rank:
                self._serve(step, like)
                continue
            is_sent = is_sent and leader == served_by and not lost
            if not is_sent and not (is_cut_off and self.network.is_sending(leader)):
                self._send(leader, header, part)
                is_sent = True
            patience = min(patience, time.monotonic() + self.network.send_timeout) if was_left_behind else math.inf
            if (is_cut_off and (lost or leader != served_by)) or time.monotonic() > patience:
                self._want(step, leader)
                patience = math.inf
            served_by = leader
            self._await_average(step, leader)

    def _want(self, step: Step, leader: int) -> None:
        """Tell the leader that it cannot be reached, and ask another rank, each time the next one, for the average."""
        with self.events.changed:
            others = [rank for rank in self._others if rank != leader and rank not in self.mail.suspects]
            asked = {leader, others[self._wants % len(others)]} if others else {leader}
            self._wants += 1
            self._wanted_from |= asked
        for rank in sorted(asked):
            self.network.note(rank, {"kind": "want", "step": step})

    def _await_average(self, step: Step, leader: int) -> None:
        """Wait until there is an average, or a reason to ask for it again, but not too long to see who leads."""
        self.events.wait_for(
            lambda: self.held(step) is not None or leader in self.mail.lost or self._obeyed != leader,
            self.survivors.ping_timeout,
        )

    def _serve(self, step: Step, like: Tensor) -> None:
        """Wait for the parts of all that live, or for the average that an earlier leader has left with one of them."""
        for rank in self._others:
            self.network.note(rank, {"kind": "ask", "step": step})

        def missing() -> set[int]:
            with self.events.changed:
                return set(self._others) - self.mail.messages[("part", step)].keys() - self.mail.suspects

        while not self.events.wait_for(lambda: not missing() or self.held(step) is not None, self.mail.look_interval):
            self.mail.look_after(missing())
            self.survivors.update()
            if not self.survivors.is_leader:
                return
        self.survivors.update()  # a rank that was stopped here does not lead any more
        with self.events.changed:
            if not self.survivors.is_leader or (self.held(step) is None and self._gives_way(step)):
                return
            if self.held(step) is None:
                self._averages[step[1]] = self._average_of(self.mail.messages[("part", step)], step, like)
            average, living = self._averages[step[1]], set(self._others) - self.mail.suspects
        for rank in sorted(living):
            self._send_average(rank, step[1], average)
        with self.events.changed:
            self._grant()

    def _gives_way(self, step: Step) -> bool:
        """Hand over to a rank that lives but is not reached, if there are more of those than of the others."""
        unreached = sorted(
            rank for rank, wanted in self._wanted.items() if wanted >= step and rank in self.mail.suspects
        )
        if len(unreached) <= len(self.mail.messages[("part", step)]):
            return False
        self._wanted.clear()
        self.survivors.hand_over(unreached[0])
        return True

    def _average_of(self, parts: dict[int, Received], step: Step, like: Tensor) -> Average:
        ranks = [rank for rank in sorted(parts) if parts[rank].tensors]
        if not ranks:  # nobody of the cohort lives
            return self._as_before(step, like)
        total = torch.zeros_like(like, dtype=torch.float64)
        for rank in ranks:
            total += parts[rank].tensors[0].to(total.device)
        weight = float(np.sum([parts[rank].header["weight"] for rank in ranks]))
        return Average(step[0], ranks, (total / weight).to(like.dtype).cpu())

    def _as_before(self, step: Step, like: Tensor) -> Average:
        """The server keeps what it has, at first the common initial model."""
        earlier = self._averages.get(step[1])
        return Average(step[0], [], like.cpu().clone() if earlier is None else earlier.vector)

    def _send_average(self, rank: int, number: int, average: Average) -> None:
        header = {"kind": "average", "step": (average.round, number), "ranks": average.ranks}
        self._send(rank, header, [average.vector])

    def _grant(self) -> None:
        """Send averages to those that have asked for them in vain."""
        for rank, wanted in list(self._wanted.items()):
            if (average := self.held(wanted)) is not None:
                del self._wanted[rank]
                self._send_average(rank, wanted[1], average)

    # Messages, on the thread of the events.

    def _on_part(self, message: Received) -> None:
        if not self._answered(message):
            self.mail.keep(message)

    def _on_ask(self, message: Received) -> None:
        self._obeyed = message.sender
        self._newest_asked = max(self._newest_asked, step_of(message))
        self._answered(message)

    def _on_want(self, message: Received) -> None:
        self._wanted[message.sender] = step_of(message)
        self._grant()
        if self.survivors.is_leader:  # until something comes from there, nothing is waited for
            self.mail.suspects.add(message.sender)

    def _answered(self, message: Received) -> bool:
        """Send a rank that asks for an average, or sends a part of it, the average; if there is one."""
        self.mail.heard(message)
        average = self.held(step_of(message))
        if average is not None:
            self._send_average(message.sender, step_of(message)[1], average)
        return average is not None

    def _on_average(self, message: Received) -> None:
        self.mail.heard(message)
        step = step_of(message)
        is_obeyed = self._obeyed in (message.sender, self.network.rank)
        if (is_obeyed or message.sender in self._wanted_from) and self.held(step) is None:
            self._averages[step[1]] = Average(step[0], message.header["ranks"], message.tensors[0])
            self._grant()

"""How many clients train in one step: as many as asked for, or as many as turn out fastest on this machine."""

from __future__ import annotations

import time
from statistics import median
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

CANDIDATES = (1, 8, 32, 128)
# Joint steps for each candidate, the first of which warms up and is not counted.
JOINT_STEPS_TO_MEASURE = 4


class ClientsPerStep:
    """The number of clients that the next joint step trains together.

    With ``"auto"`` the first joint steps of a fit try some numbers in turn; the fastest stays. The numbers give the
    same model up to rounding, so which one wins does not matter to it beyond that.

    Args:
        setting: ``clients_per_step`` of the strategy.
        device: which does the work.
    """

    def __init__(self, setting: int | Literal["auto"], device: torch.device) -> None:
        self.device = device
        self.is_decided = setting != "auto"
        self._number = 1 if setting == "auto" else setting
        self._seconds: dict[int, list[float]] = {}
        self._begin = 0.0

    def begin(self, num_parts: int) -> int:
        """How many clients the joint step that begins now should train together.

        Args:
            num_parts: how many clients take part in it.
        """
        if not self.is_decided:
            candidates = [number for number in CANDIDATES if number == 1 or number < 2 * num_parts]
            self._number = min(candidates, key=lambda number: len(self._seconds.get(number, ())))
            self._begin = self._now()
        return self._number

    def end(self, num_parts: int) -> None:
        """The joint step is over. Decides when every candidate has been measured."""
        if self.is_decided or num_parts < 2:
            return
        self._seconds.setdefault(self._number, []).append((self._now() - self._begin) / num_parts)
        if all(len(seconds) >= JOINT_STEPS_TO_MEASURE for seconds in self._seconds.values()) and len(self._seconds) > 1:
            self._decide()

    def give_up(self, why: str) -> None:
        """Train clients one by one from now on."""
        self.is_decided, self._number = True, 1
        rank_zero_info(f'clients_per_step="auto" trains clients one by one: {why}.')

    def _decide(self) -> None:
        taken = {number: 1e3 * median(seconds[1:]) for number, seconds in self._seconds.items()}
        self.is_decided, self._number = True, min(taken, key=taken.__getitem__)
        rank_zero_info(
            f'clients_per_step="auto" goes on with {self._number}. Milliseconds a client\'s local step: '
            + ", ".join(f"{number}: {milliseconds:.3g}" for number, milliseconds in sorted(taken.items()))
            + "."
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

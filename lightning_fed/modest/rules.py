"""The settings of the protocol, and what they mean for an aggregator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_fed.checks import check_choice, check_counts, check_numbers, check_seconds, given

# In rounds: the class default of the code of 2023.
DEFAULT_WINDOW = 50
# In w rounds a node is not asked at all with probability (1 - s/N)^w < exp(-w s/N). So in N / s (ln N + 5) rounds
# any of N nodes is not asked with probability below exp(-5).
CERTAINTY = 5


@dataclass(frozen=True)
class Rules:
    """The settings of the protocol, the same on every node; see ``MoDeSTStrategy`` for where defaults come from."""

    sample_size: int
    num_aggregators: int
    success_fraction: float
    success_rounding: Literal["up", "down"]
    aggregation_timeout: float | None
    min_models: int
    ping_timeout: float
    activity_window: int | None
    restart_timeout: float

    def __post_init__(self) -> None:
        check_counts(sample_size=self.sample_size, num_aggregators=self.num_aggregators)
        check_counts(min_models=self.min_models, **given(activity_window=self.activity_window))
        check_choice("success_rounding", self.success_rounding, "up", "down")
        if self.num_aggregators > self.sample_size:
            raise ValueError(
                f"num_aggregators={self.num_aggregators} is larger than sample_size={self.sample_size}: aggregators "
                "are the first nodes of the sample, so choose at most as many."
            )
        check_numbers("(0, 1]", success_fraction=self.success_fraction)
        check_seconds(ping_timeout=self.ping_timeout, restart_timeout=self.restart_timeout)
        check_seconds(**given(aggregation_timeout=self.aggregation_timeout))

    def window(self, num_clients: int) -> int:
        """The activity window: as set; else 50 rounds, or more where living nodes would wait longer for their turn."""
        if self.activity_window is not None:
            return self.activity_window
        turns = math.log(num_clients) + CERTAINTY
        return max(DEFAULT_WINDOW, math.ceil(turns * num_clients / self.sample_size))

    def models_needed(self, sample_size: int) -> int:
        """How many trained models an aggregator waits for, if its sample was of that size."""
        share = min(sample_size, self.sample_size) * self.success_fraction
        # Products such as 10 * 0.7 may miss their integer by a rounding error.
        return max(math.ceil(share - 1e-9) if self.success_rounding == "up" else math.floor(share + 1e-9), 1)

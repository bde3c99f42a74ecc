"""A sampler for rounds whose cohort is not known beforehand: other ranks say who trains, while the round goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

from lightning_fed.federation.sampler import ClientBatchSampler, JointBatch


class TaskSampler(ClientBatchSampler):
    """Yields joint steps for the clients of this rank that are asked to train, until the round is over.

    A loader asks for batches before earlier ones are trained. So after each task come as many empty joint steps as it
    may ask for beforehand, and only then does the sampler wait for the next task: what it waits for may depend on what
    was trained.

    Args:
        take: waits for clients that should train in a round; None when the round is over.
        lookahead: batches that the loader fetches before they are trained.
        **plan: see :class:`~lightning_fed.federation.sampler.ClientBatchSampler`.
    """

    def __init__(self, take: Callable[[int], list[int] | None], lookahead: int, **plan: Any) -> None:
        super().__init__(**plan)
        self.take = take
        self.lookahead = lookahead

    def __iter__(self) -> Iterator[JointBatch]:
        round, index = self.next_position()[0], 0
        while (clients := self.take(round)) is not None:
            for step in chain(self.minibatches(clients, round), repeat(([], None), self.lookahead)):
                yield JointBatch(round, index, False, *step)
                index += 1
        yield JointBatch(round, index, True, [])

    def __len__(self) -> int:
        raise TypeError("how many joint steps a round has is not known beforehand")

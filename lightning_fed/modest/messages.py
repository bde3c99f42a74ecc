"""What nodes send each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_fed.modest.membership import View

# Of a ping, a pong or an announcement: its numbers.
SMALL_MESSAGE_BYTES = 16


@dataclass
class Message:
    """What nodes send each other.

    Attributes:
        round: the round that a model belongs to; in a ping, pong or announcement the sender's estimate of the present.
        phase: the round of training whose cost the message is.
    """

    round: int
    phase: int


@dataclass
class Ping(Message):
    """Asks whether a node is there; ``search`` comes back in the answer."""

    search: int


@dataclass
class Pong(Message):
    """Answers a ping."""

    search: int


@dataclass
class Announcement(Message):
    """A node joins or leaves; the ``counter`` counts its announcements."""

    counter: int
    joins: bool


@dataclass
class ModelMessage(Message):
    """A model and the sender's view.

    Attributes:
        model: of a type that only the environment knows.
        view: a copy.
        sample_size: nodes that were found for the sample in which the model was, or is going to be, trained.
        attempt: 0, or the number of a restart.
    """

    model: Any
    view: View
    sample_size: int
    attempt: int


@dataclass
class TrainedModel(ModelMessage):
    """From a participant of round ``round - 1`` to an aggregator of ``round``."""


@dataclass
class AggregatedModel(ModelMessage):
    """From an aggregator of ``round`` to its sample."""

"""What a node needs from the world, which is a simulation or a network of real processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from lightning_fed.modest.messages import Message


class Timer(Protocol):
    """A callback that is due in the future."""

    def cancel(self) -> None:
        """Forget it."""


class Environment(ABC):
    """What a node needs from the world: transport, time, training, arithmetic."""

    seed: int

    @abstractmethod
    def send(self, sender: int, receiver: int, message: Message) -> None:
        """Deliver a message, sooner or later or never; to oneself at once."""

    @abstractmethod
    def call_later(self, client: int, seconds: float, callback: Callable[[], None], phase: int | None) -> Timer:
        """Call back in so many seconds, unless the node has gone offline; ``phase`` as in a message, None for none."""

    @abstractmethod
    def train(self, client: int, round: int, model: Any) -> None:
        """Train, then call the node's :meth:`Node.trained`. Cancels what the client trains at present."""

    @abstractmethod
    def average(self, aggregator: int, round: int, models: dict[int, Any]) -> Any:
        """The uniform mean of trained models, by sender: the aggregated model of ``round``."""

    def is_suspected(self, client: int) -> bool:
        """Whether there is no point in asking a node, because what hosts it has been silent; not known by default."""
        return False

    def ping_timed_out(self, client: int, phase: int) -> None:
        """A node did not answer in time."""

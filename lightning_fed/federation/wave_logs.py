"""What ``self.log`` means while a step runs for a wave of clients: each call logs a value of each client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_fed.federation.client_logs import ClientLogs
from lightning_fed.federation.stacked_batch import StackedBatch
from lightning_fed.federation.vectorization import CannotVectorize


class WaveLogs:
    """Records the calls of ``self.log`` under vmap, and hands them on when the values of all clients are there.

    Args:
        logs: which log clients one by one.
        is_quiet: log nothing.

    Attributes:
        tensors: what was logged, of one client, in the order of the calls. They must come out of vmap.
    """

    def __init__(self, logs: ClientLogs, is_quiet: bool = False) -> None:
        self.logs = logs
        self.is_quiet = is_quiet
        self.begin()

    def begin(self) -> None:
        """Forget what was recorded."""
        self.tensors: list[Tensor] = []
        self._calls: list[tuple[str, int | None, Any, tuple[Any, ...], dict[str, Any]]] = []
        self._values: Sequence[Tensor] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, ``self.log`` of the module is recorded."""
        attributes = self.logs.module.__dict__
        attributes["log"] = self.logs.ignored if self.is_quiet else self._record
        try:
            yield
        finally:
            del attributes["log"]

    def _record(self, name: str, value: Any, *args: Any, **settings: Any) -> None:
        if isinstance(value, Metric):
            raise CannotVectorize(
                f"self.log({name!r}, ...) logs a {type(value).__name__}, whose state would mix the clients of a wave: "
                "log a tensor (for example of torchmetrics.functional)"
            )
        if isinstance(settings.get("batch_size"), Tensor):
            raise CannotVectorize(
                f"self.log({name!r}, ..., batch_size=...) is given a tensor, which would be that of all clients of the "
                "wave: give it a number"
            )
        if isinstance(value, Tensor):
            self.tensors.append(value.detach().reshape(()) if value.numel() == 1 else value.detach())
            self._calls.append((name, len(self.tensors) - 1, None, args, settings))
        else:
            self._calls.append((name, None, value, args, settings))

    def fill(self, values: Sequence[Tensor]) -> None:
        """Take the values of all clients, each ``[M]``."""
        self._values = values

    def publish(self, batch: StackedBatch, clients: Sequence[int]) -> None:
        """Log what was recorded, for every client."""
        if not self._calls:
            return
        with self.logs.capture(batch.first(), clients=clients):
            for name, number, value, args, settings in self._calls:
                self.logs.log(name, value if number is None else self._values[number], *args, **settings)

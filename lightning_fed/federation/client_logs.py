"""What ``self.log`` means when one module is many clients on many ranks.

Inside a step hook, ``self.log`` of the user's module is caught: a step value becomes the mean over this rank's clients,
an epoch value the mean over all clients of all ranks (weighted by batch size, as Lightning weights batches). Names stay
the user's. Ranks may have logged different things, or nothing: what is published is the union, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torchmetrics import Metric

REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": torch.add,
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


@dataclass
class LogEntry:
    """One name logged in an epoch: a running value, or the attribute of a torchmetrics object."""

    reduction: str
    prog_bar: bool
    logger: bool
    also_on_step: bool
    value: Tensor | None = None
    weight: float = 0.0
    metric_attribute: str | None = None

    def add(self, value: Tensor, weight: float) -> None:
        """Take one more logged value into account."""
        self._accumulate(value * weight if self.reduction == "mean" else value, weight)

    def merge(self, other: LogEntry) -> None:
        """Take into account what another rank has logged under the same name."""
        if other.value is not None:
            self._accumulate(other.value, other.weight)

    def _accumulate(self, value: Tensor, weight: float) -> None:
        if self.value is not None:
            value = REDUCTIONS[self.reduction](self.value, value.to(self.value.device))
        self.value = value
        self.weight += weight

    def result(self) -> Tensor:
        assert self.value is not None
        return self.value / self.weight if self.reduction == "mean" else self.value

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**vars(self), "value": None if self.value is None else float(self.value)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> LogEntry:
        """Inverse of :meth:`to_plain`."""
        value = plain["value"]
        return cls(**{**plain, "value": None if value is None else torch.tensor(value, dtype=torch.float64)})


Logs = dict[str, LogEntry]


def ignore_log(*args: Any, **kwargs: Any) -> None:
    """A ``self.log`` that logs nothing."""


@dataclass
class ClientLogs:
    """Catches ``self.log`` of one module in one step hook.

    Args:
        module: the user's module.
        on_step: Lightning's default of ``on_step`` in this hook.
        on_epoch: likewise.
        per_client: log the epoch values of each client beside the mean, as ``name/client_3``.

    Attributes:
        entries: what the epoch has logged so far.
        last_step: the newest step values of the epoch, by the names under which they were published. Lightning shows
            them until there are newer ones, also in joint steps in which this rank has nothing to do.
        resumed_step: likewise, of the run that this one resumes, until they are published.
    """

    module: LightningModule
    on_step: bool
    on_epoch: bool
    per_client: bool = False
    entries: Logs = field(default_factory=dict)
    last_step: Logs = field(default_factory=dict)
    resumed_step: Logs = field(default_factory=dict)
    _step_values: dict[str, tuple[list[Tensor], LogEntry]] = field(default_factory=dict)
    _batch: Any = None
    _clients: Sequence[int] = ()
    _suffix: str = ""

    def __post_init__(self) -> None:
        # Dynamo would trace into the bookkeeping, and compile the user's step anew whenever a sum has changed.
        compiled = getattr(self.module, "_compiler_ctx", None) is not None
        self._caught = torch.compiler.disable(self.log) if compiled else self.log
        self.ignored = torch.compiler.disable(ignore_log) if compiled else ignore_log

    def capture(self, batch: Any, suffix: str = "", clients: Sequence[int] = ()) -> ClientLogs:
        """A context that catches ``self.log`` while a step runs.

        Args:
            batch: the step's, of one client.
            suffix: the data loader's.
            clients: whose step it is, if that of clients.
        """
        self._batch, self._suffix, self._clients = batch, suffix, clients
        return self

    def __enter__(self) -> None:
        self.module.__dict__["log"] = self._caught

    def __exit__(self, *error: object) -> None:
        del self.module.__dict__["log"]
        self._batch = None

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """What ``self.log`` does meanwhile; ``value`` may be ``[M]`` if the step is that of a wave."""
        on_step = self.on_step if on_step is None else on_step
        on_epoch = self.on_epoch if on_epoch is None else on_epoch
        reduction = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", str(reduce_fx))
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"self.log({name!r}, reduce_fx={reduction}) cannot be reduced over clients: use one of "
                f"{sorted(REDUCTIONS)}."
            )
        name += self._suffix if add_dataloader_idx else ""
        entry = LogEntry(reduction, prog_bar, logger is not False, on_step and on_epoch)
        scalar = value._forward_cache if isinstance(value, Metric) else value
        if on_step and scalar is not None:
            scalar = torch.as_tensor(scalar, device=self.module.device).detach()
            scalar = scalar.reshape(()) if scalar.numel() == 1 else scalar
            scalars = scalar.expand(len(self._clients)).unbind() if len(self._clients) > 1 else [scalar]
            self._step_values.setdefault(name, ([], entry))[0].extend(scalars)
        if on_epoch:
            entry = self.entries.setdefault(name, entry)
            if isinstance(value, Metric):
                entry.metric_attribute = metric_attribute or self._attribute_of(value)
            else:
                weight = 1 if reduction != "mean" else batch_size or extract_batch_size(self._batch)
                value = torch.as_tensor(value, device=self.module.device).detach().double()
                if self.per_client:
                    self._take_apart(name, value, weight, entry)
                if len(self._clients) > 1:
                    value = getattr(value.expand(len(self._clients)), reduction)()
                    weight *= len(self._clients)
                entry.add(value, weight)

    def _take_apart(self, name: str, value: Tensor, weight: int, entry: LogEntry) -> None:
        """Keep the clients' values beside their mean."""
        for client, own in zip(self._clients, value.expand(len(self._clients)) if len(self._clients) > 1 else [value]):
            beside = LogEntry(entry.reduction, False, entry.logger, False)
            self.entries.setdefault(f"{name}/client_{client}", beside).add(own, weight)

    def _attribute_of(self, metric: Metric) -> str:
        for name, candidate in self.module.named_modules():
            if candidate is metric:
                return name
        raise ValueError(f"a {type(metric).__name__} was logged that is no attribute of {type(self.module).__name__}.")

    def publish_step(self) -> None:
        """Log this joint step's values: means over the clients of this rank."""
        step, self.resumed_step = self.resumed_step, {}
        for name, (values, entry) in self._step_values.items():
            name = f"{name}_step" if entry.also_on_step else name
            mean = torch.stack(values).float().mean() if len(values) > 1 else values[0]
            step[name] = replace(entry, value=mean)
        for name, entry in step.items():
            self._publish(name, entry.value, entry, on_step=True)
        self.last_step |= step
        self._step_values = {}

    def publish_epoch(self, gather: Callable[[Logs], list[Logs]]) -> None:
        """Log the epoch's values, reduced over all ranks. Every rank calls it, whatever it has logged.

        Args:
            gather: returns what all ranks have logged, in rank order.
        """
        ranks, self.entries, self.last_step = gather(self.entries), {}, {}
        merged: Logs = {}
        for entries in ranks:
            for name, entry in entries.items():
                if name in merged:
                    merged[name].merge(entry)
                else:
                    merged[name] = entry
        for name, entry in merged.items():
            value: Any = attrgetter(entry.metric_attribute)(self.module) if entry.metric_attribute else entry.result()
            if entry.also_on_step:
                self._publish(f"{name}_epoch", value, entry, on_step=False)
                entry = LogEntry(entry.reduction, False, False, False, metric_attribute=entry.metric_attribute)
            self._publish(name, value, entry, on_step=False)

    def _publish(self, name: str, value: Any, entry: LogEntry, on_step: bool) -> None:
        if isinstance(value, Tensor):
            value = value.to(self.module.device, torch.float32)
        self.module.log(
            name,
            value,
            prog_bar=entry.prog_bar,
            logger=entry.logger,
            on_step=on_step,
            on_epoch=not on_step,
            add_dataloader_idx=False,
            batch_size=1,
            metric_attribute=entry.metric_attribute if isinstance(value, Metric) else None,
        )

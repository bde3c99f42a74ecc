"""What an epoch has logged so far on a rank: it belongs to no client, and a run that resumes goes on with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric

from lightning_fed.federation.client_logs import LogEntry

if TYPE_CHECKING:
    from lightning_fed.federation.local_step import LocalStep


class EpochSums(ABC):
    """A callback that adds something up in an epoch, on each rank for itself."""

    @property
    @abstractmethod
    def state_key(self) -> str:
        """As Lightning's callbacks have it."""

    @abstractmethod
    def running_sums(self) -> Any:
        """What has been added up so far, as plain values and tensors."""

    @abstractmethod
    def add_running_sums(self, sums: Any) -> None:
        """Take what an interrupted run had added up into account."""


def saved_values(local_step: LocalStep) -> dict[str, Any] | None:
    """What a checkpoint keeps of the epoch: in validation as it was before, and nothing when the epoch is over."""
    if local_step.epoch_is_over:
        return None
    if local_step.module.trainer.validating:
        return local_step.values_before_validation
    take_running_values(local_step)
    return running_values(local_step)


def running_values(local_step: LocalStep) -> dict[str, Any]:
    """Sums and newest step values of ``self.log``, and states of torchmetrics objects, as plain values and tensors."""
    return {
        "logs": {name: entry.to_plain() for name, entry in local_step.logs.entries.items()},
        "step": {name: entry.to_plain() for name, entry in local_step.logs.last_step.items()},
        "metrics": {
            name: {**metric._copy_state_dict(), "_update_count": metric._update_count}
            for name, metric in metrics_of(local_step)
        },
        "callbacks": {callback.state_key: callback.running_sums() for callback in summing_callbacks(local_step)},
    }


def take_running_values(local_step: LocalStep) -> None:
    """Go on with what an interrupted run has saved of the epoch, if that has not happened yet."""
    while local_step.running_values:
        add_running_values(local_step, local_step.running_values.pop(0))


def add_running_values(local_step: LocalStep, values: dict[str, Any]) -> None:
    """Go on with what a rank had logged; with that of several ranks, if they were more than now."""
    local_step.logs.resumed_step = {name: LogEntry.from_plain(plain) for name, plain in values["step"].items()}
    entries = local_step.logs.entries
    for name, plain in values["logs"].items():
        entry = LogEntry.from_plain(plain)
        if name in entries:
            entry.merge(entries[name])
        entries[name] = entry
    for name, metric in metrics_of(local_step):
        state = values["metrics"].get(name)
        if state is not None and state["_update_count"]:
            add_state(metric, state)
    for callback in summing_callbacks(local_step):
        if callback.state_key in values["callbacks"]:
            callback.add_running_sums(values["callbacks"][callback.state_key])


def metrics_of(local_step: LocalStep) -> list[tuple[str, Metric]]:
    """The module's torchmetrics objects, by name."""
    return [(name, part) for name, part in local_step.module.named_modules() if isinstance(part, Metric)]


def summing_callbacks(local_step: LocalStep) -> list[EpochSums]:
    """The Trainer's callbacks that add something up."""
    return [callback for callback in local_step.module.trainer.callbacks if isinstance(callback, EpochSums)]  # type: ignore[attr-defined]


def add_state(metric: Metric, state: dict[str, Any]) -> None:
    """Take what another object of the class has accumulated into account, before what this one has."""
    count = state["_update_count"]
    theirs = {name: moved(state[name], metric) for name in metric._defaults}
    if metric._update_count:
        metric._update_count += count
        metric._reduce_states(theirs)
    else:
        metric.__dict__.update(theirs, _update_count=count)
    metric._computed = None


def moved(value: Any, metric: Metric) -> Any:
    """A state on the device of its metric."""
    return value.to(metric.device) if isinstance(value, Tensor) else [part.to(metric.device) for part in value]

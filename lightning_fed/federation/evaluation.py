"""What ``validate`` and ``test`` measure: the consensus model, every client's own model, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler
from torchmetrics import Metric

from lightning_fed.federation.client_logs import ClientLogs
from lightning_fed.federation.sampler import loading_of

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy


class RankShard(Sampler[int]):
    """Every ``num_ranks``-th sample, none repeated (unlike ``DistributedSampler``, whose padding changes metrics)."""

    def __init__(self, num_samples: int, num_ranks: int, rank: int) -> None:
        self.samples = range(rank, num_samples, num_ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def shard_for_evaluation(loader: DataLoader[Any], num_ranks: int, rank: int, evaluate: str) -> DataLoader[Any]:
    """Let the ranks share the samples of an evaluation loader.

    A loader stays whole if every rank needs all of it (its clients are evaluated), if it has an order of its own, or if
    it has fewer samples than there are ranks.
    """
    plain_order = type(loader.sampler) in (SequentialSampler, DistributedSampler)
    if num_ranks == 1 or evaluate != "consensus" or not plain_order or loader.batch_size is None:
        return loader
    size = len(loader.dataset)  # type: ignore[arg-type]
    if size < num_ranks:
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=RankShard(size, num_ranks, rank),
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        **loading_of(loader),
    )


class Evaluation:
    """Runs the user's ``validation_step`` or ``test_step`` for the models that are asked for, and publishes the logs.

    Names are the user's. With ``evaluate="clients"`` a name is the mean over clients; the spread is logged beside it as
    ``<name>/clients_min`` and ``<name>/clients_max``; with ``"both"`` the name is the consensus model's and the
    clients' mean is ``<name>/clients_mean``. On each client's own held-out split (a training data set with
    ``client_eval_indices``): ``<name>/own_split_mean``, ``_min``, ``_max``.

    Args:
        strategy: the federation.
        module: the user's module.
    """

    def __init__(self, strategy: FederatedStrategy, module: LightningModule) -> None:
        self.strategy = strategy
        self.module = module
        self.logs = ClientLogs(module, on_step=False, on_epoch=True)
        self.metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
        self._client_logs: dict[int, ClientLogs] = {}
        self._metric_states: dict[int, list[dict[str, Any]]] = {}
        self._step: Callable[..., Any] | None = None

    def step(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """One evaluation batch; returns the consensus model's output, or None where it is not asked for."""
        strategy, output, self._step = self.strategy, None, step
        suffix = self._dataloader_suffix(args)
        if strategy.evaluate != "clients" and self._is_my_turn(args):
            with self.logs.capture(batch, suffix):
                output = step(batch, *args, **kwargs)
        if strategy.evaluate != "consensus":
            for client in strategy.exchange.clients:
                with self._as_client(client), self._logs_of(client).capture(batch, suffix):
                    step(batch, *args, **kwargs)
        return output

    def publish(self) -> None:
        """Log the epoch; a collective call."""
        evaluate = self.strategy.evaluate
        if evaluate != "consensus":
            self._publish_clients("" if evaluate == "clients" else "/clients_mean", "/clients_min", "/clients_max")
            own = getattr(self._training_dataset(), "client_eval_indices", None)
            if own is not None and self._step is not None:
                self._evaluate_own_splits(own)
                self._publish_clients("/own_split_mean", "/own_split_min", "/own_split_max")
        self.logs.publish_epoch(self.strategy.gather_logs)

    def _logs_of(self, client: int) -> ClientLogs:
        return self._client_logs.setdefault(client, ClientLogs(self.module, on_step=False, on_epoch=True))

    def _is_my_turn(self, args: tuple[Any, ...]) -> bool:
        """Whether this rank evaluates the consensus model on this batch: of whole loaders, ranks take turns."""
        strategy = self.strategy
        if strategy.world_size == 1 or strategy.evaluate == "consensus":
            return True
        batch_index = int(args[0]) if args else 0
        return batch_index % strategy.world_size == strategy.global_rank

    def _dataloader_suffix(self, args: tuple[Any, ...]) -> str:
        return f"/dataloader_idx_{args[1]}" if len(args) > 1 else ""

    @contextmanager
    def _as_client(self, client: int) -> Iterator[None]:
        """The module and its torchmetrics objects become one client's."""
        bank = self.strategy.bank
        shared = [metric_state(metric) for metric in self.metrics]
        for metric, state in zip(self.metrics, self._metric_states.get(client, [])):
            metric.__dict__.update(state)
        if client not in self._metric_states:
            for metric in self.metrics:
                metric.__dict__.update(fresh_state(metric))
        bank.bind_client(client)
        try:
            yield
        finally:
            self._metric_states[client] = [metric_state(metric) for metric in self.metrics]
            for metric, state in zip(self.metrics, shared):
                metric.__dict__.update(state)
            bank.bind_consensus()

    def _publish_clients(self, mean: str, minimum: str, maximum: str) -> None:
        """Log mean, minimum and maximum over clients under the user's names with these endings."""
        mine = [(client, self._client_values(client)) for client in self._client_logs]
        everyone = {client: values for rank in self.strategy.gather_plain(mine) for client, values in rank}
        names = dict.fromkeys(name for client in sorted(everyone) for name in everyone[client])
        for name in names:
            values = np.array([everyone[client][name] for client in sorted(everyone) if name in everyone[client]])
            for ending, value in ((mean, values.mean()), (minimum, values.min()), (maximum, values.max())):
                self.module.log(name + ending, float(value), on_epoch=True, add_dataloader_idx=False, batch_size=1)
        self._client_logs, self._metric_states = {}, {}

    def _client_values(self, client: int) -> dict[str, float]:
        values = {}
        with self._as_client(client):
            for name, entry in self._client_logs[client].entries.items():
                if entry.metric_attribute is None:
                    values[name] = float(entry.result())
                    continue
                metric = attrgetter(entry.metric_attribute)(self.module)
                # One client's value: without the merging over ranks that torchmetrics does by default.
                with metric.sync_context(should_sync=False):
                    metric._to_sync, to_sync = False, metric._to_sync
                    result = metric.compute()
                    metric._to_sync, metric._computed = to_sync, None
                if isinstance(result, torch.Tensor) and result.numel() == 1:
                    values[name] = float(result)
        return values

    def _training_dataset(self) -> Any:
        loader = self.module.trainer.train_dataloader
        return getattr(getattr(loader, "dataset", None), "dataset", None)

    def _evaluate_own_splits(self, indices: list[np.ndarray]) -> None:
        """Every client's model on the part of its own shard that it does not train on."""
        strategy, joint = self.strategy, self.module.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        batch_size = strategy.sampler.work.batch_size
        assert self._step is not None
        for client in strategy.exchange.clients:
            samples = torch.as_tensor(np.asarray(indices[client]), dtype=torch.int64)
            for number, chunk in enumerate(samples.split(batch_size) if len(samples) else ()):
                batch = strategy.batch_to_device(joint.load(chunk))
                with self._as_client(client), self._logs_of(client).capture(batch):
                    self._step(batch, number)


def metric_state(metric: Metric) -> dict[str, Any]:
    """What a torchmetrics object has accumulated, by reference."""
    names = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    return {name: metric.__dict__[name] for name in names if name in metric.__dict__}


def fresh_state(metric: Metric) -> dict[str, Any]:
    """The state of the same object before its first update, in new tensors and lists."""
    state: dict[str, Any] = {"_update_count": 0, "_computed": None, "_forward_cache": None}
    for name, default in metric._defaults.items():
        state[name] = [] if isinstance(default, list) else default.detach().clone().to(metric.device)
    return state

"""Which samples which client trains on, in which order: rounds as a stream of joint batches.

One Lightning batch is one *joint* step: a minibatch for every client of the cohort on this rank. The plan of a round is
a function of (seed, round) that every rank can compute for all clients, so all ranks agree on the number of joint steps
without talking, and a resumed run continues where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from lightning_fed.federation.participation import Participation
from lightning_fed.federation.randomness import Stream, derive_seed, permutation, seed_generators


@dataclass
class ClientBatch:
    """One client's minibatch in a joint step.

    Attributes:
        client: the client's number in the federation.
        index: number of this minibatch in the client's round, from 0.
        steps_optimizer: False while gradients are still being accumulated.
        weight: share of this rank's slice in the client's minibatch (1 unless ``ranks_per_client > 1``).
        batch: what the user's collate function returned (or, before loading, the sample numbers).
    """

    client: int
    index: int
    steps_optimizer: bool
    weight: float
    batch: Any


@dataclass
class JointBatch:
    """One joint step: what Lightning passes around as ``batch`` during training.

    Attributes:
        round: the round that this step belongs to.
        index: number of the joint step in its round, from 0.
        is_last_of_round: communication follows.
        parts: the minibatches of this rank's clients; empty if none of them has work left in this round.
    """

    round: int
    index: int
    is_last_of_round: bool
    parts: list[ClientBatch]


@dataclass(frozen=True)
class LocalWork:
    """How much a client does in a round, and in what pieces.

    Attributes:
        batch_size: samples a minibatch of one rank; a client on several ranks takes that many on each.
        local_epochs: passes over the client's shard, if ``local_steps`` is None.
        local_steps: optimizer steps, running on through the shard from round to round.
        accumulate: minibatches an optimizer step (the Trainer's ``accumulate_grad_batches``).
        shuffle: draw a new order for every pass; else the shard's own order.
        drop_last: leave out a pass's last, smaller minibatch.
        ranks_per_client: slices that a minibatch is cut into.
        replica: the slice of this rank.
    """

    batch_size: int
    local_epochs: int = 1
    local_steps: int | None = None
    accumulate: int = 1
    shuffle: bool = True
    drop_last: bool = False
    ranks_per_client: int = 1
    replica: int = 0

    @property
    def client_batch_size(self) -> int:
        return self.batch_size * self.ranks_per_client

    def batches_per_pass(self, samples: int) -> int:
        whole, rest = divmod(samples, self.client_batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def batches_per_round(self, samples: int) -> int:
        if self.local_steps is not None:
            return self.local_steps * self.accumulate
        return self.local_epochs * self.batches_per_pass(samples)

    def optimizer_steps_per_round(self, samples: int) -> int:
        return math.ceil(self.batches_per_round(samples) / self.accumulate)

    def rounds_per_pass(self, shards: Sequence[np.ndarray]) -> int:
        """Rounds in which the client with the largest shard sees all of it."""
        largest = max(len(shard) for shard in shards)
        return math.ceil(self.batches_per_pass(largest) / self.batches_per_round(largest))


class ClientBatchSampler(Sampler[JointBatch]):
    """Yields the joint steps of an epoch's rounds, beginning with the round that the federation has reached.

    Args:
        shards: for every client of the federation, the numbers of its samples.
        clients: those on this rank.
        work: see :class:`LocalWork`.
        participation: the rule of the cohort.
        seed: of the federation.
        rounds_per_epoch: rounds until the iterator ends.
        next_position: tells the first round that has not been completed, and how many of its joint steps are done.
        takes_part: tells whether this rank's clients train in a round; if not, its joint steps are empty.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        clients: range,
        work: LocalWork,
        participation: Participation,
        seed: int,
        rounds_per_epoch: int,
        next_position: Callable[[], tuple[int, int]],
        takes_part: Callable[[int], bool] = lambda round: True,
    ) -> None:
        self.shards = [torch.as_tensor(np.asarray(shard), dtype=torch.int64) for shard in shards]
        self.clients = clients
        self.work = work
        self.participation = participation
        self.seed = seed
        self.rounds_per_epoch = rounds_per_epoch
        self.next_position = next_position
        self.takes_part = takes_part

    def joint_steps(self, round: int) -> int:
        """Minibatches of a round: those of its busiest client anywhere, rounded up to whole optimizer steps."""
        cohort = self.participation.cohort(round, len(self.shards), self.seed)
        busiest = max(self.work.batches_per_round(len(self.shards[client])) for client in cohort)
        return math.ceil(busiest / self.work.accumulate) * self.work.accumulate

    def __iter__(self) -> Iterator[JointBatch]:
        first, done = self.next_position()
        yield from islice(self._round(first), done, None)
        for round in range(first + 1, (first // self.rounds_per_epoch + 1) * self.rounds_per_epoch):
            yield from self._round(round)

    def __len__(self) -> int:
        """Joint steps an epoch.

        Raises:
            TypeError: if rounds differ in length, so that there is no such number.
        """
        counts = {self.work.batches_per_round(len(shard)) for shard in self.shards}
        everyone = self.participation.cohort(0, len(self.shards), self.seed).size == len(self.shards)
        if len(counts) > 1 and not everyone:
            raise TypeError("rounds have different numbers of joint steps, because cohorts and shard sizes differ")
        return self.rounds_per_epoch * self.joint_steps(0)

    def _round(self, round: int) -> Iterator[JointBatch]:
        cohort = self.participation.cohort(round, len(self.shards), self.seed)
        mine = [int(client) for client in cohort if client in self.clients] if self.takes_part(round) else []
        streams = {client: self._minibatches(client, round) for client in mine}
        steps = self.joint_steps(round)
        for index in range(steps):
            parts = [part for stream in streams.values() if (part := next(stream, None)) is not None]
            yield JointBatch(round, index, index == steps - 1, parts)

    def _minibatches(self, client: int, round: int) -> Iterator[ClientBatch]:
        """One client's minibatches of one round: a stretch of its endless stream of passes over its shard."""
        work, shard = self.work, self.shards[client]
        per_round, per_pass = work.batches_per_round(len(shard)), work.batches_per_pass(len(shard))
        current_pass, order = -1, shard
        for index in range(per_round):
            number, position = divmod(round * per_round + index, per_pass)
            if number != current_pass:
                current_pass = number
                order = (
                    shard[permutation(len(shard), Stream.SHUFFLE, self.seed, client, number)] if work.shuffle else shard
                )
            samples = order[position * work.client_batch_size : (position + 1) * work.client_batch_size]
            steps_optimizer = (index + 1) % work.accumulate == 0 or index == per_round - 1
            mine, weight = self._slice(samples)
            yield ClientBatch(client, index, steps_optimizer, weight, mine)

    def _slice(self, samples: torch.Tensor) -> tuple[torch.Tensor, float]:
        """This replica's part of a minibatch, and its share of the samples."""
        if self.work.ranks_per_client == 1:
            return samples, 1.0
        mine = samples.tensor_split(self.work.ranks_per_client)[self.work.replica]
        # A replica without a sample computes a gradient all the same, of weight zero: its peers wait for it.
        return (mine, len(mine) / len(samples)) if len(mine) else (samples[:1], 0.0)


class JointDataset(Dataset[JointBatch]):
    """Loads a planned joint step: the user's samples, collated by the user's function, one minibatch a client.

    Random augmentation is seeded by (seed, round, client, minibatch), in this process or in a worker.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[Any], Any], seed: int, replica: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed
        self.replica = replica
        inner = dataset.dataset if hasattr(dataset, "client_indices") and hasattr(dataset, "dataset") else dataset
        self.tensors = inner.tensors if type(inner) is TensorDataset and collate is default_collate else None

    def __getitem__(self, plan: JointBatch) -> JointBatch:
        parts = [
            ClientBatch(part.client, part.index, part.steps_optimizer, part.weight, batch)
            for part, batch in zip(plan.parts, self._batches(plan))
        ]
        return JointBatch(plan.round, plan.index, plan.is_last_of_round, parts)

    def _batches(self, plan: JointBatch) -> Iterator[Any]:
        if self.tensors is not None and plan.parts:
            # One gather for all clients, then views of it: what default_collate would give, without its Python loop.
            numbers, sizes = torch.cat([part.batch for part in plan.parts]), [len(part.batch) for part in plan.parts]
            yield from map(list, zip(*(tensor.index_select(0, numbers).split(sizes) for tensor in self.tensors)))
            return
        for part in plan.parts:
            key = (self.seed, plan.round, part.client, part.index, self.replica)
            seed_generators(derive_seed(Stream.DATA, *key), torch.device("cpu"))
            yield self.load(part.batch)

    def load(self, numbers: torch.Tensor) -> Any:
        """The user's collated batch of these samples; int64 ``[batch]``."""
        if self.tensors is not None:
            return [tensor.index_select(0, numbers) for tensor in self.tensors]
        samples = numbers.tolist()
        if hasattr(self.dataset, "__getitems__"):
            return self.collate(self.dataset.__getitems__(samples))
        return self.collate([self.dataset[sample] for sample in samples])


def as_loaded(batch: Any) -> Any:
    """The collate function of a loader of joint batches: each is complete already."""
    return batch


def client_shards(dataset: Dataset[Any], num_clients: int, seed: int) -> list[np.ndarray]:
    """The samples of each client: the dataset's own ``client_indices``, or an IID split.

    Raises:
        ValueError: if the dataset has another number of clients.
    """
    indices = getattr(dataset, "client_indices", None)
    if indices is None:
        size = len(dataset)  # type: ignore[arg-type]
        rank_zero_info(
            f"{type(dataset).__name__} does not know its clients (no `client_indices`): its {size} samples are split "
            f"IID over {num_clients} clients. Use a ClientDataModule with a partitioner for another split."
        )
        return [part.numpy() for part in permutation(size, Stream.SPLIT, seed).tensor_split(num_clients)]
    if len(indices) != num_clients:
        raise ValueError(
            f"the strategy has num_clients={num_clients}, but the training data is partitioned for {len(indices)} "
            f"clients: set num_clients={len(indices)} in the strategy, or partition the data for {num_clients}."
        )
    return [np.asarray(shard) for shard in indices]


def check_shards(shards: Sequence[np.ndarray], work: LocalWork) -> None:
    """Refuse shards that cannot give a client one minibatch.

    Raises:
        ValueError: naming the clients and the way out.
    """
    empty = [client for client, shard in enumerate(shards) if len(shard) == 0]
    if empty:
        raise ValueError(
            f"clients {empty[:10]} have no training sample: partition with `min_samples=1` or more, or use fewer "
            f"clients (num_clients={len(shards)})."
        )
    short = [client for client, shard in enumerate(shards) if work.batches_per_pass(len(shard)) == 0]
    if short:
        raise ValueError(
            f"clients {short[:10]} have fewer samples than one minibatch of {work.client_batch_size}, and the loader "
            f"has drop_last=True, so they would never train: set drop_last=False, lower batch_size={work.batch_size}, "
            "or partition with a larger `min_samples`."
        )


def federated_loader(loader: DataLoader[Any], sampler: ClientBatchSampler, seed: int) -> DataLoader[Any]:
    """The user's loader with our sampler: workers, collate function, pinning and the rest stay the user's."""
    assert loader.collate_fn is not None
    dataset = JointDataset(loader.dataset, loader.collate_fn, seed, sampler.work.replica)
    return DataLoader(dataset, batch_size=None, sampler=sampler, collate_fn=as_loaded, **loading_of(loader))


def loading_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader loads, whatever it loads: workers, pinning and their settings, as ``DataLoader`` arguments."""
    return {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }


def batching_of(loader: DataLoader[Any]) -> tuple[int, bool, bool]:
    """Read ``(batch_size, shuffle, drop_last)`` off the user's training loader.

    Raises:
        ValueError: if the loader's samples or order cannot be federated.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"the training data is an iterable dataset ({type(loader.dataset).__name__}), whose samples cannot be "
            "assigned to clients: use a map-style dataset (with __getitem__ and __len__)."
        )
    if loader.batch_size is None:
        raise ValueError(
            f"the training DataLoader has batch_size=None or a batch_sampler of its own "
            f"({type(loader.batch_sampler).__name__}), but minibatches must be cut per client: give it a `batch_size`."
        )
    sampler = loader.sampler
    if isinstance(sampler, DistributedSampler):
        return loader.batch_size, sampler.shuffle, loader.drop_last
    if type(sampler) not in (RandomSampler, SequentialSampler):
        raise ValueError(
            f"the training DataLoader has sampler={type(sampler).__name__}, but each client needs an order of its own: "
            "use shuffle=True or shuffle=False, and express other choices in the dataset's `client_indices`."
        )
    return loader.batch_size, isinstance(sampler, RandomSampler), loader.drop_last

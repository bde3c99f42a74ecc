"""Which samples which client trains on, in which order: rounds as a stream of joint batches.

One Lightning batch is one *joint* step: a minibatch for every client of the cohort on this rank. The plan of a round is
a function of (seed, round) that every rank can compute for all clients, so all ranks agree on the number of joint steps
without talking, and a resumed run continues where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby, islice
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
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_fed.federation.participation import Participation
from lightning_fed.federation.randomness import Stream, derive_seed, permutation, seed_generators


@dataclass(slots=True)
class ClientBatch:
    """One client's minibatch in a joint step.

    Attributes:
        client: the client's number in the federation.
        index: number of this minibatch in the client's round, from 0.
        steps_optimizer: False while gradients are still being accumulated.
        weight: share of this rank's slice in the client's minibatch (1 unless ``ranks_per_client > 1``).
        batch: what the user's collate function returned (or, before loading, the sample numbers). None while it is
            only in :attr:`JointBatch.stacked`: see :meth:`JointBatch.unstack`.
    """

    client: int
    index: int
    steps_optimizer: bool
    weight: float
    batch: Any = None


@dataclass
class JointBatch:
    """One joint step: what Lightning passes around as ``batch`` during training.

    Attributes:
        round: the round that this step belongs to.
        index: number of the joint step in its round, from 0.
        is_last_of_round: communication follows.
        parts: the minibatches of this rank's clients; empty if none of them has work left in this round.
        stacked: the minibatches of all parts at once, if they are equally large and the data set holds tensors: a list
            of tensors ``[parts, batch, ...]`` (or, before loading, the sample numbers ``[parts, batch]``). Else None.
    """

    round: int
    index: int
    is_last_of_round: bool
    parts: list[ClientBatch]
    stacked: Any = None

    def unstack(self) -> None:
        """Let every part's ``batch`` be its views of the stacked one, unless it is filled in already."""
        if self.stacked is None or self.parts[0].batch is not None:
            return
        if isinstance(self.stacked, torch.Tensor):
            batches: Iterable[Any] = self.stacked.unbind()
        else:
            batches = map(list, zip(*(tensor.unbind() for tensor in self.stacked)))
        for part, batch in zip(self.parts, batches):
            part.batch = batch

    def replace(self, made_of: Callable[[Any], Any], one_by_one: bool) -> None:
        """Put what a function makes of the minibatches in their place.

        Args:
            made_of: applied to each part's ``batch`` or, if it may be, to ``stacked``.
            one_by_one: it must see one client's minibatch at a time.
        """
        if self.stacked is not None and not one_by_one:
            self.stacked = made_of(self.stacked)
            return
        self.unstack()
        self.stacked = None
        for part in self.parts:
            part.batch = made_of(part.batch)

    def pin_memory(self) -> JointBatch:
        """Move to page-locked memory, as a loader with ``pin_memory=True`` asks for."""
        self.replace(pin_memory, one_by_one=False)
        return self


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
        share_of: names those of a cohort that train on this rank; by default those of ``clients``.
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
        share_of: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.shards = [torch.as_tensor(np.asarray(shard), dtype=torch.int64) for shard in shards]
        self.sizes = [len(shard) for shard in shards]
        self.clients = clients
        self.work = work
        self.participation = participation
        self.seed = seed
        self.rounds_per_epoch = rounds_per_epoch
        self.next_position = next_position
        self.takes_part = takes_part
        self.share_of = share_of or (lambda cohort: cohort[np.isin(cohort, clients)])

    def joint_steps(self, round: int) -> int:
        """Minibatches of a round: those of its busiest client anywhere, rounded up to whole optimizer steps."""
        cohort = self.participation.cohort(round, len(self.shards), self.seed)
        busiest = max(self.work.batches_per_round(self.sizes[client]) for client in cohort)
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
        counts, round = {self.work.batches_per_round(size) for size in set(self.sizes)}, self.next_position()[0]
        everyone = self.participation.cohort(round, len(self.shards), self.seed).size == len(self.shards)
        if len(counts) > 1 and not everyone:
            raise TypeError("rounds have different numbers of joint steps, because cohorts and shard sizes differ")
        return self.rounds_per_epoch * self.joint_steps(round)

    def _round(self, round: int) -> Iterator[JointBatch]:
        cohort = self.participation.cohort(round, len(self.shards), self.seed)
        # As Python integers: of others a range looks through all its members.
        mine = self.share_of(cohort).tolist() if self.takes_part(round) else []
        steps, plan = self.joint_steps(round), self.minibatches(mine, round)
        for index in range(steps):
            yield JointBatch(round, index, index == steps - 1, *next(plan, ([], None)))

    def minibatches(
        self, clients: Sequence[int], round: int
    ) -> Iterator[tuple[list[ClientBatch], torch.Tensor | None]]:
        """What clients train on in a round, joint step by joint step, until the last of them is done.

        Yields:
            ``parts`` and ``stacked`` of a :class:`JointBatch` that is not loaded.
        """
        # Neighbours with equally large shards are planned together; most often that is everybody.
        groups = [list(group) for _, group in groupby(clients, key=self.sizes.__getitem__)]
        streams = [self._blocks(group, round) for group in groups]
        for index in count():
            parts: list[ClientBatch] = []
            blocks: list[torch.Tensor] = []
            for group, stream in zip(groups, streams):
                if (block := next(stream, None)) is not None:
                    samples, weight, steps_optimizer = block
                    parts += [ClientBatch(client, index, steps_optimizer, weight) for client in group]
                    blocks.append(samples)
            if not parts:
                return
            if len({samples.shape[1] for samples in blocks}) == 1:
                yield parts, blocks[0] if len(blocks) == 1 else torch.cat(blocks)
                continue
            for part, row in zip(parts, (row for samples in blocks for row in samples.unbind())):
                part.batch = row
            yield parts, None

    def _blocks(self, clients: list[int], round: int) -> Iterator[tuple[torch.Tensor, float, bool]]:
        """Minibatches ``[clients, batch]`` of clients with equally large shards, with this rank's share of them.

        They are a stretch of each client's endless stream of passes over its shard.
        """
        work, samples = self.work, self.sizes[clients[0]]
        per_round, per_pass = work.batches_per_round(samples), work.batches_per_pass(samples)
        first, index = round * per_round, 0
        for number in range(first // per_pass, math.ceil((first + per_round) / per_pass)):
            begin, end = max(0, first - number * per_pass), min(per_pass, first + per_round - number * per_pass)
            orders = torch.stack([self._order(client, number) for client in clients])
            stretch = orders[:, begin * work.client_batch_size : end * work.client_batch_size]
            for block in stretch.split(work.client_batch_size, dim=1):
                index += 1
                yield (*self._slice(block), index % work.accumulate == 0 or index == per_round)

    def _order(self, client: int, number: int) -> torch.Tensor:
        """The samples of a client in the order of one pass."""
        shard = self.shards[client]
        if not self.work.shuffle:
            return shard
        return shard.index_select(0, permutation(len(shard), Stream.SHUFFLE, self.seed, client, number))

    def _slice(self, samples: torch.Tensor) -> tuple[torch.Tensor, float]:
        """This replica's part of minibatches ``[clients, batch]``, and its share of their samples."""
        if self.work.ranks_per_client == 1:
            return samples, 1.0
        mine, size = samples.tensor_split(self.work.ranks_per_client, dim=1)[self.work.replica], samples.shape[1]
        # A replica without a sample computes a gradient all the same, of weight zero: its peers wait for it.
        return (mine, mine.shape[1] / size) if mine.shape[1] else (samples[:, :1], 0.0)


class JointDataset(Dataset[JointBatch]):
    """Loads a planned joint step: the user's samples, collated by the user's function, one minibatch a client.

    The plan becomes the batch: sample numbers give way to samples. Random augmentation is seeded by (seed, round,
    client, minibatch), in this process or in a worker.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[Any], Any], seed: int, replica: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed
        self.replica = replica
        inner = dataset.dataset if hasattr(dataset, "client_indices") and hasattr(dataset, "dataset") else dataset
        self.tensors = inner.tensors if type(inner) is TensorDataset and collate is default_collate else None

    def __getitem__(self, plan: JointBatch) -> JointBatch:
        if self.tensors is not None and plan.stacked is not None:
            # One gather for all clients; its views are what default_collate would give, without its Python loop.
            numbers, shape = plan.stacked.flatten(), plan.stacked.shape
            plan.stacked = [tensor.index_select(0, numbers).view(*shape, *tensor.shape[1:]) for tensor in self.tensors]
            return plan
        plan.unstack()
        plan.stacked = None
        for part, batch in zip(plan.parts, list(self._batches(plan))):
            part.batch = batch
        return plan

    def _batches(self, plan: JointBatch) -> Iterator[Any]:
        if self.tensors is not None and plan.parts:
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

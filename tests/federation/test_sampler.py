"""The plan of a round: who trains on which samples, in which order, in how many joint steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_fed.federation.participation import FullParticipation, Participation, UniformSample
from lightning_fed.federation.sampler import (
    ClientBatchSampler,
    JointBatch,
    LocalWork,
    batching_of,
    check_shards,
    client_shards,
    federated_loader,
)

SIZES = (5, 9, 12, 6)
STARTS = np.cumsum((0, *SIZES))
SHARDS = [np.arange(start, start + size) for start, size in zip(STARTS, SIZES)]

Plan = dict[int, list[list[int]]]  # client -> minibatches -> sample numbers


def sampler_of(
    work: LocalWork,
    clients: range = range(4),
    participation: Participation | None = None,
    seed: int = 0,
    rounds_per_epoch: int = 1,
    position: tuple[int, int] = (0, 0),
) -> ClientBatchSampler:
    rule = participation or FullParticipation()
    return ClientBatchSampler(SHARDS, clients, work, rule, seed, rounds_per_epoch, lambda: position)


def unstacked(steps: Iterable[JointBatch]) -> list[JointBatch]:
    steps = list(steps)
    for step in steps:
        step.unstack()
    return steps


def joint_steps(work: LocalWork, round: int = 0, **settings: Any) -> list[JointBatch]:
    return unstacked(sampler_of(work, position=(round, 0), **settings))


def plan(work: LocalWork, round: int = 0, **settings: Any) -> Plan:
    samples: Plan = {}
    for joint in joint_steps(work, round, **settings):
        for part in joint.parts:
            samples.setdefault(part.client, []).append(part.batch.tolist())
    return samples


def flat(minibatches: list[list[int]]) -> list[int]:
    return [sample for minibatch in minibatches for sample in minibatch]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("local_epochs", [1, 3])
def test_every_pass_covers_a_clients_shard_exactly_once(local_epochs: int, shuffle: bool) -> None:
    for client, minibatches in plan(LocalWork(4, local_epochs, shuffle=shuffle)).items():
        per_pass = math.ceil(SIZES[client] / 4)
        assert len(minibatches) == local_epochs * per_pass
        for number in range(local_epochs):
            samples = flat(minibatches[number * per_pass : (number + 1) * per_pass])
            assert sorted(samples) == SHARDS[client].tolist()
            assert (samples == SHARDS[client].tolist()) is not shuffle


def test_every_pass_client_round_and_seed_has_an_order_of_its_own() -> None:
    orders = set()
    for round in (0, 1):
        for seed in (0, 1):
            for client, minibatches in plan(LocalWork(12, local_epochs=2), round, seed=seed).items():
                orders |= {tuple(np.subtract(order, STARTS[client])) for order in minibatches if client == 2}
    assert len(orders) == 8


@pytest.mark.parametrize("participation", [None, UniformSample(3)])
def test_the_plan_of_a_client_is_the_same_on_any_rank(participation: Participation | None) -> None:
    work = LocalWork(4, local_epochs=2)
    for round in range(4):
        whole = plan(work, round, participation=participation)
        blocks = (range(0, 1), range(1, 3), range(3, 4))
        parts = [plan(work, round, clients=block, participation=participation) for block in blocks]
        assert {client: batches for part in parts for client, batches in part.items()} == whole
        lengths = {len(joint_steps(work, round, clients=block, participation=participation)) for block in blocks}
        assert len(lengths) == 1  # joint steps are counted over all ranks


def test_a_round_ends_with_its_busiest_client_and_the_others_run_out_earlier() -> None:
    steps = joint_steps(LocalWork(4))
    assert [[part.client for part in step.parts] for step in steps] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2]]
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.is_last_of_round for step in steps] == [False, False, True]
    idle = joint_steps(LocalWork(4), clients=range(0, 1))
    assert [len(step.parts) for step in idle] == [1, 1, 0]


def test_only_the_cohort_trains() -> None:
    rule = UniformSample(2)
    for round in range(5):
        assert sorted(plan(LocalWork(4), round, participation=rule)) == rule.cohort(round, 4, 0).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_local_steps_run_on_through_the_shard_from_round_to_round(shuffle: bool) -> None:
    """Client 2 has three minibatches a pass: two steps a round make two passes in three rounds."""
    work = LocalWork(4, local_steps=2, shuffle=shuffle)
    rounds = [plan(work, round)[2] for round in range(6)]
    assert all(len(minibatches) == 2 for minibatches in rounds)
    samples = flat([flat(minibatches) for minibatches in rounds])
    for start in range(0, 48, 12):
        assert sorted(samples[start : start + 12]) == SHARDS[2].tolist()
    assert samples[:24] != samples[24:] or not shuffle


def test_a_client_has_its_local_steps_and_no_more() -> None:
    """Who plans single clients goes on until they are done."""
    for round in range(4):
        planned = list(sampler_of(LocalWork(4, local_steps=2)).minibatches([1, 2], round))
        assert [[part.client for part in parts] for parts, _ in planned] == [[1, 2], [1, 2]]


def test_local_steps_may_be_more_than_a_pass() -> None:
    assert [len(batch) for batch in plan(LocalWork(4, local_steps=5, shuffle=False))[0]] == [4, 1, 4, 1, 4]


def test_accumulated_minibatches_step_the_optimizer_together() -> None:
    steps = joint_steps(LocalWork(2, accumulate=2))
    flags = {client: [p.steps_optimizer for s in steps for p in s.parts if p.client == client] for client in range(4)}
    assert flags[0] == [False, True, True]  # the last, odd one steps alone
    assert flags[1] == [False, True, False, True, True]
    assert flags[2] == [False, True] * 3
    assert len(steps) == 6


def test_joint_steps_are_whole_optimizer_steps() -> None:
    steps = joint_steps(LocalWork(4, accumulate=2))
    assert len(steps) == 4  # the busiest client has three minibatches
    assert steps[-1].parts == [] and steps[-1].is_last_of_round
    assert len(joint_steps(LocalWork(4, local_steps=3, accumulate=2))) == 6
    assert [
        part.steps_optimizer
        for step in joint_steps(LocalWork(4, local_steps=1, accumulate=2))
        for part in step.parts
        if part.client == 0
    ] == [False, True]


def test_drop_last_leaves_out_the_smaller_minibatch() -> None:
    minibatches = plan(LocalWork(4, drop_last=True))
    assert {client: [len(batch) for batch in batches] for client, batches in minibatches.items()} == {
        0: [4],
        1: [4, 4],
        2: [4, 4, 4],
        3: [4],
    }


@pytest.mark.parametrize("ranks_per_client", [2, 3])
def test_the_slices_of_the_replicas_add_up_to_the_clients_minibatch(ranks_per_client: int) -> None:
    """A client on k ranks trains as on one rank with a batch k times as large."""
    replicas = [
        joint_steps(LocalWork(2, ranks_per_client=ranks_per_client, replica=replica))
        for replica in range(ranks_per_client)
    ]
    whole = joint_steps(LocalWork(2 * ranks_per_client))
    assert {len(steps) for steps in replicas} == {len(whole)}
    for index, joint in enumerate(whole):
        for slot, part in enumerate(joint.parts):
            slices = [steps[index].parts[slot] for steps in replicas]
            assert {piece.client for piece in slices} == {part.client}
            assert flat([piece.batch.tolist() for piece in slices if piece.weight]) == part.batch.tolist()
            assert sum(piece.weight for piece in slices) == pytest.approx(1)
            for piece in slices:
                assert len(piece.batch) >= 1  # its peers wait for its gradient
                assert piece.weight == (len(piece.batch) / len(part.batch) if piece.weight else 0)


def test_an_interrupted_round_is_continued_where_it_stopped() -> None:
    work = LocalWork(4)
    whole = unstacked(sampler_of(work, rounds_per_epoch=2))
    rest = unstacked(sampler_of(work, rounds_per_epoch=2, position=(0, 2)))
    assert [(step.round, step.index) for step in whole] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [(step.round, step.index) for step in rest] == [(step.round, step.index) for step in whole[2:]]
    for a, b in zip(rest, whole[2:]):
        assert [part.batch.tolist() for part in a.parts] == [part.batch.tolist() for part in b.parts]


def test_an_epoch_that_is_continued_ends_where_it_would_have_ended() -> None:
    steps = list(sampler_of(LocalWork(4), rounds_per_epoch=3, position=(4, 0)))
    assert sorted({step.round for step in steps}) == [4, 5]


def test_the_length_is_known_if_rounds_are_equally_long() -> None:
    for sampler in (
        sampler_of(LocalWork(4), rounds_per_epoch=2),
        sampler_of(LocalWork(4, local_steps=2), rounds_per_epoch=3, participation=UniformSample(2)),
        sampler_of(LocalWork(4, accumulate=2)),
    ):
        assert len(sampler) == len(list(sampler))


def test_there_is_no_length_if_cohorts_differ_in_theirs() -> None:
    with pytest.raises(TypeError, match="different numbers of joint steps"):
        len(sampler_of(LocalWork(4), participation=UniformSample(2)))


def test_rounds_in_a_pass_of_the_largest_shard() -> None:
    assert LocalWork(4).rounds_per_pass(SHARDS) == 1
    assert LocalWork(4, local_steps=1).rounds_per_pass(SHARDS) == 3
    assert LocalWork(4, local_steps=2).rounds_per_pass(SHARDS) == 2
    assert LocalWork(2, local_steps=1, accumulate=2).rounds_per_pass(SHARDS) == 3


class WithClients(TensorDataset):
    client_indices = [[0, 2], np.array([1])]


def test_a_dataset_that_knows_its_clients_keeps_them() -> None:
    shards = client_shards(WithClients(torch.zeros(3)), 2, seed=0)
    assert [shard.tolist() for shard in shards] == [[0, 2], [1]]
    with pytest.raises(ValueError, match=r"num_clients=3, but .* partitioned for 2 clients: set num_clients=2"):
        client_shards(WithClients(torch.zeros(3)), 3, seed=0)


def test_another_dataset_is_split_iid_and_evenly_by_the_seed() -> None:
    dataset = TensorDataset(torch.zeros(103))
    shards = client_shards(dataset, 10, seed=0)
    assert sorted(np.concatenate(shards).tolist()) == list(range(103))
    assert {len(shard) for shard in shards} == {10, 11}
    assert not np.array_equal(np.sort(shards[0]), np.arange(11))
    for again, other, shard in zip(client_shards(dataset, 10, 0), client_shards(dataset, 10, 1), shards):
        np.testing.assert_array_equal(again, shard)
        assert not np.array_equal(other, shard)


def test_clients_that_would_never_train_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clients \[1\] have no training sample.*num_clients=2"):
        check_shards([np.arange(3), np.arange(0)], LocalWork(2))
    with pytest.raises(ValueError, match=r"clients \[0\] have fewer samples than one minibatch of 4.*drop_last=False"):
        check_shards([np.arange(3), np.arange(4)], LocalWork(4, drop_last=True))
    check_shards([np.arange(3), np.arange(4)], LocalWork(4))


@pytest.mark.parametrize(("shuffle", "drop_last"), [(True, False), (False, True)])
def test_batching_is_read_off_the_users_loader(shuffle: bool, drop_last: bool) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(9)), 4, shuffle=shuffle, drop_last=drop_last)
    assert batching_of(loader) == (4, shuffle, drop_last)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield 0


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Endless()), r"iterable dataset \(Endless\).*map-style"),
        (DataLoader(TensorDataset(torch.zeros(4)), batch_size=None), "batch_size=None.*give it a `batch_size`"),
        (DataLoader(TensorDataset(torch.zeros(4)), batch_sampler=[[0, 1]]), r"batch_sampler of its own \(list\)"),
        (
            DataLoader(TensorDataset(torch.zeros(4)), sampler=WeightedRandomSampler([1.0] * 4, 4)),
            "sampler=WeightedRandomSampler, but each client needs an order of its own",
        ),
    ],
)
def test_loaders_that_cannot_be_cut_per_client_are_refused(loader: DataLoader[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batching_of(loader)


class Noisy(Dataset[torch.Tensor]):
    """Random augmentation."""

    def __len__(self) -> int:
        return sum(SIZES)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()), np.random.rand()])


def loaded(dataset: Any, clients: range = range(4), round: int = 0, **loader: Any) -> dict[int, list[Any]]:
    sampler = sampler_of(LocalWork(4), clients, position=(round, 0))
    batches: dict[int, list[Any]] = {}
    for joint in unstacked(federated_loader(DataLoader(dataset, 4, shuffle=True, **loader), sampler, seed=0)):
        for part in joint.parts:
            batches.setdefault(part.client, []).append(part.batch)
    return batches


def test_augmentation_does_not_depend_on_rank_or_workers() -> None:
    whole = loaded(Noisy())
    for others in (loaded(Noisy(), num_workers=1), loaded(Noisy(), range(0, 2)) | loaded(Noisy(), range(2, 4))):
        for client, batches in whole.items():
            assert all(torch.equal(a, b) for a, b in zip(batches, others[client]))
    draws = torch.cat(
        [batch[:, 1] for round in (0, 1) for batches in loaded(Noisy(), round=round).values() for batch in batches]
    )
    assert len(draws.unique()) == 2 * sum(SIZES)


def test_samples_are_collated_by_the_users_function() -> None:
    dataset = TensorDataset(torch.arange(float(sum(SIZES))))
    plain = loaded(dataset)
    own = loaded(dataset, collate_fn=lambda samples: [sum(float(value) for (value,) in samples)])
    for client, planned in plan(LocalWork(4)).items():
        assert [batch[0].tolist() for batch in plain[client]] == planned
        assert [batch[0] for batch in own[client]] == [sum(batch) for batch in planned]


EQUAL = [np.arange(start, start + 10) for start in (0, 10, 20)]
UNEQUAL = SHARDS[:3]


class OneByOne(Dataset[Any]):
    """The same samples as a TensorDataset, which nobody can gather at once."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.samples = dataset

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@pytest.mark.parametrize("shards", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("position", [(0, 0), (1, 2)], ids=["from the start", "resumed"])
@pytest.mark.parametrize(
    ("work", "workers"),
    [
        (LocalWork(4), 0),
        (LocalWork(4, shuffle=False, local_epochs=2), 0),
        (LocalWork(4, local_steps=4, accumulate=2), 0),
        (LocalWork(2, ranks_per_client=3, replica=2), 0),
        (LocalWork(4, drop_last=True), 1),
    ],
)
def test_stacked_minibatches_are_those_that_the_loader_collates_one_by_one(
    work: LocalWork, workers: int, position: tuple[int, int], shards: list[np.ndarray]
) -> None:
    samples = TensorDataset(torch.randn(30, 3, 2), torch.arange(30))

    def joint_batches(dataset: Dataset[Any], clients: range) -> list[JointBatch]:
        sampler = ClientBatchSampler(shards, clients, work, FullParticipation(), 0, 3, lambda: position)
        return list(federated_loader(DataLoader(dataset, work.batch_size, num_workers=workers), sampler, seed=0))

    for clients in (range(3), range(1, 2)):
        gathered, collated = joint_batches(samples, clients), joint_batches(OneByOne(samples), clients)
        assert len(gathered) == len(collated)
        for ours, theirs in zip(gathered, collated):
            sizes = {len(part.batch[0]) for part in theirs.parts}
            assert theirs.stacked is None
            assert (ours.stacked is not None) == (len(sizes) == 1)
            if ours.stacked is not None:
                features, labels = ours.stacked
                assert features.shape == (len(ours.parts), *sizes, 3, 2) and labels.shape == features.shape[:2]
                assert all(part.batch is None for part in ours.parts)
            ours.unstack()
            for part, other in zip(ours.parts, theirs.parts, strict=True):
                assert type(part.batch) is list and len(part.batch) == 2
                assert all(torch.equal(a, b) for a, b in zip(part.batch, other.batch))
                for field in ("client", "index", "steps_optimizer", "weight"):
                    assert getattr(part, field) == getattr(other, field)


def stacked_batch() -> JointBatch:
    sampler = ClientBatchSampler(EQUAL, range(3), LocalWork(4), FullParticipation(), 0, 1, lambda: (0, 0))
    return next(iter(federated_loader(DataLoader(TensorDataset(torch.arange(30.0)), 4), sampler, seed=0)))


def test_a_joint_batch_is_replaced_as_a_whole_or_client_by_client() -> None:
    """What sees one minibatch may make anything of it; what sees all of them keeps their stack."""
    whole, apart = stacked_batch(), stacked_batch()
    calls: list[int] = []
    whole.replace(lambda stack: [-tensor for tensor in stack], one_by_one=False)
    apart.replace(lambda batch: calls.append(len(batch[0])) or {"negative": -batch[0]}, one_by_one=True)  # type: ignore[func-returns-value]
    assert calls == [4, 4, 4] and apart.stacked is None
    whole.unstack()
    for here, there in zip(whole.parts, apart.parts):
        assert here.batch[0].min() < 0 and torch.equal(here.batch[0], there.batch["negative"])


def test_views_of_a_stack_are_made_once() -> None:
    """A callback that changes its part of a joint batch has changed what is trained on."""
    batch = stacked_batch()
    batch.unstack()
    batch.parts[1].batch = "changed"
    batch.unstack()
    assert batch.parts[1].batch == "changed"


@pytest.mark.gpu
@pytest.mark.parametrize("shards", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("workers", [0, 1])
def test_joint_batches_are_pinned_if_the_users_loader_pins(shards: list[np.ndarray], workers: int) -> None:
    sampler = ClientBatchSampler(shards, range(3), LocalWork(4), FullParticipation(), 0, 1, lambda: (0, 0))
    data = TensorDataset(torch.arange(30.0))
    for batch in federated_loader(DataLoader(data, 4, pin_memory=True, num_workers=workers), sampler, seed=0):
        assert all(tensor.is_pinned() for tensor in batch.stacked or ())
        batch.unstack()
        assert batch.parts and all(part.batch[0].is_pinned() for part in batch.parts)

"""The sampler, for any shards and local work: nothing left out, aligned, resumable, the same on all ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_fed.federation.layout import Layout
from lightning_fed.federation.participation import FullParticipation, Participation, UniformSample
from lightning_fed.federation.sampler import ClientBatchSampler, JointBatch, LocalWork

# Of one client in a joint step: its number, that of its minibatch, whether the optimizer steps, its samples.
Part = tuple[int, int, bool, tuple[int, ...]]
Step = tuple[int, int, bool, tuple[Part, ...]]

shard_sizes = st.lists(st.integers(1, 11), min_size=4, max_size=8)
work_of = st.builds(
    LocalWork,
    batch_size=st.integers(1, 5),
    local_epochs=st.integers(1, 2),
    local_steps=st.none() | st.integers(1, 6),
    accumulate=st.integers(1, 3),
    shuffle=st.booleans(),
)
cohorts = st.builds(FullParticipation) | st.builds(UniformSample, st.integers(1, 4))


def shards_of(sizes: list[int]) -> list[np.ndarray]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def plan(
    sizes: list[int], work: LocalWork, rule: Participation, clients: range, position: tuple[int, int], seed: int = 0
) -> list[Step]:
    """The joint steps from a position to the end of an epoch of two rounds, as plain values."""
    sampler = ClientBatchSampler(shards_of(sizes), clients, work, rule, seed, 2, lambda: position)
    return [plain(joint) for joint in sampler]


def plain(joint: JointBatch) -> Step:
    joint.unstack()
    parts = tuple((part.client, part.index, part.steps_optimizer, tuple(part.batch.tolist())) for part in joint.parts)
    return joint.round, joint.index, joint.is_last_of_round, parts


@given(
    sizes=shard_sizes,
    batch_size=st.integers(1, 5),
    local_epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_minibatches_of_a_round_cover_every_shard_once_a_pass(
    sizes: list[int], batch_size: int, local_epochs: int, shuffle: bool, drop_last: bool, seed: int
) -> None:
    work = LocalWork(batch_size, local_epochs, shuffle=shuffle, drop_last=drop_last and min(sizes) >= batch_size)
    steps = plan(sizes, work, FullParticipation(), range(len(sizes)), (0, 0), seed)
    for round in (0, 1):
        mine = [part for step in steps if step[0] == round for part in step[3]]
        for client, shard in enumerate(shards_of(sizes)):
            batches = [samples for number, _, _, samples in mine if number == client]
            assert [index for number, index, _, _ in mine if number == client] == list(range(len(batches)))
            per_pass = work.batches_per_pass(len(shard))
            assert len(batches) == local_epochs * per_pass
            for number in range(local_epochs):
                seen = [s for samples in batches[number * per_pass : (number + 1) * per_pass] for s in samples]
                expected = len(shard) // batch_size * batch_size if work.drop_last else len(shard)
                assert len(seen) == len(set(seen)) == expected and set(seen) <= set(shard.tolist())


@given(sizes=shard_sizes, batch_size=st.integers(1, 5), local_steps=st.integers(1, 6), accumulate=st.integers(1, 3))
def test_local_steps_run_on_through_the_shard_over_rounds(
    sizes: list[int], batch_size: int, local_steps: int, accumulate: int
) -> None:
    work = LocalWork(batch_size, local_steps=local_steps, accumulate=accumulate)
    seen: dict[int, Counter[int]] = {client: Counter() for client in range(len(sizes))}
    for first in (0, 2, 4):
        for _, _, _, parts in plan(sizes, work, FullParticipation(), range(len(sizes)), (first, 0)):
            for client, _, _, samples in parts:
                seen[client].update(samples)
    for client, shard in enumerate(shards_of(sizes)):
        # After so many minibatches every sample was seen as often as there were whole passes, or once more.
        passes = 6 * local_steps * accumulate // work.batches_per_pass(len(shard))
        assert set(seen[client]) <= set(shard.tolist())
        assert all(passes <= seen[client][sample] <= passes + 1 for sample in shard.tolist())


@given(sizes=shard_sizes, work=work_of, rule=cohorts, seed=st.integers(0, 2**31))
def test_joint_steps_are_aligned_and_the_same_over_any_number_of_ranks(
    sizes: list[int], work: LocalWork, rule: Participation, seed: int
) -> None:
    alone = plan(sizes, work, rule, range(len(sizes)), (0, 0), seed)
    for num_ranks in (2, 4):
        layout = Layout(len(sizes), num_ranks)
        ranks = [plan(sizes, work, rule, layout.clients_of(rank), (0, 0), seed) for rank in range(num_ranks)]
        assert [step[:3] for step in ranks[0]] == [step[:3] for step in alone]
        for expected, *steps in zip(alone, *ranks, strict=True):
            assert all(step[:3] == expected[:3] for step in steps)
            assert tuple(part for step in steps for part in step[3]) == expected[3]


@given(sizes=shard_sizes, work=work_of, rule=cohorts)
def test_all_who_accumulate_step_at_the_end_of_their_round_at_the_latest(
    sizes: list[int], work: LocalWork, rule: Participation
) -> None:
    steps = plan(sizes, work, rule, range(len(sizes)), (0, 0))
    for round in (0, 1):
        mine = [step for step in steps if step[0] == round]
        assert [index for _, index, _, _ in mine] == list(range(len(mine)))
        assert [last for _, _, last, _ in mine] == [False] * (len(mine) - 1) + [True]
        last: dict[int, Any] = {client: stepped for *_, parts in mine for client, _, stepped, _ in parts}
        assert all(last.values())
        assert set(last) == set(rule.cohort(round, len(sizes), 0).tolist())


@given(data=st.data(), sizes=shard_sizes, work=work_of, rule=cohorts, first=st.integers(0, 3))
def test_resuming_from_any_joint_step_gives_the_same_rest(
    data: st.DataObject, sizes: list[int], work: LocalWork, rule: Participation, first: int
) -> None:
    whole = plan(sizes, work, rule, range(len(sizes)), (first, 0))
    in_round = sum(step[0] == first for step in whole)
    done = data.draw(st.integers(0, in_round), label="joint steps done")
    assert plan(sizes, work, rule, range(len(sizes)), (first, done)) == whole[done:]


@given(sizes=shard_sizes, batch_size=st.integers(1, 4), replicas=st.integers(2, 3))
def test_the_replicas_of_a_client_share_its_minibatches(sizes: list[int], batch_size: int, replicas: int) -> None:
    clients = range(len(sizes))
    whole = plan(sizes, LocalWork(batch_size * replicas), FullParticipation(), clients, (0, 0))
    slices = [
        ClientBatchSampler(
            shards_of(sizes),
            clients,
            LocalWork(batch_size, ranks_per_client=replicas, replica=replica),
            FullParticipation(),
            0,
            2,
            lambda: (0, 0),
        )
        for replica in range(replicas)
    ]
    for expected, *joints in zip(whole, *slices, strict=True):
        for joint in joints:
            joint.unstack()
        for number, (client, _, _, samples) in enumerate(expected[3]):
            parts = [joint.parts[number] for joint in joints]
            assert {part.client for part in parts} == {client}
            assert abs(sum(part.weight for part in parts) - 1) < 1e-12
            assert [s for part in parts if part.weight for s in part.batch.tolist()] == list(samples)

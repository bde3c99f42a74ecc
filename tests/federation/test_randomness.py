"""Random streams are functions of their key: stable for ever, and independent of each other."""

from __future__ import annotations

import random

import numpy as np
import torch

from lightning_fed.federation.randomness import Stream, derive_seed, permutation, seed_generators


def test_pinned_seeds_stay_what_they_are() -> None:
    """A change would silently change every published run."""
    assert derive_seed(Stream.COHORT, 0, 0) == 3115298510175463368
    assert derive_seed(Stream.LOCAL_STEP, 42, 7, 3) == 18518130926297893


def test_the_numbers_of_the_streams_stay_what_they_are() -> None:
    names = ("COHORT", "SHUFFLE", "LOCAL_STEP", "DATA", "ROUND", "SPLIT")
    assert [Stream[name].value for name in names] == [1, 2, 3, 4, 5, 6]


def test_seeds_are_63_bit_and_differ_in_every_part_of_the_key() -> None:
    keys = [(a, b, c) for a in range(6) for b in range(6) for c in range(6)]
    seeds = {derive_seed(stream, *key) for stream in Stream for key in keys}
    assert len(seeds) == len(Stream) * len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(Stream.DATA, 1) != derive_seed(Stream.DATA, 1, 0)


def test_a_key_may_hold_any_64_bit_integer() -> None:
    assert derive_seed(Stream.DATA, -1) != derive_seed(Stream.DATA, 2**63 - 1)


def test_a_permutation_is_one_and_ignores_global_generators() -> None:
    torch.manual_seed(0)
    first = permutation(50, Stream.SHUFFLE, 1, 2, 3)
    state = torch.get_rng_state()
    again = permutation(50, Stream.SHUFFLE, 1, 2, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert first.dtype == torch.int64
    assert torch.equal(first.sort().values, torch.arange(50))
    assert not torch.equal(first, permutation(50, Stream.SHUFFLE, 1, 2, 4))


def test_one_seed_fixes_torch_python_and_numpy() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    seed = derive_seed(Stream.DATA, 5)
    seed_generators(seed, torch.device("cpu"))
    first = draw()
    other = draw()
    seed_generators(seed, torch.device("cpu"))
    assert draw() == first != other
    seed_generators(seed + 1, torch.device("cpu"))
    assert all(a != b for a, b in zip(draw(), first))

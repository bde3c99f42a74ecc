"""Random streams that depend on (seed, round, client) and never on the rank or the number of processes.

Every stream is *stateless*: the generators are re-seeded at each local step from a key, so that a resumed run, or the
same run on another number of ranks, draws the same numbers without any generator state being saved.
"""

from __future__ import annotations

import hashlib
import random
import struct
from enum import IntEnum
from functools import cache

import numpy as np
import torch


class Stream(IntEnum):
    """What a stream of random numbers is for; two uses never share a stream."""

    COHORT = 1
    SHUFFLE = 2
    LOCAL_STEP = 3
    DATA = 4
    ROUND = 5
    SPLIT = 6
    AVAILABILITY = 7
    CLOCK = 8
    MEMBERSHIP = 9
    COMPRESSION = 10
    PRIVACY = 11
    ATTACK = 12


def derive_seed(stream: Stream, *key: int) -> int:
    """Hash a key of integers into one seed.

    Args:
        stream: what the numbers are for.
        key: for example ``(seed, round, client)``.

    Returns:
        An integer in ``[0, 2**63)``, the same on every machine and Python version.
    """
    digest = hashlib.blake2b(_integers(len(key) + 1).pack(stream, *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@cache
def _integers(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}q")


def permutation(size: int, stream: Stream, *key: int) -> torch.Tensor:
    """A random order of ``range(size)`` that is a function of the key alone; int64 ``[size]``."""
    generator = torch.Generator().manual_seed(derive_seed(stream, *key))
    return torch.randperm(size, generator=generator)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch (CPU and the rank's own device), Python and NumPy, without touching other devices' generators."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)

"""Plain values of all ranks, in one message or two."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from lightning_fed.federation.processes import SHORT_TEXT, gather_texts


def texts_of(rank: int) -> list[str]:
    """Short and long ones, on the edge, beyond ASCII, and of one rank alone."""
    return [
        json.dumps({"rank": rank, "nan": float("nan"), "tenth": 0.1 + rank}),
        "x" * (SHORT_TEXT + 1 - rank),
        "é" * 3,
        "y" * 5 * SHORT_TEXT if rank == 1 else "z",
    ]


def gather_all() -> dict[str, Any]:
    dist.init_process_group("gloo")
    sent = []
    collective = dist.all_gather_into_tensor

    def counted(*args: Any, **kwargs: Any) -> Any:
        sent.append(args)
        return collective(*args, **kwargs)

    dist.all_gather_into_tensor = counted
    found, counts = [], []
    for text in texts_of(dist.get_rank()):
        found.append(gather_texts(text, torch.device("cpu")))
        counts.append(len(sent) - sum(counts))
    dist.destroy_process_group()
    return {"found": found, "counts": counts}


@pytest.mark.parametrize("world_size", [2, 3])
def test_texts_of_all_ranks(world_size: int) -> None:
    expected = [list(texts) for texts in zip(*map(texts_of, range(world_size)))]
    for result in run_ranks(world_size, gather_all):
        assert result["found"] == expected
        assert result["counts"] == [1, 2, 1, 2], "long texts alone need a second message"

"""The exchange between real ranks keeps the same contract as the one within a process."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from exchange_contract import check_exchange
from ranks import run_ranks

from lightning_fed.federation.exchange import COLUMNS_PER_BLOCK, CollectiveExchange
from lightning_fed.federation.layout import Layout


def contract_on_this_rank() -> None:
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    assert dist.group.WORLD is not None
    for num_clients, width in ((world_size, 37), (13, 1), (64, COLUMNS_PER_BLOCK[1] + 5)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            exchange = CollectiveExchange(Layout(num_clients, world_size), rank, dist.group.WORLD)
            check_exchange(exchange, width, dtype)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_keep_the_contract(world_size: int) -> None:
    run_ranks(world_size, contract_on_this_rank)

"""What ranks of an elastic federation know of each other: who leads, what the others have logged, where they start."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from elastic_ranks import ElasticRanks
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from lightning_fed.federation.client_logs import LogEntry
from lightning_fed.federation.peer_network import STORE_VARIABLE
from lightning_fed.federation.peers import Peers


def meet(ping_timeout: float = 0.5) -> Peers:
    """The peers of this rank, listening."""
    peers = Peers(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0, ping_timeout, message_timeout=10.0)
    peers.start()
    return peers


def lead_when_others_die() -> list[Any]:
    peers = meet()
    store = peers.network.store
    seen: list[Any] = [peers.survivors.leader]
    for number in range(2):
        store.set(f"ready/{number}/{peers.network.rank}", "")
        store.wait([f"killed/{number}"])
        peers.survivors.update()
        seen.append((peers.survivors.leader, peers.survivors.is_leader, rank_zero_only.rank))  # type: ignore[attr-defined]
    peers.close()
    return seen


def test_the_lowest_living_rank_leads() -> None:
    with ElasticRanks(3, lead_when_others_die) as ranks:
        for victim in (0, 1):
            for rank in range(victim, 3):
                ranks.await_key(f"lightning_fed/0/ready/{victim}/{rank}")
            ranks.kill(victim)
            ranks.store.set(f"lightning_fed/0/killed/{victim}", "")
        results = ranks.results()
    seen = results[2]
    # In the first round rank 2 may look before or after rank 1 has taken over; it never takes over itself.
    assert seen[0] == 0 and seen[1] in ((0, False, 2), (1, False, 2))
    assert seen[2] == (2, True, 0)


def tell_logs() -> list[dict[str, float]]:
    peers = meet()
    store, rank = peers.network.store, peers.network.rank
    mean = LogEntry("mean", True, True, False, torch.tensor(float(6 * rank), dtype=torch.float64), float(rank + 1))
    if rank > 0:
        peers.gather_logs({"loss": mean, f"only/{rank}": mean})
    store.set(f"told/{rank}", "")
    store.wait([f"told/{other}" for other in range(3)])
    gathered: list[dict[str, LogEntry]] = []
    if rank == 0:
        peers.events.wait_for(lambda: len(peers._logs) == 2, 10.0)
        gathered = peers.gather_logs({"loss": mean})
        assert peers.gather_logs({}) == [{}], "nothing is told twice"
    store.set(f"done/{rank}", "")
    store.wait(["done/0"])
    peers.close()
    return [{name: float(entry.result()) for name, entry in logs.items()} for logs in gathered]


def test_the_leader_hears_what_others_have_logged() -> None:
    with ElasticRanks(3, tell_logs) as ranks:
        mine, *others = ranks.results()[0]
    assert mine == {"loss": 0.0}
    assert sorted(others, key=len) == others and len(others) == 2
    assert {name: value for logs in others for name, value in logs.items() if name != "loss"} == {
        "only/1": 3.0,
        "only/2": 4.0,
    }
    assert sorted(logs["loss"] for logs in others) == [3.0, 4.0]


def start_from(seed_of_rank: list[int]) -> str:
    peers = meet()
    torch.manual_seed(seed_of_rank[peers.network.rank])
    try:
        peers.require_equal_start(nn.Linear(3, 2))
        return "equal"
    except ValueError as refusal:
        return str(refusal)
    finally:
        peers.close()


def test_ranks_must_start_from_one_model() -> None:
    with ElasticRanks(2, start_from, [1, 1]) as ranks:
        assert ranks.results() == {0: "equal", 1: "equal"}
    with ElasticRanks(2, start_from, [1, 2]) as ranks:
        results = sorted(ranks.results().values(), key=len)
    assert results[0] == "equal" and "call seed_everything" in results[1]


def test_a_federation_without_a_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (STORE_VARIABLE, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=r"on_peer_loss='drop' needs a store .* `lightning-fed launch`"):
        Peers(0, 2, 0, 1.0, 1.0)

"""Clients are spread over ranks in contiguous blocks."""

from __future__ import annotations

import pytest

from lightning_fed.federation.layout import Layout


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_clients", [7, 8, 12, 100])
def test_blocks_cover_every_client_once_in_order_and_evenly(num_clients: int, num_ranks: int) -> None:
    layout = Layout(num_clients, num_ranks)
    blocks = [layout.clients_of(host) for host in range(layout.num_hosts)]
    assert [client for block in blocks for client in block] == list(range(num_clients))
    sizes = [len(block) for block in blocks]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_replicas_of_a_client_share_a_host() -> None:
    layout = Layout(num_clients=3, num_ranks=6, ranks_per_client=2)
    assert layout.num_hosts == 3
    assert [layout.host_of_rank(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [layout.replica_of_rank(rank) for rank in range(6)] == [0, 1, 0, 1, 0, 1]
    assert [list(layout.clients_of(host)) for host in range(3)] == [[0], [1], [2]]


def test_equal_layouts_compare_equal() -> None:
    assert Layout(8, 2) == Layout(8, 2) != Layout(8, 4)


def test_replicas_must_divide_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"ranks_per_client=3 does not divide the 4 ranks.*devices"):
        Layout(8, 4, 3)


def test_no_rank_may_idle() -> None:
    with pytest.raises(ValueError, match=r"num_clients=3 is smaller than the 4 hosts.*raise `num_clients`"):
        Layout(3, 4)
    Layout(3, 6, ranks_per_client=2)

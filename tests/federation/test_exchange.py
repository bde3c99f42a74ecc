"""The loopback exchange keeps the contract of every exchange, and some promises of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exchange_contract import check_exchange, mixing_matrices

from lightning_fed.federation.exchange import CACHED_MATRICES, COLUMNS_PER_BLOCK, LoopbackExchange, plan_mixing
from lightning_fed.federation.layout import Layout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 37, COLUMNS_PER_BLOCK[1] + 5])
@pytest.mark.parametrize("num_clients", [1, 4, 64])
def test_loopback_keeps_the_contract(num_clients: int, width: int, dtype: torch.dtype) -> None:
    check_exchange(LoopbackExchange(Layout(num_clients)), width, dtype)


@pytest.mark.parametrize("num_clients", [4, 64])
def test_loopback_keeps_the_contract_on_strided_rows(num_clients: int) -> None:
    check_exchange(LoopbackExchange(Layout(num_clients)), COLUMNS_PER_BLOCK[1] + 5, torch.float32, padding=11)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loopback_keeps_the_contract_on_a_gpu(dtype: torch.dtype) -> None:
    check_exchange(LoopbackExchange(Layout(64)), COLUMNS_PER_BLOCK[1] + 5, dtype, device="cuda", padding=11)


def test_both_the_sparse_and_the_dense_path_are_taken() -> None:
    matrix = torch.zeros(64, 3)
    layouts = {name: plan_mixing(W, Layout(64), 0, matrix).weights.layout for name, W in mixing_matrices(64).items()}
    assert layouts["complete"] == torch.strided
    assert layouts["ring"] == layouts["hops"] == layouts["some"] == torch.sparse_csr


def test_hosts_plan_the_same_mixing_between_them() -> None:
    """Whoever is planned to send is planned to be received from, and the blocks make up the whole product."""
    layout, X = Layout(10, num_ranks=3), torch.randn(10, 6, dtype=torch.float64)
    for name, W in mixing_matrices(10).items():
        plans = [plan_mixing(W, layout, host, X) for host in range(3)]
        for host, plan in enumerate(plans):
            mine = layout.clients_of(host)
            assert {peer: len(rows) for peer, rows in plan.send.items()} == {
                peer: other.receive[host] for peer, other in enumerate(plans) if host in other.receive
            }
            received = {peer: X[layout.clients_of(peer).start + plans[peer].send[host]] for peer in plan.receive}
            received[host] = X[mine.start : mine.stop]
            mixed = plan.weights @ torch.cat([received[peer] for peer in sorted(received)])
            np.testing.assert_allclose(
                mixed.numpy(), (W @ X.numpy())[mine.start : mine.stop], rtol=0, atol=1e-14, err_msg=name
            )


def test_a_matrix_is_planned_once_and_many_matrices_do_not_pile_up() -> None:
    exchange, rows = LoopbackExchange(Layout(3)), torch.randn(3, 2, dtype=torch.float64)
    first = np.full((3, 3), 1 / 3)
    exchange.mix_(rows, first)
    plan = exchange._plan(first, rows)
    assert exchange._plan(first, rows) is plan
    assert exchange._plan(first, rows.float()) is not plan
    for number in range(2 * CACHED_MATRICES):
        draw = np.random.default_rng(number).uniform(size=(3, 3))
        before = rows.numpy().copy()
        exchange.mix_(rows, draw)
        np.testing.assert_allclose(rows.numpy(), draw @ before, rtol=1e-12)
    assert len(exchange._plans) <= CACHED_MATRICES


def test_an_empty_row_costs_nothing() -> None:
    exchange, nothing = LoopbackExchange(Layout(4)), torch.zeros(4, 0)
    exchange.mix_(nothing, np.full((4, 4), 0.25))
    exchange.download(torch.zeros(0), nothing, np.arange(4))
    assert exchange.upload_mean(nothing, np.full(4, 0.25)).shape == (0,)
    assert exchange.total_bytes == 0

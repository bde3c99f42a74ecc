"""What every Exchange promises, as one function that each rank of a federation calls with its own exchange.

All ranks know the common matrices below, give the exchange their block of rows, and check what they get back against
float64 NumPy. Shapes: N = clients of the federation, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fed.federation.exchange import Exchange

MakeRows = Callable[[], Tensor]
AssertNear = Callable[[Tensor, np.ndarray], None]

# Largest error of an average of numbers of size 1, whose weights are rounded to the dtype as well.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-2}


def mixing_matrices(num_clients: int) -> dict[str, np.ndarray]:
    """Row-stochastic ``[N, N]`` whose transposes differ, dense and sparse, and a ring; one client mixes with nobody."""
    draw = np.random.default_rng(1)
    eye = np.eye(num_clients)
    complete = draw.uniform(0.5, 1.0, (num_clients, num_clients))
    some = np.where(draw.uniform(size=complete.shape) < 3 / num_clients, complete, 0) + eye
    hops = 0.5 * eye + 0.3 * np.roll(eye, 1, axis=1) + 0.2 * np.roll(eye, -2, axis=1)
    ring = eye + np.roll(eye, 1, axis=1) + np.roll(eye, -1, axis=1)
    matrices = {"complete": complete, "some": some, "hops": hops, "ring": ring, "nobody": eye}
    return {name: matrix / matrix.sum(axis=1, keepdims=True) for name, matrix in matrices.items()}


def check_exchange(
    exchange: Exchange, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu", padding: int = 0
) -> None:
    """Check everything that an exchange promises; a collective call.

    Args:
        exchange: of this rank.
        width: P.
        dtype: of the rows.
        device: of the rows.
        padding: unused numbers after each row, as :class:`~lightning_fed.federation.rows.Rows` may leave for alignment.
    """
    num_clients, tolerance = exchange.layout.num_clients, TOLERANCE[dtype]
    mine = slice(exchange.clients.start, exchange.clients.stop)
    draw = np.random.default_rng(0)
    # Rounded to the dtype, so that what is compared is the exchange's arithmetic and not the rounding of its input.
    common = torch.from_numpy(draw.uniform(-1, 1, (num_clients, width))).to(dtype)
    X_NP = common.double().numpy()
    row_bytes = width * dtype.itemsize

    def rows() -> Tensor:
        wide = torch.full((len(exchange.clients), width + padding), torch.nan, dtype=dtype, device=device)
        wide[:, :width] = common[mine].to(device)
        return wide[:, :width]

    def assert_near(actual: Tensor, expected: np.ndarray) -> None:
        assert actual.dtype == dtype and actual.device.type == torch.device(device).type
        np.testing.assert_allclose(actual.double().cpu().numpy(), expected, rtol=0, atol=tolerance)

    def assert_same_on_all_ranks(vector: Tensor) -> None:
        for digest in (vector.double().sum(), vector.double().abs().max(), vector[0]):
            everywhere = exchange.gather_rows(np.full(len(exchange.clients), float(digest)))
            assert np.ptp(everywhere) == 0, everywhere

    check_mixing(exchange, rows, X_NP, row_bytes, assert_near)
    check_means(exchange, rows, X_NP, row_bytes, assert_near, assert_same_on_all_ranks)
    check_server(exchange, rows, X_NP, row_bytes, assert_near)
    check_gathering(exchange)
    check_sharing(exchange)


def check_mixing(exchange: Exchange, rows: MakeRows, X_NP: np.ndarray, row_bytes: int, assert_near: AssertNear) -> None:
    """``X <- W X`` in place; client j sends its row to every other i with w_ij != 0."""
    mine = slice(exchange.clients.start, exchange.clients.stop)
    for name, W_NN in mixing_matrices(len(X_NP)).items():
        exchange.reset_counts()
        block = rows()
        padded = block.as_strided((len(block), block.stride(0)), (block.stride(0), 1))
        address = block.data_ptr()
        exchange.mix_(block, W_NN)
        assert_near(block, (W_NN @ X_NP)[mine])
        exchange.mix_(block, W_NN)
        assert_near(block, (W_NN @ W_NN @ X_NP)[mine])
        assert block.data_ptr() == address
        assert padded[:, block.shape[1] :].isnan().all(), "numbers between the rows were touched"
        receivers = (W_NN != 0).sum(axis=0) - 1  # of each client's row; the diagonal is never zero here
        np.testing.assert_array_equal(exchange.sent_bytes, 2 * receivers * row_bytes, err_msg=name)
        assert exchange.server_bytes == 0
        assert exchange.total_bytes == 2 * receivers.sum() * row_bytes
        # Over the wire goes each of my rows once for each other host that needs it.
        hosts = [exchange.layout.clients_of(host) for host in range(exchange.layout.num_hosts) if host != exchange.host]
        wanted = sum((W_NN[host.start : host.stop, mine] != 0).any(axis=0).sum() for host in hosts)
        assert exchange.wire_bytes == 2 * wanted * row_bytes, name

    check_rounded_messages(exchange, rows, X_NP, assert_near)

    # Rounding decides nothing: many steps of a doubly stochastic matrix conserve the mean.
    W_NN, block = mixing_matrices(len(X_NP))["ring"], rows()
    for _ in range(3):
        exchange.mix_(block, W_NN)
    assert_near(exchange.mean(block), X_NP.mean(axis=0))

    with pytest.raises(ValueError, match=f"mixing matrix of shape .* for {len(X_NP)} clients"):
        exchange.mix_(rows(), np.eye(len(X_NP) + 1))


def check_rounded_messages(exchange: Exchange, rows: MakeRows, X_NP: np.ndarray, assert_near: AssertNear) -> None:
    """With a ``message_dtype`` others see rounded rows, on whichever rank they are; the own row stays exact."""
    mine = slice(exchange.clients.start, exchange.clients.stop)
    rounded = torch.from_numpy(X_NP).bfloat16().double().numpy()
    number_bytes = min(rows().element_size(), 2)
    exchange.message_dtype = torch.bfloat16
    for name, W_NN in mixing_matrices(len(X_NP)).items():
        exchange.reset_counts()
        block, own = rows(), np.diag(np.diag(W_NN))
        exchange.mix_(block, W_NN)
        assert_near(block, (own @ X_NP + (W_NN - own) @ rounded)[mine])
        receivers = (W_NN != 0).sum(axis=0) - 1
        message_bytes = X_NP.shape[1] * number_bytes
        np.testing.assert_array_equal(exchange.sent_bytes, receivers * message_bytes, err_msg=name)
        hosts = [exchange.layout.clients_of(host) for host in range(exchange.layout.num_hosts) if host != exchange.host]
        wanted = sum((W_NN[host.start : host.stop, mine] != 0).any(axis=0).sum() for host in hosts)
        assert exchange.wire_bytes == wanted * message_bytes, name
    exchange.message_dtype = None


def check_means(
    exchange: Exchange,
    rows: MakeRows,
    X_NP: np.ndarray,
    row_bytes: int,
    assert_near: AssertNear,
    assert_same_on_all_ranks: Callable[[Tensor], None],
) -> None:
    """Weighted means, the same bits everywhere; only an upload counts as communication."""
    num_clients = len(X_NP)
    draw = np.random.default_rng(2)
    p_N = draw.uniform(0.5, 1.0, num_clients)
    p_N /= p_N.sum()
    exchange.reset_counts()
    for mean, expected in ((exchange.mean(rows()), X_NP.mean(axis=0)), (exchange.mean(rows(), p_N), p_N @ X_NP)):
        assert_near(mean, expected)
        assert_same_on_all_ranks(mean)
    assert exchange.total_bytes == 0

    cohort = np.sort(draw.choice(num_clients, (num_clients + 1) // 2, replace=False))
    p_N[np.setdiff1d(np.arange(num_clients), cohort)] = 0
    p_N /= p_N.sum()
    block = rows()
    for slot, client in enumerate(exchange.clients):
        if client not in cohort:
            block[slot] = torch.nan  # whatever an absent client holds
    expected = p_N[cohort] @ X_NP[cohort]
    assert_near(exchange.mean(block, p_N), expected)
    assert exchange.total_bytes == 0
    uploaded = exchange.upload_mean(block, p_N)
    assert_near(uploaded, expected)
    assert_same_on_all_ranks(uploaded)
    np.testing.assert_array_equal(exchange.sent_bytes, np.isin(np.arange(num_clients), cohort) * row_bytes)
    assert exchange.server_bytes == 0


def check_server(exchange: Exchange, rows: MakeRows, X_NP: np.ndarray, row_bytes: int, assert_near: AssertNear) -> None:
    """A download becomes the receivers' rows, and only theirs."""
    exchange.reset_counts()
    num_clients = len(X_NP)
    receivers = np.sort(np.random.default_rng(3).choice(num_clients, (num_clients + 1) // 2, replace=False))
    block = rows()
    vector = torch.linspace(-1, 1, block.shape[1]).to(block)
    exchange.download(vector, block, receivers)
    expected = X_NP.copy()
    expected[receivers] = vector.double().cpu().numpy()
    np.testing.assert_array_equal(
        block.double().cpu().numpy(), expected[exchange.clients.start : exchange.clients.stop]
    )
    vector.zero_()  # the rows are copies
    np.testing.assert_array_equal(
        block.double().cpu().numpy(), expected[exchange.clients.start : exchange.clients.stop]
    )
    assert exchange.server_bytes == exchange.total_bytes == len(receivers) * row_bytes
    assert not exchange.sent_bytes.any()


def check_gathering(exchange: Exchange) -> None:
    """Every rank sees all clients' float64 numbers, unrounded."""
    exchange.reset_counts()
    values_N = np.random.default_rng(4).uniform(size=exchange.layout.num_clients) * 1e6
    gathered = exchange.gather_rows(values_N[exchange.clients.start : exchange.clients.stop])
    assert gathered.dtype == np.float64
    np.testing.assert_array_equal(gathered, values_N)
    total = exchange.sum(torch.ones(3, dtype=torch.float64))
    np.testing.assert_array_equal(total.numpy(), np.full(3, exchange.layout.num_hosts))
    assert exchange.total_bytes == exchange.wire_bytes == 0


def check_sharing(exchange: Exchange) -> None:
    """Messages reach those that need them, in the order of clients; several may be on their way at once."""
    num_clients, mine = exchange.layout.num_clients, exchange.clients
    supports = {**mixing_matrices(num_clients), "everyone": exchange.everyone}
    draw = np.random.default_rng(5)
    for name, support_NN in supports.items():
        exchange.reset_counts()
        on_their_way = []
        for length in (7, 0, 1000):
            common = torch.from_numpy(draw.integers(0, 256, (num_clients, length), dtype=np.uint8))
            messages = common[mine.start : mine.stop].clone()
            on_their_way.append((common, messages, exchange.share(messages, support_NN)))
        for common, messages, shared in reversed(on_their_way):
            received, senders = shared.receive(), list(shared.senders)
            assert received.dtype == torch.uint8 and received.shape == (len(senders), common.shape[1]), name
            assert senders == sorted(set(senders)), name
            needed = np.flatnonzero((support_NN[mine.start : mine.stop] != 0).any(axis=0))
            assert set(needed) <= set(senders), name
            assert torch.equal(received, common[senders]), name
            assert torch.equal(messages, common[mine.start : mine.stop]), name
        hosts = [exchange.layout.clients_of(host) for host in range(exchange.layout.num_hosts) if host != exchange.host]
        wanted = sum(
            (support_NN[host.start : host.stop, mine.start : mine.stop] != 0).any(axis=0).sum() for host in hosts
        )
        assert exchange.wire_bytes == 1007 * wanted, name

        assert exchange.total_bytes == 0, name  # the caller counts, once for all parts of a message
        exchange.count_messages(support_NN, 1007)
        receivers = (support_NN != 0).sum(axis=0) - 1
        np.testing.assert_array_equal(exchange.sent_bytes, 1007 * receivers, err_msg=name)
        assert exchange.server_bytes == 0

"""The exchange between ranks that may die: it is the ordinary one while all live, and what it becomes when they do not.

Shapes: N = clients of the federation, C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from elastic_ranks import ElasticRanks
from exchange_contract import TOLERANCE, check_mixing, check_server
from torch import Tensor

from lightning_fed.federation.elastic_exchange import ElasticExchange
from lightning_fed.federation.exchange import COLUMNS_PER_BLOCK, LoopbackExchange
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.peer_network import PeerLost, PeerNetwork, connect_store, store_address
from lightning_fed.federation.peers import Peers
from lightning_fed.topology import Complete, Ring

# Short where ranks die; long where none does, and a busy machine must not be taken for a dead rank.
PING_TIMEOUT, PATIENCE = 0.5, 20.0
NUM_CLIENTS, WIDTH = 8, 5


@contextmanager
def exchange_on_this_rank(
    num_clients: int = NUM_CLIENTS, ping_timeout: float = PATIENCE, message_timeout: float = 30.0
) -> Iterator[ElasticExchange]:
    """This rank's exchange, when all ranks have theirs; its peers are left at the end."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    peers = Peers(rank, world_size, 0, ping_timeout, message_timeout)
    exchange = ElasticExchange(Layout(num_clients, world_size), peers)
    peers.start()
    try:
        yield exchange
        leave_together(peers)
    finally:
        peers.close()


def leave_together(peers: Peers) -> None:
    """Whoever is done goes on to answer pings until all that live are done."""
    network, store = peers.network, peers.network.store
    store.set(f"done/{network.rank}", "")

    def busy() -> set[int]:
        return {rank for rank in range(network.num_ranks) if not store.check([f"done/{rank}"])}

    while network.ping(busy(), PING_TIMEOUT) & busy():
        time.sleep(0.02)


def common_rows(num_clients: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[N, P]``, the same on all ranks."""
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (num_clients, width))).to(dtype)


def own(exchange: ElasticExchange, common_NP: Tensor) -> Tensor:
    return common_NP[exchange.clients.start : exchange.clients.stop].clone()


# ------------------------------------------------------------------------------------------------------- all alive


def keep_the_contract(num_clients: int) -> None:
    with exchange_on_this_rank(num_clients) as exchange:
        cases = [(width, dtype) for width in (37, 1, COLUMNS_PER_BLOCK[1] + 5) for dtype in TOLERANCE]
        for round, (width, dtype) in enumerate(cases):
            common = common_rows(num_clients, width, dtype)

            def rows(common: Tensor = common) -> Tensor:
                return own(exchange, common)

            def assert_near(actual: Tensor, expected: np.ndarray, dtype: torch.dtype = dtype) -> None:
                if actual.dim() == 2 or exchange.survivors.is_leader:  # of all clients, only the leader has the mean
                    assert actual.dtype == dtype
                    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=TOLERANCE[dtype])

            exchange.begin_round(round, [])
            check_mixing(exchange, rows, common.double().numpy(), width * dtype.itemsize, assert_near)
            check_server(exchange, rows, common.double().numpy(), width * dtype.itemsize, assert_near)


@pytest.mark.parametrize("num_clients", [4, 13, 40])
def test_mixing_keeps_the_contract_while_all_live(num_clients: int) -> None:
    with ElasticRanks(4, keep_the_contract, num_clients) as ranks:
        ranks.results()


def average_rounds(rounds: int) -> list[np.ndarray]:
    """Uploads of a changing cohort, which the mean of all evaluates."""
    averages = []
    with exchange_on_this_rank() as exchange:
        for round in range(rounds):
            exchange.begin_round(round, [])
            weights = cohort_weights(round)
            rows = own(exchange, common_rows(NUM_CLIENTS, WIDTH, torch.float32))
            rows[weights[exchange.clients.start : exchange.clients.stop] == 0] = torch.nan
            averages.append(exchange.upload_mean(rows, weights).numpy())
        expected_bytes = sum((cohort_weights(round) != 0) * WIDTH * 4 for round in range(rounds))
        np.testing.assert_array_equal(exchange.sent_bytes, expected_bytes)
    return averages


def cohort_weights(round: int) -> np.ndarray:
    weights = np.random.default_rng(round).uniform(size=NUM_CLIENTS)
    weights[[round % NUM_CLIENTS, (round + 1) % NUM_CLIENTS, (round + 2) % NUM_CLIENTS]] = 0
    return weights / weights.sum()


def test_a_server_average_has_the_same_bits_everywhere() -> None:
    with ElasticRanks(4, average_rounds, 6) as ranks:
        results = ranks.results()
    single, common = LoopbackExchange(Layout(NUM_CLIENTS)), common_rows(NUM_CLIENTS, WIDTH, torch.float32)
    for round in range(6):
        expected = single.upload_mean(common, cohort_weights(round))
        np.testing.assert_allclose(results[0][round], expected.numpy(), rtol=0, atol=2e-7)
        assert all(np.array_equal(results[rank][round], results[0][round]) for rank in range(4))


# ------------------------------------------------------------------------------------------------------ some not


def mix_rounds(rounds: int, name: str, pause: float = 0.0) -> dict[str, Any]:
    """Rounds of gossip; returns the rows before and after each, and whether this rank took part in it."""
    weights_NN = {"ring": Ring(), "complete": Complete()}[name].weights(NUM_CLIENTS)
    history = []
    with exchange_on_this_rank(ping_timeout=PING_TIMEOUT) as exchange:
        store = exchange.network.store
        rows = own(exchange, common_rows(NUM_CLIENTS, WIDTH))
        for round in range(rounds):
            here = exchange.takes_part(round)
            if here:
                time.sleep(pause)
                rows += exchange.host + 1.0
            before = rows.clone()
            exchange.begin_round(round, [])
            exchange.mix_(rows, weights_NN)
            history.append((here, before.numpy(), rows.numpy().copy()))
            store.add("rounds", 1)
            store.set(f"round/{exchange.host}", str(round))
    return {"history": history, "bytes": exchange.sent_bytes, "clients": exchange.clients}


def await_round(ranks: ElasticRanks, rank: int, round: int) -> None:
    deadline = time.monotonic() + 20
    key = f"lightning_fed/0/round/{rank}"
    ranks.await_key(key)
    while int(ranks.store.get(key)) < round:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("name", ["ring", "complete"])
def test_survivors_of_a_killed_rank_mix_with_a_doubly_stochastic_matrix(name: str, victim: int) -> None:
    with ElasticRanks(4, mix_rounds, 12, name, 0.1) as ranks:
        await_round(ranks, victim, 2)
        ranks.kill(victim)
        results = ranks.results()
    assert sorted(results) == [rank for rank in range(4) if rank != victim]
    # The victim has died in round 3, or in a later one: from 5 on the survivors are among themselves.
    for round in range(5, 12):
        before = np.concatenate([results[rank]["history"][round][1] for rank in sorted(results)])
        after = np.concatenate([results[rank]["history"][round][2] for rank in sorted(results)])
        np.testing.assert_allclose(before.sum(0), after.sum(0), rtol=0, atol=1e-11)
        assert np.ptp(after) < np.ptp(before)
    # They sent nothing to the dead: in round 11 as in a federation without its clients.
    gone = Layout(NUM_CLIENTS, 4).clients_of(victim)
    weights = {"ring": Ring(), "complete": Complete()}[name].weights(NUM_CLIENTS)
    for rank, result in results.items():
        for client in result["clients"]:
            everyone = (weights[:, client] != 0).sum() - 1
            living = everyone - (weights[list(gone), client] != 0).sum()
            assert 8 * WIDTH * 12 * living <= result["bytes"][client] <= 8 * WIDTH * 12 * everyone, rank
            if living < everyone:
                assert result["bytes"][client] < 8 * WIDTH * 12 * everyone


def test_both_sides_agree_which_rounds_a_stopped_rank_has_missed() -> None:
    rounds, sleeper = 45, 1
    with ElasticRanks(4, mix_rounds, rounds, "ring", 0.08) as ranks:
        await_round(ranks, sleeper, 3)
        ranks.stop(sleeper)
        time.sleep(5 * PING_TIMEOUT)
        ranks.resume(sleeper)
        results = ranks.results()
    missed = 0
    for round in range(rounds):
        steps = [results[rank]["history"][round] for rank in range(4)]
        before, after = (np.concatenate([step[index] for step in steps]) for index in (1, 2))
        # Symmetric edges only: the sum of all rows is conserved, whoever was away.
        np.testing.assert_allclose(before.sum(0), after.sum(0), rtol=0, atol=1e-11)
        missed += not steps[sleeper][0]
    assert missed >= 2  # it has not trained in rounds that were over
    assert all(step[0] for rank in (0, 2, 3) for step in results[rank]["history"])
    assert results[sleeper]["history"][-1][0]  # but takes part again
    _, _, after = results[sleeper]["history"][-1]
    X = np.concatenate([results[rank]["history"][-1][1] for rank in range(4)])
    np.testing.assert_allclose(after, (Ring().weights(NUM_CLIENTS) @ X)[2:4], rtol=0, atol=1e-12)


class FailingLinks:
    """Fails to send, as after a timeout, while the store has the key "cut".

    Args:
        network: of this rank.
        links: each from a rank to another one.
    """

    def __init__(self, network: PeerNetwork, links: Sequence[tuple[int, int]]) -> None:
        self.inbox, self.deliver = network.inbox, network.send
        self.unreached = {receiver for sender, receiver in links if sender == network.rank}
        address = store_address()
        assert address is not None
        self.store = connect_store(*address, timeout=30)
        network.send = self.send  # type: ignore[method-assign]

    def send(self, rank: int, header: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        if rank in self.unreached and self.store.check(["cut"]):
            threading.Timer(PING_TIMEOUT / 2, self.inbox.put, [PeerLost(rank)]).start()
        else:
            self.deliver(rank, header, tensors)


def upload_rounds(
    rounds: int, pause: float, links: Sequence[tuple[int, int]] = (), message_timeout: float = 30.0
) -> list[tuple[bool, np.ndarray]]:
    """For each round whether this rank has taken part, and the average, of it or of a newer one."""
    history = []
    with exchange_on_this_rank(ping_timeout=PING_TIMEOUT, message_timeout=message_timeout) as exchange:
        FailingLinks(exchange.network, links)
        for round in range(rounds):
            here = exchange.takes_part(round)
            if here:
                time.sleep(pause)
            exchange.begin_round(round, [])
            rows = own(exchange, common_rows(NUM_CLIENTS, WIDTH)) + round
            average = exchange.upload_mean(rows, np.full(NUM_CLIENTS, 1 / NUM_CLIENTS))
            history.append((here, average.numpy()))
            exchange.network.store.set(f"round/{exchange.host}", str(round))
    return history


@pytest.mark.parametrize("victim", [0, 1])
def test_the_average_goes_on_without_a_killed_rank(victim: int) -> None:
    with ElasticRanks(4, upload_rounds, 12, 0.1) as ranks:
        await_round(ranks, victim, 2)
        ranks.kill(victim)
        results = ranks.results()
    survivors = [rank for rank in range(4) if rank != victim]
    assert sorted(results) == survivors
    common = common_rows(NUM_CLIENTS, WIDTH).numpy()
    lasting = np.concatenate([common[2 * rank : 2 * rank + 2] for rank in survivors]).mean(0)
    for round in range(12):
        averages = [results[rank][round][1] for rank in survivors]
        assert all(np.array_equal(average, averages[0]) for average in averages)
        # Before the death the mean of all, after it of the survivors.
        expected = [mean + round for mean in (common.mean(0), lasting)][round > 4 :]
        assert any(np.allclose(averages[0], mean, rtol=0, atol=1e-12) for mean in expected), round


@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_stopped_rank_gets_the_newest_average_and_takes_part_again(sleeper: int) -> None:
    rounds = 45
    with ElasticRanks(4, upload_rounds, rounds, 0.08) as ranks:
        await_round(ranks, sleeper, 3)
        ranks.stop(sleeper)
        time.sleep(5 * PING_TIMEOUT)
        ranks.resume(sleeper)
        results = ranks.results()
    awake = [results[rank] for rank in range(4) if rank != sleeper]
    for round in range(rounds):
        assert all(np.array_equal(history[round][1], awake[0][round][1]) for history in awake)
    missed = [round for round in range(rounds) if not results[sleeper][round][0]]
    assert missed
    for round in range(missed[-1], rounds):
        assert np.array_equal(results[sleeper][round][1], awake[0][round][1])
    common = common_rows(NUM_CLIENTS, WIDTH).numpy()
    np.testing.assert_allclose(awake[0][-1][1], common.mean(0) + rounds - 1, rtol=0, atol=1e-12)


def means_of(ranks: set[int]) -> np.ndarray:
    """Of the clients of some ranks in round 0."""
    common = common_rows(NUM_CLIENTS, WIDTH).numpy()
    return common[[client for rank in sorted(ranks) for client in Layout(NUM_CLIENTS, 3).clients_of(rank)]].mean(axis=0)


@pytest.mark.parametrize(
    ("links", "going_on"),
    [
        ([(0, 1), (1, 0)], {0, 2}),  # between the leader and one other
        ([(0, 1), (1, 0), (0, 2), (2, 0)], {1, 2}),  # the leader's to all others
        ([(0, 1)], {0, 1, 2}),  # a rank uploads its parts, but does not get the averages
    ],
    ids=["one rank", "all ranks", "one way"],
)
def test_ranks_without_a_link_to_the_leader_go_on(links: list[tuple[int, int]], going_on: set[int]) -> None:
    last = 60
    with ElasticRanks(3, upload_rounds, last + 1, 0.05, links, 2 * PING_TIMEOUT) as ranks:
        await_round(ranks, 2, 3)
        ranks.store.set("cut", "")
        await_round(ranks, 2, 12)
        ranks.store.delete_key("cut")
        results = {
            rank: {round: average for round, (here, average) in enumerate(history) if here}
            for rank, history in ranks.results().items()
        }
    for round, average in results[2].items():
        means = [means_of(who) + round for who in ({0, 1, 2}, going_on, {0, 2})]
        assert any(np.allclose(average, mean, rtol=0, atol=1e-12) for mean in means), round
    for history in results.values():
        assert len(history) > 5
        for round, average in history.items():  # of this round, or of a newer one
            assert any(np.array_equal(average, other) for at, other in results[2].items() if at >= round), round
        np.testing.assert_allclose(history[last], means_of({0, 1, 2}) + last, rtol=0, atol=1e-12)  # all again
    if len(going_on) == 2:
        np.testing.assert_allclose(results[2][8], means_of(going_on) + 8, rtol=0, atol=1e-12)


def mix_over(links: list[tuple[int, int]], until: int, pause: float) -> list[np.ndarray]:
    """This rank's rows after each round of mixing with everybody."""
    history = []
    with exchange_on_this_rank(ping_timeout=PING_TIMEOUT, message_timeout=2 * PING_TIMEOUT) as exchange:
        FailingLinks(exchange.network, links)
        rows = own(exchange, common_rows(NUM_CLIENTS, WIDTH))
        weights = 0.9 * np.eye(NUM_CLIENTS) + 0.1 * Complete().weights(NUM_CLIENTS)
        for round in range(until + 1):
            time.sleep(pause)
            exchange.begin_round(round, [])
            exchange.mix_(rows, weights)
            history.append(rows.numpy().copy())
            exchange.network.store.set(f"round/{exchange.host}", str(round))
    return history


def test_ranks_without_a_link_mix_with_the_others_and_then_again() -> None:
    with ElasticRanks(3, mix_over, [(0, 1), (1, 0)], 120, 0.05) as ranks:
        await_round(ranks, 2, 3)
        ranks.store.set("cut", "")
        await_round(ranks, 2, 20)
        ranks.store.delete_key("cut")
        results = ranks.results()
    start = common_rows(NUM_CLIENTS, WIDTH).numpy()
    rounds = [np.concatenate([results[rank][round] for rank in range(3)]) for round in range(121)]
    spreads = [float(np.ptp(X, axis=0).max()) for X in [start, *rounds]]
    for X in rounds:  # the matrix was doubly stochastic in every round
        np.testing.assert_allclose(X.mean(axis=0), start.mean(axis=0), rtol=0, atol=1e-12)
    factors = np.array(spreads[1:]) / np.array(spreads[:-1])
    np.testing.assert_allclose(factors[[0, 1, 2, -3, -2, -1]], 0.9, rtol=0, atol=1e-9)
    assert (factors[8:15] > 0.9 + 1e-3).all()  # without the link it takes longer


def spoil_a_client() -> dict[int, np.ndarray]:
    """Client 3 is excluded: its row is zero, and others ignore it."""
    with exchange_on_this_rank() as exchange:
        rows = own(exchange, common_rows(NUM_CLIENTS, WIDTH))
        bad = [client for client in exchange.clients if client == 3]
        for client in bad:
            rows[client - exchange.clients.start] = 0
        exchange.begin_round(0, bad)
        exchange.mix_(rows, Ring().weights(NUM_CLIENTS))
        return {client: rows[slot].numpy() for slot, client in enumerate(exchange.clients)}


def test_an_excluded_client_gets_the_mean_of_its_neighbours() -> None:
    with ElasticRanks(4, spoil_a_client) as ranks:
        rows = {client: row for result in ranks.results().values() for client, row in result.items()}
    X = common_rows(NUM_CLIENTS, WIDTH).numpy()
    np.testing.assert_allclose(rows[3], (X[2] + X[4]) / 2, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rows[2], (2 * X[2] + X[1]) / 3, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rows[4], (2 * X[4] + X[5]) / 3, rtol=0, atol=1e-12)

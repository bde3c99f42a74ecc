"""Ranks talk while others are killed, stopped and restarted. The test's own process is one rank more."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
from elastic_ranks import ElasticRanks
from torch import Tensor

from lightning_fed.federation.peer_links import Parcel
from lightning_fed.federation.peer_network import PeerLost, PeerNetwork, Received, store_address

SEND_TIMEOUT = 1.0
CONNECT_TIMEOUT = 30.0


def serve() -> dict[str, Any]:
    """Do what messages say until one says "end"; returns which ranks were lost, in order."""
    address = store_address()
    assert address is not None
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) + 1
    network = PeerNetwork(*address, rank, num_ranks, send_timeout=SEND_TIMEOUT, connect_timeout=CONNECT_TIMEOUT)
    lost = []
    while True:
        item = network.inbox.get()
        if isinstance(item, PeerLost):
            lost.append(item.rank)
            continue
        what, header = item.header.get("do"), {**item.header, "by": rank, "incarnation": network.incarnation}
        if what == "note":
            network.note(item.sender, {**header, "do": "nothing"})
        elif what == "flush":
            assert network.flush(5)
            network.note(item.sender, header)
        elif what == "echo":
            network.send(item.sender, {**header, "do": "nothing"}, item.tensors)
        elif what == "relay":
            network.send(header["to"], {**header, "do": "pass on", "origin": item.sender}, item.tensors)
        elif what == "pass on":
            network.send(header["origin"], {**header, "do": "nothing"}, item.tensors)
        elif what == "compute":
            end = time.monotonic() + header["seconds"]
            while time.monotonic() < end:
                sum(range(1000))
        elif what == "end":
            assert network.flush(5)
            network.close()
            return {"lost": lost}


@contextmanager
def served(
    num_servants: int, send_timeout: float = SEND_TIMEOUT, connect_timeout: float = CONNECT_TIMEOUT
) -> Iterator[tuple[ElasticRanks, PeerNetwork]]:
    """Ranks that :func:`serve`, and this process as the last rank, whose timeouts these are."""
    with ElasticRanks(num_servants, serve) as ranks:
        network = PeerNetwork(
            "127.0.0.1",
            ranks.store.port,
            num_servants,
            num_servants + 1,
            send_timeout=send_timeout,
            connect_timeout=connect_timeout,
        )
        try:
            await_ranks(network, range(num_servants))
            yield ranks, network
        finally:
            network.close()


def await_ranks(network: PeerNetwork, ranks: Any, timeout: float = 90.0) -> None:
    end = time.monotonic() + timeout
    while network.ping(ranks, 0.5) != set(ranks):
        assert time.monotonic() < end


def received(network: PeerNetwork, timeout: float = 30.0) -> Received:
    item = network.inbox.get(timeout=timeout)
    assert isinstance(item, Received), item
    return item


def lost(network: PeerNetwork, timeout: float = 30.0) -> int:
    item = network.inbox.get(timeout=timeout)
    assert isinstance(item, PeerLost), item
    return item.rank


def echo(network: PeerNetwork, rank: int, *tensors: Tensor, **header: Any) -> Received:
    """Send something and wait until it comes back."""
    network.send(rank, {"do": "echo", **header}, tensors)
    return received(network)


def end(ranks: ElasticRanks, network: PeerNetwork, living: list[int]) -> dict[int, Any]:
    for rank in living:
        network.note(rank, {"do": "end"})
    return ranks.results(60)


def test_notes_arrive_in_order_at_others_and_at_oneself() -> None:
    with served(1) as (_, network):
        for rank in (0, 1):
            for number in range(50):
                network.note(rank, {"do": "note", "number": number, "text": "ü"})
            answers = [received(network) for _ in range(50)]
            assert [answer.header["number"] for answer in answers] == list(range(50))
            assert {answer.sender for answer in answers} == {rank}
            assert answers[0].header["text"] == "ü" and answers[0].tensors == []
        assert network.wire_bytes == 0


def test_tensors_of_every_kind_come_back_unchanged() -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = [torch.randn(3, 5).to(dtype) for dtype in floats]
    tensors += [torch.randint(-9, 9, (2, 1, 4)), torch.arange(256, dtype=torch.uint8), torch.tensor([True, False])]
    tensors += [torch.tensor(1.5), torch.empty(0), torch.empty(3, 0, 2), torch.randn(4, 6).t()]
    tensors += [torch.randn(2_500_000), torch.nn.Parameter(torch.randn(2)), torch.full((2,), float("nan"))]
    with served(1) as (_, network):
        for rank in (0, 1):  # another one, and oneself
            answer = echo(network, rank, *tensors)
            assert [tensor.dtype for tensor in answer.tensors] == [tensor.dtype for tensor in tensors]
            for sent, got in zip(tensors, answer.tensors, strict=True):
                assert got.shape == sent.shape and not got.requires_grad
                assert torch.equal(got.nan_to_num(7), sent.detach().nan_to_num(7))
            assert network.flush(5)
        assert network.wire_bytes == sum(tensor.nbytes for tensor in tensors)


def test_what_is_sent_is_what_the_tensor_held_at_that_time() -> None:
    with served(1) as (_, network):
        row = torch.zeros(1_000_000)
        for number in range(5):
            row.fill_(number)
            network.send(0, {"do": "echo"}, [row])
            network.send(1, {}, [row])
        row.fill_(-1)
        seen: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(10):
            answer = received(network)
            assert (answer.tensors[0] == answer.tensors[0][0]).all()
            seen[answer.sender].append(answer.tensors[0][0].item())
        assert seen == {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3, 4]}


def test_messages_of_one_sender_keep_their_order() -> None:
    with served(2) as (_, network):
        for number in range(100):
            sizes = [(number * 7919) % 5000, number % 3]
            network.send(number % 2, {"do": "echo", "number": number}, [torch.full((n,), number) for n in sizes])
        numbers: dict[int, list[int]] = {0: [], 1: []}
        for _ in range(100):
            answer = received(network)
            numbers[answer.sender].append(answer.header["number"])
            assert all((tensor == answer.header["number"]).all() for tensor in answer.tensors)
        assert numbers == {0: list(range(0, 100, 2)), 1: list(range(1, 100, 2))}


def test_ping_tells_who_runs_whatever_its_main_thread_does() -> None:
    with served(4) as (ranks, network):
        assert network.ping(range(5), 5) == {0, 1, 2, 3, 4}
        ranks.kill(0)
        ranks.stop(1)
        network.note(2, {"do": "compute", "seconds": 3})
        time.sleep(0.2)
        begin = time.monotonic()
        assert network.ping([2, 3], 2.5) == {2, 3}
        assert time.monotonic() - begin < 2.5
        assert network.ping(range(4), 1) == {2, 3}
        ranks.resume(1)
        assert network.ping([1], 5) == {1}
        assert network.ping([], 0) == set()


def test_a_rank_that_has_not_started_gets_its_notes_later() -> None:
    with ElasticRanks(0, serve) as ranks:
        address = "127.0.0.1", ranks.store.port
        early = PeerNetwork(*address, rank=0, num_ranks=2)
        begin = time.monotonic()
        early.note(1, {"number": 1})
        assert early.ping([1], 0.1) == set()
        early.send(1, {"number": 2}, [torch.ones(3)])
        assert time.monotonic() - begin < 1
        late = PeerNetwork(*address, rank=1, num_ranks=2)
        assert [received(late).header["number"] for _ in range(2)] == [1, 2]
        assert early.flush(1)
        early.close()
        late.close()


def test_a_killed_rank_is_noticed_and_the_others_go_on() -> None:
    with served(3) as (ranks, network):
        for rank in range(3):
            echo(network, rank)
        ranks.kill(1)
        assert lost(network) == 1
        network.send(1, {"do": "echo"}, [])
        assert lost(network) == 1
        network.send(0, {"do": "relay", "to": 2}, [torch.arange(4.0)])
        answer = received(network)
        assert answer.sender == 2 and torch.equal(answer.tensors[0], torch.arange(4.0))
        assert sorted(end(ranks, network, [0, 2])) == [0, 2]


def test_a_rank_killed_amid_a_stream_of_messages_harms_nobody_else() -> None:
    with served(3) as (ranks, network):
        row = torch.randn(250_000)
        for number in range(60):
            network.send(number % 3, {"do": "echo"}, [row])
            if number == 30:
                ranks.kill(0)
        answers = {1: 0, 2: 0}
        while min(answers.values()) < 20:
            item = network.inbox.get(timeout=30)
            if isinstance(item, PeerLost):
                assert item.rank == 0
            elif item.sender != 0:
                answers[item.sender] += 1


def test_ranks_meet_anew_after_rank_0_was_killed() -> None:
    with served(3) as (ranks, network):
        ranks.kill(0)
        for first, second in ((1, 2), (2, 1)):  # no link existed before
            network.send(first, {"do": "relay", "to": second}, [torch.ones(2)])
            assert received(network).sender == second
        assert sorted(end(ranks, network, [1, 2])) == [1, 2]


def test_a_stopped_rank_is_lost_and_comes_back_over_a_new_link() -> None:
    with served(2) as (ranks, network):
        echo(network, 0)
        network.note(0, {"do": "flush"})  # stopped amid a message of its own, it would lose that link as well
        received(network)
        ranks.stop(0)
        for _ in range(3):
            network.send(0, {"do": "echo"}, [torch.ones(300_000)])
        assert lost(network) == 0  # the two messages behind it are lost without a word of their own
        assert echo(network, 1).sender == 1
        assert network.flush(0)
        ranks.resume(0)
        # A signal takes effect when it likes: the first message may have come through, and be answered now.
        network.send(0, {"do": "echo", "number": 1}, [torch.ones(5)])
        while not isinstance(item := network.inbox.get(timeout=30), Received) or "number" not in item.header:
            assert item == PeerLost(0) or item.sender == 0
        results = end(ranks, network, [0, 1])
        # Rank 0 does not hear of the loss if the new link comes first.
        assert set(results[0]["lost"]) <= {2} and results[1] == {"lost": []}


def test_a_restarted_rank_is_another_incarnation_and_gets_the_next_message() -> None:
    with served(1) as (ranks, network):
        assert echo(network, 0).header["incarnation"] == 1
        for incarnation in (2, 3):
            ranks.restart(0)
            assert lost(network) == 0
            await_ranks(network, [0])
            assert echo(network, 0).header["incarnation"] == incarnation


def test_a_link_to_a_rank_that_is_being_restarted_waits_for_it() -> None:
    with served(1) as (ranks, network):
        ranks.kill(0)
        network.send(0, {"do": "echo"}, [])
        time.sleep(0.2)
        ranks.restart(0)
        assert received(network).header["incarnation"] == 2


def test_an_idle_link_lives_longer_than_any_timeout() -> None:
    with served(1, connect_timeout=3.0) as (ranks, network):
        echo(network, 0)
        time.sleep(4)
        assert echo(network, 0).sender == 0
        assert end(ranks, network, [0]) == {0: {"lost": []}}


def test_messages_to_nobody_are_lost_in_time() -> None:
    with served(1, connect_timeout=3.0) as (ranks, network):
        ranks.kill(0)
        begin = time.monotonic()
        network.send(0, {}, [])
        assert not network.flush(0.1)
        assert lost(network) == 0
        assert 2.9 < time.monotonic() - begin < 9
        assert network.flush(0)


def test_close_leaves_no_thread_and_no_connection() -> None:
    process = psutil.Process()

    def meet() -> tuple[int, int, int]:
        with served(2) as (_, network):
            echo(network, 0)
            echo(network, 1)
            network.close()
            network.close()
            with pytest.raises(RuntimeError, match="closed"):
                network.send(0, {}, [])
            with pytest.raises(RuntimeError, match="closed"):
                network.note(0, {})
        del _, network
        gc.collect()
        return threading.active_count(), process.num_threads(), process.num_fds()

    first = meet()  # starts what all links of a process share
    assert meet() <= first


def test_close_does_not_wait_for_a_stopped_or_a_missing_rank() -> None:
    others = set(threading.enumerate())  # a link that an earlier test gave up may still end
    with served(2, send_timeout=60, connect_timeout=60) as (ranks, network):
        echo(network, 0)
        ranks.stop(0)
        ranks.kill(1)
        for rank in range(2):
            network.send(rank, {"do": "echo"}, [torch.ones(300_000)])
        time.sleep(0.2)
        begin = time.monotonic()
        network.close()
        assert time.monotonic() - begin < 10  # of the 60 that each of the two might take
        left = set(threading.enumerate()) - others
        assert not [thread for thread in left if thread.name.startswith(("send-to", "receive-from"))]


class Bomb:
    def __reduce__(self) -> Any:
        return os._exit, (1,)


@pytest.mark.parametrize(
    "text",
    [
        pickle.dumps(Bomb()),
        b'{"header": {}, "tensors": [["object", [1]]]}',
        b'{"header": {}, "tensors": [["float32", [-1]]]}',
        b'{"header": [], "tensors": []}',
        b'["header", "tensors"]',
        b"[" * 100_000,
    ],
    ids=["pickle", "dtype", "shape", "header", "list", "depth"],
)
def test_what_is_not_json_of_the_right_form_is_refused(text: bytes) -> None:
    with served(1) as (ranks, network):
        link = network._connect(0)
        with pytest.raises(RuntimeError):
            link.send(Parcel(torch.frombuffer(bytearray(text), dtype=torch.uint8), []), SEND_TIMEOUT)
        link.close()
        network.store.queue_push("mail/0/1", text.decode("latin1"))
        assert echo(network, 0).header["incarnation"] == 1
        assert end(ranks, network, [0]) == {0: {"lost": [1]}}


def test_what_cannot_be_sent_is_an_error_at_once() -> None:
    with served(0) as (_, network):
        with pytest.raises(ValueError, match="no rank 1 among 1"):
            network.note(1, {})
        with pytest.raises(ValueError, match="no rank -1"):
            network.send(-1, {}, [])
        with pytest.raises(TypeError, match="JSON"):
            network.note(0, {"tensor": torch.ones(1)})
        with pytest.raises(TypeError, match="must be a dict"):
            network.send(0, ["list"], [])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="complex64"):
            network.send(0, {}, [torch.ones(1, dtype=torch.complex64)])
        with pytest.raises(queue.Empty):
            network.inbox.get(block=False)


def test_a_store_that_is_not_there_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}"):
            PeerNetwork("127.0.0.1", port, 0, 1, connect_timeout=0.5)


def test_the_loss_of_the_store_is_told_as_the_loss_of_oneself() -> None:
    ranks = ElasticRanks(0, serve)
    network = PeerNetwork("127.0.0.1", ranks.store.port, 0, 2)
    del ranks.store
    assert lost(network) == 0
    with pytest.raises(RuntimeError):
        network.note(1, {})
    network.close()


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIGHTNING_FED_STORE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    assert store_address() is None
    monkeypatch.setenv("MASTER_ADDR", "node")
    monkeypatch.setenv("MASTER_PORT", "29400")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert store_address() == ("node", 29400)
    monkeypatch.setenv("LIGHTNING_FED_STORE", "[::1]:7")
    assert store_address() == ("::1", 7)
    monkeypatch.setenv("LIGHTNING_FED_STORE", "node")
    with pytest.raises(ValueError, match="host:port"):
        store_address()

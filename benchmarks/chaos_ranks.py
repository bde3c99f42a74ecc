"""Ranks that are killed and stopped, and how they end; each is forked from a warm process, which takes milliseconds."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from lightning_fed.federation.peer_network import STORE_VARIABLE

NEW_NETWORK = 0x40000000  # CLONE_NEWNET
# The same list as the tests have, whose server this is in a test.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning_fed", "lightning.pytorch", "torch.distributed", "sklearn.datasets"])


class Hang(Exception):
    """A process did not end in time."""


@dataclass(frozen=True)
class Place:
    """Where a rank lives: on this machine, or in a network namespace of its own.

    Attributes:
        namespace: its name; empty for none.
        interface: the only way out of it.
        host: address of the rank that all meet at, or of the store.
    """

    namespace: str = ""
    interface: str = ""
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class End:
    """How a rank has ended.

    Attributes:
        value: what its function has returned; None if it has not.
        error: the traceback of what it has raised; empty if nothing.
        seconds: from its start to its end.
    """

    value: Any
    error: str
    seconds: float

    @property
    def died(self) -> bool:
        """Without a word."""
        return self.value is None and not self.error


class Ranks:
    """Processes that call ``function(*args)``, as torchrun would start them; a context manager that leaves none.

    Args:
        size: how many.
        function: importable by name; what it returns is pickled.
        *args: of the function.
        places: where each of them lives; by default all on this machine.
        store: where the store of an elastic federation lives; None for ranks that meet at rank 0.
        log: a file to which all of them append what they print.
    """

    def __init__(
        self,
        size: int,
        function: Callable[..., Any],
        *args: Any,
        places: list[Place] | None = None,
        store: Place | None = None,
        log: str = os.devnull,
    ) -> None:
        self.start = time.monotonic()
        self._ends: dict[int, End] = {}
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._host: Any = None
        port = free_port()
        if store is not None:
            ready, said = _context.Pipe(duplex=False)
            self._host = _context.Process(target=host_store, args=(said, store, port))
            self._host.start()
            ready.recv()
        for rank in range(size):
            receiver, sender = _context.Pipe(duplex=False)
            place = places[rank] if places else Place()
            where = (rank, size, port, place, store is not None, log)
            process = _context.Process(target=run_rank, args=(sender, where, function, args))
            process.start()
            sender.close()
            self._processes.append(process)
            self._pipes.append(receiver)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        processes = [*self._processes, *([self._host] if self._host else [])]
        for process in processes:
            process.kill()  # also one that is stopped
        for process in processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal, if the rank lives."""
        if self._processes[rank].is_alive():
            os.kill(self._processes[rank].pid, number)

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return self._processes[rank].pid

    @property
    def are_running(self) -> bool:
        """Whether none has ended."""
        self._hear(0)
        return not self._ends

    def ends(self, seconds: float) -> dict[int, End]:
        """Wait until all processes are gone.

        Raises:
            Hang: naming the ranks that still run after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while len(self._ends) < len(self._pipes) and time.monotonic() < deadline:
            self._hear(max(deadline - time.monotonic(), 0))
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0.01))
        late = [rank for rank, process in enumerate(self._processes) if process.is_alive()]
        if late:
            raise Hang(f"ranks {late} still run after {seconds:.0f} s; ended: {self._ends}")
        return dict(sorted(self._ends.items()))

    def _hear(self, seconds: float) -> None:
        pending = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in self._ends}
        for pipe in wait(list(pending), seconds):
            assert isinstance(pipe, Connection)
            try:
                value, error = pipe.recv()
            except EOFError:
                value, error = None, ""
            self._ends[pending[pipe]] = End(value, error, time.monotonic() - self.start)


def free_port() -> int:
    """A port that nobody listens at, on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def move_to(place: Place) -> None:
    """Put this thread, and those that it starts, into a network namespace."""
    if place.namespace:
        with open(f"/var/run/netns/{place.namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {place.namespace}")
        os.environ["GLOO_SOCKET_IFNAME"] = place.interface


def host_store(said: Connection, place: Place, port: int) -> None:
    """What outlives the ranks of an elastic federation."""
    import torch.distributed as dist

    move_to(place)
    store = dist.TCPStore(place.host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    said.send(store.port)
    signal.pause()


def run_rank(
    sender: Connection,
    where: tuple[int, int, int, Place, bool, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """A rank's whole life."""
    import torch

    rank, size, port, place, elastic, log = where
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    move_to(place)
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR=place.host,
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        TORCHELASTIC_RUN_ID="chaos",
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
    )
    if elastic:
        os.environ[STORE_VARIABLE] = f"{place.host}:{port}"
    try:
        sender.send((function(*args), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

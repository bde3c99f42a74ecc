"""Run a function on real ranks that the test kills, stops and restarts, and collect what the others return."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from lightning_fed.federation.peer_network import STORE_VARIABLE

# Children fork from a server process that has imported the slow packages once. It is shared with tests/ranks.py.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning_fed", "lightning.pytorch", "torch.distributed", "sklearn.datasets"])


class ElasticRanks:
    """Ranks that call ``function(*args)``, with a store that outlives each of them; use as a context manager.

    The function must be importable by name. It finds its rank in ``RANK``, as under torchrun, and the store by
    ``store_address()``. Its result is pickled. All processes are killed when the context ends.

    Attributes:
        store: a client of the ranks' store, for what a test and its ranks tell each other.
    """

    def __init__(self, world_size: int, function: Callable[..., Any], *args: Any) -> None:
        self.world_size, self.function, self.args = world_size, function, args
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, Connection] = {}
        self._results: dict[int, Any] = {}

    def __enter__(self) -> ElasticRanks:
        try:
            for rank in range(self.world_size):
                self._start(rank)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()  # also one that is stopped
        for process in self._processes.values():
            process.join()
            process.close()
        for pipe in self._pipes.values():
            pipe.close()

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return self._processes[rank].pid

    def kill(self, rank: int) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._processes[rank].kill()
        self._processes[rank].join()

    def stop(self, rank: int) -> None:
        """SIGSTOP: the process neither runs nor ends."""
        os.kill(self.pid(rank), signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        """SIGCONT."""
        os.kill(self.pid(rank), signal.SIGCONT)

    def restart(self, rank: int) -> None:
        """Start a rank again; kills it first if it lives."""
        self.kill(rank)
        self._pipes.pop(rank).close()
        self._results.pop(rank, None)
        self._start(rank)

    def await_key(self, key: str, timeout: float = 30.0) -> bytes:
        """Wait until a rank has written a key (without prefix) to the store; returns its value.

        Raises:
            AssertionError: with the traceback of a rank that failed, or if nothing came in time (seconds).
        """
        deadline = time.monotonic() + timeout
        while not self.store.check([key]):
            self._collect(0)
            assert time.monotonic() < deadline, f"no rank has written {key!r} within {timeout} s"
            time.sleep(0.01)
        return self.store.get(key)

    def results(self, timeout: float = 60.0) -> dict[int, Any]:
        """What each rank has returned, by rank; those that were killed before are not in it.

        Raises:
            AssertionError: with the traceback of a rank that failed, or if one still runs after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while self._pending():
            assert self._collect(deadline - time.monotonic()), f"ranks {self._pending()} did not end in {timeout} s"
        return dict(self._results)

    def await_ends(self, *ranks: int, timeout: float = 30.0) -> None:
        """Wait until some ranks have returned.

        Raises:
            AssertionError: as :meth:`results` does.
        """
        deadline = time.monotonic() + timeout
        while not self._results.keys() >= set(ranks):
            assert self._collect(deadline - time.monotonic()), f"ranks {ranks} did not end in {timeout} s"

    def _pending(self) -> list[int]:
        return [rank for rank, pipe in self._pipes.items() if rank not in self._results and not pipe.closed]

    def _collect(self, timeout: float) -> bool:
        """Take what has been returned, waiting at most ``timeout`` seconds for some; returns whether there was any."""
        pending = {self._pipes[rank]: rank for rank in self._pending()}
        ready = wait(list(pending), max(timeout, 0))
        for pipe in ready:
            rank = pending[pipe]  # type: ignore[index]
            try:
                succeeded, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                pipe.close()
                continue
            assert succeeded, f"rank {rank} failed:\n{value}"
            self._results[rank] = value
        return bool(ready)

    def _start(self, rank: int) -> None:
        receiver, sender = _context.Pipe(duplex=False)
        arguments = (sender, rank, self.world_size, self.store.port, self.function, self.args)
        process = _context.Process(target=_run_rank, args=arguments)
        process.start()
        sender.close()
        self._processes[rank], self._pipes[rank] = process, receiver


def _run_rank(
    sender: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        {
            STORE_VARIABLE: f"127.0.0.1:{port}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "TORCHELASTIC_RUN_ID": "tests",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }
    )
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))

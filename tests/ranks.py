"""Run a function on several real ranks, as torchrun would start them, and collect what it returns."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# Children fork from a server process that has imported the slow packages once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning_fed", "lightning.pytorch", "torch.distributed", "sklearn.datasets"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` gloo ranks; returns its results in rank order.

    The function must be importable by name. Its result is pickled.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or if a rank did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_run_rank, args=(sender, rank, world_size, port, function, args))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} did not end within {timeout} s"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                succeeded, results[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died without a result") from None
            assert succeeded, f"rank {rank} failed:\n{results[rank]}"
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    sender: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        TORCHELASTIC_RUN_ID="tests",
        OMP_NUM_THREADS="1",
        WANDB_MODE="offline",
    )
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

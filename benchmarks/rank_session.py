"""One workload on several ranks beside the plain loop on one, alternated in the same processes.

``throughput.py`` and ``scaling.py`` start it. The first fit lets Lightning launch the other ranks, which run this
script too, and all further fits find them there. While rank 0 runs the plain loop, the other ranks wait. Rounds
are timed on rank 0; CPU time is that of all ranks together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from workloads import WORKLOADS, Measured, Workload, alternate, federated, make_data, plain, quieten

PLAIN, PLAIN_SHARED = "plain loop", "plain loop, shared"
SEQUENTIAL, VECTORIZED = "sequential", "vectorized"
SIDES = (PLAIN, PLAIN_SHARED, SEQUENTIAL, VECTORIZED)
LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS = 1800  # after which a session is taken for stuck
NOT_HERE = Measured(*[math.nan] * len(Measured._fields))


def run_session(
    name: str, work: Workload, devices: int, sides: list[str], repeats: int, clients_per_step: str
) -> dict[str, list[Measured]]:
    """Start a session.

    Args:
        name: of the workload in ``WORKLOADS``.
        work: tells rounds and seed.
        devices: ranks.
        sides: of ``SIDES``; "shared" is the plain loop on all ranks.
        repeats: runs of each side.
        clients_per_step: of the vectorized side: a number, or ``auto``.

    Raises:
        RuntimeError: with what the ranks said, if they failed.
    """
    numbers = {"devices": devices, "rounds": work.rounds, "seed": work.seed, "repeats": repeats}
    command = [sys.executable, __file__, name, "--clients-per-step", clients_per_step, "--sides", *sides]
    command += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    # A fit of this process has left there what would make the session a rank of it.
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"{devices} ranks of {name} failed:\n{done.stderr[-3000:]}")
    runs = json.loads(done.stdout.splitlines()[-1])
    return {side: [Measured(*values) for values in found] for side, found in runs.items()}


def clients_per_step(value: str) -> int | str:
    """The setting as the command line has it."""
    return value if value == "auto" else int(value)


def session(args: argparse.Namespace) -> dict[str, list[Measured]]:
    """What every rank of a session runs."""
    work = replace(WORKLOADS[args.work], rounds=args.rounds, seed=args.seed)
    data = make_data(work)
    rank = int(os.environ.get("LOCAL_RANK", 0))

    def sides(rounds: int) -> dict[str, Callable[[], Measured]]:
        def on_rank_zero() -> Measured:
            return plain(work, data, rounds) if rank == 0 else NOT_HERE

        vectorized: dict[str, Any] = {"clients_per_step": clients_per_step(args.clients_per_step)}
        runs: dict[str, Callable[[], Measured]] = {
            SEQUENTIAL: lambda: federated(work, data, rounds, args.devices),
            VECTORIZED: lambda: federated(work, data, rounds, args.devices, **vectorized),
            PLAIN_SHARED: lambda: plain(work, data, rounds, rank, args.devices),
            PLAIN: on_rank_zero,
        }
        return {side: together(run, args.devices) for side, run in runs.items() if side in args.sides}

    alternate(sides(2), 1)  # warm up; the first one is a fit, which starts the ranks
    return alternate(sides(work.rounds), args.repeats)


def together(run: Callable[[], Measured], devices: int) -> Callable[[], Measured]:
    """Let the ranks end a run together."""

    def run_and_meet() -> Measured:
        measured = run()
        if devices > 1:
            dist.barrier()
        return measured

    return run_and_meet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKLOADS)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--clients-per-step", default="10")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    args = parser.parse_args()
    quieten()
    runs = session(args)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(json.dumps(runs), flush=True)


if __name__ == "__main__":
    main()

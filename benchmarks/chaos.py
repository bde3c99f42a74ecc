"""What is lost when runs are killed, stopped, starved of disk or network, or find their checkpoints damaged: nothing.

``kills``: SIGKILL at random moments, over all strategies, on one rank and on two; the resumed run must end with the
bits of the uninterrupted one. ``ranks``: what 1, 2 or 4 ranks have saved is resumed on another number of them.
``loop``: for some minutes, random interruptions of all kinds. ``memory``: thousands of rounds in one process.

Every part prints a markdown table, and exits with 1 if something was lost, or hung.
"""

from __future__ import annotations

import argparse
import sys

from chaos_kills import measure_kills, measure_ranks
from chaos_loop import measure_loop
from chaos_memory import measure_memory
from chaos_run import STRATEGIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kills", "ranks", "loop", "memory"])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, help="by default all; of memory, three")
    parser.add_argument("--moments", type=int, default=50, help="of kills")
    parser.add_argument("--most-ranks", type=int, default=2, help="of a killed run")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the loop")
    parser.add_argument("--rounds", type=int, default=2000, help="of memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episode", type=int, default=0, help="of the loop, the first one")
    args = parser.parse_args()
    strategies = args.strategies or list(STRATEGIES)
    if args.part == "kills":
        failed = measure_kills(args.moments, strategies, args.most_ranks, args.seed)
    elif args.part == "ranks":
        failed = measure_ranks(strategies, args.seed)
    elif args.part == "loop":
        failed = measure_loop(args.minutes, strategies, args.seed, args.episode)
    else:
        failed = measure_memory(args.strategies or ["FedAvg, cohorts", "CHOCO", "MoDeST"], args.rounds)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

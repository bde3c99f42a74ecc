"""What a client update costs: this package, the plain PyTorch loop, and other systems on the same work.

A round is 10 SGD steps of each active client on minibatches in file order. W1: FedAvg, 10 of 100 clients, MLP
64-200-200-10 on digits, batches of 20. W2: the same with a CNN of 96,304 parameters on 3x32x32. W3: D-PSGD on a ring of
100, everybody active, the MLP. W4: FedAvg, all of 100 clients, MLP 32-32-10, batches of 10.

The reference is a loop with one model, which copies weights in place and makes a ``torch.optim.SGD`` for each client.
All sides train the same cohorts on the same minibatches from the same weights, so their accuracies must agree. The
sides alternate in one process, one thread each, after a warm-up run of each; those on two ranks alternate with the
plain loop in two processes of their own, which rank 0 runs while the other rank waits. CPU and wall time are per client
update and without the first round (CPU: mean of the rounds, all ranks together; wall: median); a ratio is the median
over neighbouring runs, in brackets the smallest and the largest. Steps are local steps of one client a CPU-second.

glibc's thresholds are pinned for all sides, as the speed of the CNN otherwise depends on which libraries a process
happens to import.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from peer_drivers import Peers
from rank_session import PLAIN, PLAIN_SHARED, SEQUENTIAL, VECTORIZED, clients_per_step, run_session
from stacked_loops import STACKED, stacked
from workloads import (
    WORKLOADS,
    Data,
    Measured,
    Workload,
    alternate,
    federated,
    make_data,
    pin_allocator,
    plain,
    quieten,
)

BMM, VMAP = STACKED
ON_RANKS = "two ranks: "
SIDES = {
    "sequential": SEQUENTIAL,
    "vectorized": VECTORIZED,
    "bmm": BMM,
    "vmap": VMAP,
    "ranks": ON_RANKS + SEQUENTIAL,
    "ranks-vectorized": ON_RANKS + VECTORIZED,
    "ranks-plain": ON_RANKS + PLAIN_SHARED,
}
HAND_STACKED = ("W1", "W3", "W4")  # stacked convolutions lose on a CPU, and bmm has none
HEAD = (
    *("work", "side", "CPU, ms", "CPU / plain", "wall, ms", "wall / plain", "round 1, ms", "round 10 or last, ms"),
    *("steps a CPU-second", "accuracy"),
)


class Row(NamedTuple):
    """The runs of one side, and the plain loop's beside them."""

    work: Workload
    side: str
    runs: list[Measured]
    references: list[Measured]

    def middle(self, field: str) -> float:
        return median(getattr(run, field) for run in self.runs)

    def ratios(self, field: str) -> list[float]:
        return [getattr(run, field) / getattr(other, field) for run, other in zip(self.runs, self.references)]

    def cells(self) -> list[str]:
        if not self.runs:
            return [self.work.title, f"{self.side} failed", *[""] * (len(HEAD) - 2)]
        steps = 1e3 * self.work.steps / self.middle("cpu")
        return [
            *(self.work.title, self.side),
            *(number(self.middle("cpu")), spread(self.ratios("cpu"))),
            *(number(self.middle("wall")), spread(self.ratios("wall"))),
            *(number(self.middle("first")), number(self.middle("tenth"))),
            *("-" if math.isnan(steps) else f"{steps:,.0f}", f"{self.middle('accuracy'):.3f}"),
        ]


def number(value: float) -> str:
    """Three digits, or a dash."""
    return "-" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def spread(ratios: list[float]) -> str:
    """``median (smallest - largest)``."""
    if any(map(math.isnan, ratios)):
        return "-"
    return f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


# ------------------------------------------------------------------------------------------------------------ measuring


def one_rank(name: str, work: Workload, args: argparse.Namespace) -> Iterator[Row]:
    """All sides that are one process."""
    data = make_data(work)
    wanted = {side: run for side, run in one_rank_sides(name, work, data, args).items() if side in (PLAIN, *args.sides)}
    alternate({side: partial(run, 2) for side, run in wanted.items()}, 1)  # warm up
    runs = alternate({side: partial(run, work.rounds) for side, run in wanted.items()}, args.repeats)
    yield from (Row(work, side, found, runs[PLAIN]) for side, found in runs.items())


def one_rank_sides(
    name: str, work: Workload, data: Data, args: argparse.Namespace
) -> dict[str, Callable[[int], Measured]]:
    """Each side as a function of the number of rounds."""
    together: dict[str, Any] = {"clients_per_step": clients_per_step(clients_together(work, args))}
    sides: dict[str, Callable[[int], Measured]] = {
        PLAIN: lambda rounds: plain(work, data, rounds),
        SEQUENTIAL: lambda rounds: federated(work, data, rounds, logs_loss=args.log),
        VECTORIZED: lambda rounds: federated(work, data, rounds, logs_loss=args.log, **together),
    }
    if name in HAND_STACKED:
        sides[BMM] = lambda rounds: stacked(work, data, rounds, BMM)
        sides[VMAP] = lambda rounds: stacked(work, data, rounds, VMAP)
    return sides


def clients_together(work: Workload, args: argparse.Namespace) -> str:
    """The ``clients_per_step`` of the vectorized sides."""
    return args.clients_per_step or str(work.clients_per_step)


def two_ranks(name: str, work: Workload, args: argparse.Namespace) -> Iterator[Row]:
    """The sides on two ranks, with the plain loop on one of them as their reference."""
    wanted = [side.removeprefix(ON_RANKS) for side in args.sides if side.startswith(ON_RANKS)]
    if not any(side in wanted for side in (SEQUENTIAL, VECTORIZED)):
        return  # only a fit starts the ranks
    runs = run_session(name, work, 2, [PLAIN, *wanted], args.repeats, clients_together(work, args))
    references = runs.pop(PLAIN)
    yield from (Row(work, ON_RANKS + side, found, references) for side, found in runs.items())


def peers(work: Workload, args: argparse.Namespace) -> Iterator[Row]:
    """Other systems, where they are installed."""
    if args.peers is None:
        return
    folders = Peers(args.peers, args.venvs, args.sources)
    yield from (Row(work, peer, *found) for peer, *found in folders.compare(work, args.repeats))


# ------------------------------------------------------------------------------------------------------------- plotting


def draw(rows: list[Row]) -> Figure:
    """For each workload the ratios of all sides: CPU time filled, wall time hollow."""
    rows = [row for row in rows if row.runs]
    works = list(dict.fromkeys(row.work for row in rows))
    figure = Figure(figsize=(4.2 * len(works), 3.6), layout="constrained")
    for axes, work in zip(figure.subplots(1, len(works), squeeze=False)[0], works):
        shown = [row for row in rows if row.work == work and row.side != PLAIN]
        for place, row in enumerate(shown):
            for field, shift, fill in (("cpu", -0.12, "C0"), ("wall", 0.12, "white")):
                ratios = row.ratios(field)
                axes.plot([min(ratios), max(ratios)], [place + shift] * 2, color="C0", linewidth=1)
                axes.plot(median(ratios), place + shift, "o", color="C0", markerfacecolor=fill)
        axes.axvline(1, color="0.5", linewidth=1)
        axes.set(xscale="log", xlabel="time of the plain loop", title=work.title)
        axes.title.set_fontsize(10)
        axes.set_yticks(range(len(shown)), [row.side for row in shown], fontsize=8)
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.invert_yaxis()
        axes.grid(color="0.9", axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    marks = figure.axes[0].lines[1:4:2]
    figure.legend(marks, ["CPU time", "wall time"], fontsize=8, loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="beside the plain loop")
    parser.add_argument("--clients-per-step", help="of the vectorized sides, or `auto`; by default 10, W4: 100")
    parser.add_argument("--rounds", type=int, help="of each run; by default 20, 6, 6 and 10")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", action="store_true", help="our module also logs its loss at every step (one rank)")
    parser.add_argument("--peers", type=Path, help="folder of the drivers of other systems")
    parser.add_argument("--venvs", type=Path, default=Path("venvs"), help="folder of their virtual environments")
    parser.add_argument("--sources", type=Path, default=Path("sources"), help="folder of checkouts that some need")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's thresholds as they are")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    args = parser.parse_args()
    if not args.default_malloc:
        pin_allocator()
    quieten()
    args.sides = [SIDES[side] for side in args.sides]
    print(f"| {' | '.join(HEAD)} |\n" + "|---" * len(HEAD) + "|")
    rows: list[Row] = []
    for name in args.workloads:
        work = replace(WORKLOADS[name], seed=args.seed, rounds=args.rounds or WORKLOADS[name].rounds)
        for row in chain(one_rank(name, work, args), two_ranks(name, work, args), peers(work, args)):
            print(f"| {' | '.join(row.cells())} |", flush=True)
            rows.append(row)
    if args.plot is not None:
        draw(rows).savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()

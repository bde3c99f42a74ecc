"""How the cost of a client grows: with the number of clients, of ranks, of parameters, with its state, on a GPU.

``clients``: CPU time a client update with 10 to 10,000 clients, of which 10 are active in a round (W1 of
``throughput.py``). Client c has the samples of client ``c % 100``, so that data do not grow; the plain loop beside
shows what other samples cost. ``ranks``: wall time on 1, 2 and 4 ranks, against the plain loop on one of them.
``parameters``: 10^4 to 10^7, by the width of the MLP. ``memory``: bytes a client, as the slope between two numbers of
clients in fresh processes, of all tensors at the end of a round and of the peak of resident memory (Linux); all clients
take part, but in FedAvg. ``gpu``: 100 clients, all active, CNNs on 3x32x32, by ``clients_per_step``; images start in
the host's memory.

The variants of a part alternate in one process, after a warm-up run of each (``ranks``: in a session for each number of
ranks); ratios are medians over neighbouring runs, in brackets the smallest and the largest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from rank_session import PLAIN, PLAIN_SHARED, SEQUENTIAL, VECTORIZED, clients_per_step, run_session
from torch import Tensor
from workloads import (
    PINNED,
    WORKLOADS,
    Measured,
    Workload,
    alternate,
    federated,
    make_data,
    mlp,
    pin_allocator,
    plain,
    quieten,
    resnet8,
)

from lightning_fed.compression import TopK
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.strategies import GossipStrategy

SHARDS = 100  # different ones; clients beyond share them
WIDTHS = (68, 281, 963, 3125)  # of the MLP: 9,802 to 10,003,135 parameters
MEMORY_CLIENTS = (100, 500)


class Panel(NamedTuple):
    """One picture: lines of ``(x, y)`` by their label."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


def table(*head: str) -> None:
    print(f"\n| {' | '.join(head)} |\n" + "|---" * len(head) + "|", flush=True)


def row(*cells: Any) -> None:
    print(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)


def middle(runs: Sequence[Measured], field: str) -> float:
    return median(getattr(run, field) for run in runs)


def against(runs: Sequence[Measured], base: Sequence[Measured], field: str) -> tuple[float, str]:
    """The median ratio, and how it is shown."""
    ratios = sorted(getattr(run, field) / getattr(other, field) for run, other in zip(runs, base))
    return median(ratios), f"{median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"


def trainer_sides(args: argparse.Namespace, clients_together: int) -> dict[str, dict[str, Any]]:
    """The settings of our sides that are asked for."""
    together = clients_per_step(args.clients_per_step or str(clients_together))
    sides: dict[str, dict[str, Any]] = {SEQUENTIAL: {}, VECTORIZED: {"clients_per_step": together}}
    return {side: settings for side, settings in sides.items() if side in args.sides}


def warm_and_alternate(
    sides: dict[Any, Callable[[int], Measured]], rounds: int, repeats: int
) -> dict[Any, list[Measured]]:
    """Runs of sides that are functions of the number of rounds."""
    alternate({side: partial(run, 2) for side, run in sides.items()}, 1)
    return alternate({side: partial(run, rounds) for side, run in sides.items()}, repeats)


# ------------------------------------------------------------------------------------------------------- clients, ranks


def clients(args: argparse.Namespace) -> Panel:
    """The number of clients, at a cohort of 10."""
    data = make_data(WORKLOADS["W1"])
    sides: dict[Any, Callable[[int], Measured]] = {}
    for number in args.clients:
        work = replace(WORKLOADS["W1"], clients=number, cohort=min(10, number))
        sides[PLAIN, number] = partial(plain, work, data)
        for side, settings in trainer_sides(args, 10).items():
            sides[side, number] = partial(federated, work, data, **settings)
    found = warm_and_alternate(sides, args.rounds or 20, args.repeats)
    table("side", "clients", "CPU, ms", f"CPU / {args.clients[0]} clients", "wall, ms", "set-up, ms", "round 1, ms")
    lines: dict[str, list[tuple[float, float]]] = {}
    for (side, number), runs in sorted(found.items(), key=lambda item: item[0][0]):
        ratio, shown = against(runs, found[side, args.clients[0]], "cpu")
        times = [middle(runs, field) for field in ("cpu", "wall", "setup", "first")]
        row(side, f"{number:,}", times[0], shown, *times[1:])
        lines.setdefault(side, []).append((number, ratio))
    return Panel("10 clients a round", "clients", f"CPU time / that with {args.clients[0]} clients", lines)


def ranks(args: argparse.Namespace) -> Panel:
    """The number of ranks: W3, where all clients are active, and W1, where 10 of 100 are."""
    table("work", "ranks", "side", "wall, ms", "wall / plain", "CPU of all ranks, ms", "CPU / plain")
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in ("W3", "W1"):
        work = replace(WORKLOADS[name], rounds=args.rounds or WORKLOADS[name].rounds)
        for devices in args.ranks:
            together = args.clients_per_step or str(work.clients_per_step)
            sides = [PLAIN, PLAIN_SHARED, *args.sides] if devices > 1 else [PLAIN, *args.sides]
            found = run_session(name, work, devices, sides, args.repeats, together)
            for side in sides:
                runs = found[side]
                ratio, shown = against(runs, found[PLAIN], "wall")
                cells = shown, middle(runs, "cpu"), against(runs, found[PLAIN], "cpu")[1]
                row(work.title, devices, side, middle(runs, "wall"), *cells)
                if side != PLAIN:
                    lines.setdefault(f"{name}, {side}", []).append((devices, ratio))
    return Panel(f"Ranks, on {os.cpu_count()} cores", "ranks", "wall time / plain loop", lines)


def parameters(args: argparse.Namespace) -> Panel:
    """The number of parameters, of an MLP 64-w-w-10 on 10 clients, all active."""
    table("parameters", "side", "CPU, ms", "CPU / plain", "wall, ms", "wall / plain")
    lines: dict[str, list[tuple[float, float]]] = {}
    for width in args.widths:
        work = replace(WORKLOADS["W1"], network=partial(mlp, width), clients=10)
        data, size = make_data(work), sum(weight.numel() for weight in work.make_net().parameters())
        sides: dict[Any, Callable[[int], Measured]] = {PLAIN: partial(plain, work, data)}
        for side, settings in trainer_sides(args, 10).items():
            sides[side] = partial(federated, work, data, **settings)
        rounds = args.rounds or max(2, min(20, 4_000_000 // size))  # a round of the largest takes seconds
        found = warm_and_alternate(sides, rounds, args.repeats)
        for side, runs in found.items():
            ratio, shown = against(runs, found[PLAIN], "cpu")
            wall = middle(runs, "wall"), against(runs, found[PLAIN], "wall")[1]
            row(f"{size:,}", side, middle(runs, "cpu"), shown, *wall)
            if side != PLAIN:
                lines.setdefault(side, []).append((size, ratio))
    return Panel("Parameters", "parameters", "CPU time / plain loop", lines)


# --------------------------------------------------------------------------------------------------------------- memory

TOP = TopK(0.1)
ALGORITHMS: dict[str, Callable[[Workload], FederatedStrategy]] = {
    "FedAvg, 10 a round": lambda work: replace(work, cohort=10).strategy(),
    "D-PSGD": lambda work: gossip(work),
    "CHOCO-SGD": lambda work: gossip(work, method="choco", compressor=TOP),
    "DSGT": lambda work: gossip(work, method="tracking"),
    "BEER": lambda work: gossip(work, method="beer", compressor=TOP),
}


def gossip(work: Workload, **method: Any) -> GossipStrategy:
    return GossipStrategy("ring", num_clients=work.clients, seed=work.seed, local_steps=1, **method)


class MemoryUse(NamedTuple):
    """Bytes of a whole process.

    Attributes:
        peak: the largest resident memory.
        tensors: of all tensors after a round, each storage once.
        state: of the algorithm's own matrices with a row for each client.
        row: of one client's parameters.
    """

    peak: int
    tensors: int
    state: int
    row: int


class LiveTensors(Callback):
    """Bytes of all tensors at the end of the last round."""

    tensors = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gc.collect()
        tensors = [value for value in gc.get_objects() if isinstance(value, Tensor) and value.layout is torch.strided]
        storages = [value.untyped_storage() for value in tensors]
        self.tensors = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory_use(algorithm: str, number: int) -> MemoryUse:
    """Two rounds of one step in this process, which should be a fresh one."""
    work = replace(WORKLOADS["W1"], clients=number, cohort=number, steps=1)
    strategy, live = ALGORITHMS[algorithm](work), LiveTensors()
    federated(work, make_data(work, SHARDS), 2, strategy=strategy, callbacks=[live])
    matrices = strategy.client_matrices().values()
    # The resource module would tell the peak of the process that started this one, if that was larger.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return MemoryUse(
        peak=1024 * int(lines["VmHWM"].split()[0]),
        tensors=live.tensors,
        state=sum(matrix.nbytes for matrix in matrices),
        row=strategy.bank.rows.row_bytes,
    )


def memory(args: argparse.Namespace) -> Panel:
    """Bytes a client, in rows of 4 P bytes."""
    table("algorithm", "rows: 1 + state", "rows of all tensors", "rows at the peak", "peak / (1 + state)")
    lines: dict[str, list[tuple[float, float]]] = {"tensors": [], "peak of resident memory": []}
    few, many = args.memory_clients
    # Pinned thresholds would keep what is free.
    environment = {name: value for name, value in os.environ.items() if name not in PINNED}
    for algorithm in ALGORITHMS:
        uses = []
        for number in (few, many):
            command = [sys.executable, __file__, "--default-malloc", "--memory-of", algorithm, str(number)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                raise RuntimeError(f"{number} clients of {algorithm} failed:\n{done.stderr[-3000:]}")
            uses.append(MemoryUse(*json.loads(done.stdout.splitlines()[-1])))
        slopes = [(b - a) / (many - few) / uses[0].row for a, b in zip(*uses)]
        expected = 1 + slopes[2]
        row(algorithm, expected, slopes[1], slopes[0], f"{slopes[0] / expected:.2f}")
        lines["tensors"].append((expected, slopes[1]))
        lines["peak of resident memory"].append((expected, slopes[0]))
    return Panel("Memory a client", "rows: 1 + state", "rows measured", lines)


# ------------------------------------------------------------------------------------------------------------------ gpu


def gpu(args: argparse.Namespace) -> Panel | None:
    """100 clients in waves, on a GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("\ngpu: left out, as there is no CUDA device (--device cpu runs the same on the CPU)", flush=True)
        return None
    table(
        "network",
        "clients a step",
        "wall, ms",
        "client updates a second",
        "times sequential",
        "plain / ours",
        "peak, MB",
    )
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, network in (("CNN", WORKLOADS["W2"].network), ("ResNet-8", resnet8)):
        work = replace(WORKLOADS["W2"], network=network, clients=args.gpu_clients, cohort=args.gpu_clients)
        data = make_data(work)
        peaks: dict[int, float] = {}

        def run(together: int, rounds: int, work: Workload = work, data: Any = data, peaks: Any = peaks) -> Measured:
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            settings: dict[str, Any] = {} if together == 1 else {"clients_per_step": together}
            measured = federated(work, data, rounds, accelerator=args.device, **settings)
            if args.device == "cuda":
                peaks[together] = torch.cuda.max_memory_allocated() / 1e6
            return measured

        sides: dict[Any, Callable[[int], Measured]] = {PLAIN: partial(plain, work, data, device=args.device)}
        sides |= {together: partial(run, together) for together in args.waves}
        found = warm_and_alternate(sides, args.rounds or 4, args.repeats)
        for together, runs in found.items():
            faster = against(found[args.waves[0]], runs, "wall")[1], against(found[PLAIN], runs, "wall")[1]
            wall = middle(runs, "wall")
            row(name, together, wall, f"{1e3 / wall:,.0f}", *faster, peaks.get(together, "-"))
            if together != PLAIN:
                lines.setdefault(name, []).append((together, 1e3 / wall))
    return Panel(f"{args.gpu_clients} clients on a GPU", "clients_per_step", "client updates a second", lines)


PARTS: dict[str, Callable[[argparse.Namespace], Panel | None]] = {
    "clients": clients,
    "ranks": ranks,
    "parameters": parameters,
    "memory": memory,
    "gpu": gpu,
}


def draw(panels: list[Panel]) -> Figure:
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, points in panel.lines.items():
            axes.plot(*zip(*points), "o-" if panel.title != "Memory a client" else "o", markersize=4, label=label)
        if panel.title == "Memory a client":
            axes.axline((0, 0), slope=1, color="0.5", linewidth=1)
        else:
            axes.set(xscale="log", ylim=(0, None))
            places = sorted({place for points in panel.lines.values() for place, _ in points})
            axes.set_xticks(places, [f"{place:.0e}" if place > 1000 else f"{place:,}" for place in places])
            axes.minorticks_off()
        axes.set(xlabel=panel.x, ylabel=panel.y)
        axes.set_title(panel.title, fontsize=10)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sides", nargs="+", choices=(SEQUENTIAL, VECTORIZED), default=(SEQUENTIAL, VECTORIZED))
    parser.add_argument("--clients-per-step", help="of the vectorized side, or `auto`; by default 10")
    parser.add_argument("--rounds", type=int, help="of each run; by default 20, fewer where rounds are long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100, 1000, 10_000])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="of the MLP in `parameters`")
    parser.add_argument("--memory-clients", nargs=2, type=int, default=MEMORY_CLIENTS)
    parser.add_argument("--gpu-clients", type=int, default=100)
    parser.add_argument("--waves", nargs="+", type=int, default=[1, 8, 32, 100], help="clients_per_step in `gpu`")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of `gpu`")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's thresholds as they are")
    parser.add_argument("--memory-of", nargs=2, metavar=("ALGORITHM", "CLIENTS"), help="bytes of this process alone")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    args = parser.parse_args()
    if not args.default_malloc:
        pin_allocator()
    quieten()
    if args.memory_of is not None:
        print(json.dumps(memory_use(args.memory_of[0], int(args.memory_of[1]))))
        return
    panels = [panel for part in args.part if (panel := PARTS[part](args)) is not None]
    if args.plot is not None:
        draw(panels).savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()

"""Wall time of a training step on slow links: EControl's compressed messages against Lightning's DDP.

Every rank is a process in a network namespace of its own. A veth pair joins each of them to a bridge in one more
namespace, and ``tc`` shapes both ends of each pair with the token bucket (tbf), so that a rank sends and receives at
most at the rate; full speed is without any queue. No packet leaves the namespaces. It needs root on Linux.

All sides train the same MLP of 10 million parameters on the same batches. They run one after another in the same
processes, in an order that changes from repeat to repeat; the driver only says what is next, and how fast the links
are. A step is the time from the end of one batch to the end of the next, the first ones left out. Bytes are the
kernel's count of what left a rank's interface, for all sides alike, so headers and acknowledgements are among them.
Ranks share the machine's cores: where links are fast, a step takes as long as its CPU time, which is reported beside.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import EControlStrategy
from lightning_fed.compression import TopK

BATCH, WARM_UP_STEPS = 32, 3
WIDTHS = (784, 2048, 2048, 2048, 10)
# The same name in all namespaces of ranks.
INTERFACE = "link"
SUBNET, PORT = "10.77.0", 29577
# A bucket that holds a whole packet of the kernel's own making (up to 64 kB before it is cut into frames), or tbf would
# have to cut it, which costs CPU that the ranks need.
BURST_KB = 128
# The longest that a packet waits in a queue. TCP fills a link without delay from much less, but loses packets when
# several ranks send to one.
QUEUE_MS = 50
ANSWER_SECONDS = 300.0
Answer = dict[str, Any]

OURS, DDP = "EControl, TopK(0.01)", "DDP"
POWER_SGD, BF16 = "DDP, PowerSGD (rank 2)", "DDP, bf16"
HEAD = (
    *("ranks", "link", "side", "ms a step", "range", "side/EControl", "spread"),
    *("CPU ms a step and rank", "MB sent a step and rank", "of messages", "first step, s"),
)
SIDES = {"econtrol": OURS, "ddp": DDP, "powersgd": POWER_SGD, "bf16": BF16}


# ------------------------------------------------------------------------------------------------------------ one rank


class Classifier(LightningModule):
    """An MLP with the smallest possible step around it: no logs, no metrics."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for pair in pairwise(WIDTHS) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class HookedDDPStrategy(DDPStrategy):
    """DDP with a communication hook on any device: Lightning registers hooks on GPUs only, and says nothing.

    Args:
        state: of the hook.
        hook: see ``DistributedDataParallel.register_comm_hook``.
        **ddp: for ``DistributedDataParallel``.
    """

    def __init__(self, state: object, hook: Any, **ddp: Any) -> None:
        super().__init__(process_group_backend="gloo", **ddp)
        self._state, self._hook = state, hook

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self._state, self._hook)


def make_strategy(side: str) -> Strategy:
    """The strategy of one side, new for each fit."""
    if side == OURS:
        return EControlStrategy(compressor=TopK(0.01))
    if side == POWER_SGD:
        # It needs two steps of plain averages first; its own default of 1000 would hide it altogether.
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        # One bucket: of several, gloo begins the second messages in any order, which differs between ranks.
        return HookedDDPStrategy(state, powerSGD_hook.powerSGD_hook, bucket_cap_mb=1000)
    if side == BF16:
        return HookedDDPStrategy(None, default_hooks.bf16_compress_hook)
    return DDPStrategy(process_group_backend="gloo")


def sent_bytes() -> int:
    """What has left this rank's interface so far, by the kernel's count."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


class StepClock(Callback):
    """Time, CPU time and bytes at the start of the first batch and at the end of every one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.sent: list[int] = []
        self.messages: list[int] = []

    def _look(self, strategy: Strategy) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.sent.append(sent_bytes())
        self.messages.append(strategy.exchange.wire_bytes if isinstance(strategy, EControlStrategy) else 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._look(trainer.strategy)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer.strategy)


def fit(side: str, steps: int, world_size: int) -> Answer:
    """One fit; the first steps and those that are reported."""
    seed_everything(0, verbose=False)
    samples = BATCH * world_size * (WARM_UP_STEPS + steps)
    dataset = TensorDataset(torch.randn(samples, WIDTHS[0]), torch.randint(WIDTHS[-1], (samples,)))
    clock = StepClock()
    trainer = Trainer(
        strategy=make_strategy(side),
        accelerator="cpu",
        devices=world_size,
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(dataset, BATCH, shuffle=True))
    assert len(clock.times) == 1 + WARM_UP_STEPS + steps, f"{side}: {len(clock.times) - 1} steps"
    first = WARM_UP_STEPS
    return {
        "first": clock.times[1] - clock.times[0],
        "steps": [end - start for start, end in pairwise(clock.times[first:])],
        "cpu": (clock.cpu[-1] - clock.cpu[first]) / steps,
        "sent": (clock.sent[-1] - clock.sent[first]) / steps,
        "messages": (clock.messages[-1] - clock.messages[first]) / steps,
    }


def transfer(num_bytes: int) -> Answer:
    """Plain gloo messages, megabits a second: from rank 1 to rank 0, then from every rank to the next at once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    message, received, empty = torch.zeros(num_bytes, dtype=torch.uint8), torch.empty(num_bytes).byte(), torch.zeros(1)
    rates = {}
    for name, pairs in (("one way", [(1, 0)]), ("ring", [(peer, (peer + 1) % size) for peer in range(size)])):
        dist.barrier()
        start = time.perf_counter()
        # In this order: gloo's word that a receiver is ready would wait behind a message on its way to the same rank.
        works = [dist.irecv(received, sender) for sender, to in pairs if to == rank]
        works += [dist.isend(message, to) for sender, to in pairs if sender == rank]
        for work in works:
            assert work is not None
            work.wait()
        # Everybody's bytes have come when everybody has called this; its own time is that of a few packets.
        dist.all_reduce(empty)
        rates[name] = 8e-6 * num_bytes / (time.perf_counter() - start)
    return rates


def run_rank() -> None:
    """One rank's whole life: do what each line of the standard input says, and answer with a line each."""
    # Lightning and its children print as well: only answers may go where the driver reads.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for line in sys.stdin:
        task = json.loads(line)
        answer = transfer(task["bytes"]) if "bytes" in task else fit(**task)
        # A Trainer, its strategy and its module refer to each other: few objects, but large ones.
        gc.collect()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- the driver


class Network:
    """A namespace for each rank, and one with the bridge between them; a context manager that leaves nothing.

    Args:
        size: how many ranks.
    """

    def __init__(self, size: int) -> None:
        # Names are the system's: the number of this process keeps two runs apart.
        self.hub = f"throttled{os.getpid()}-hub"
        self.namespaces = [f"throttled{os.getpid()}-{rank}" for rank in range(size)]

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _build(self) -> None:
        for namespace in (self.hub, *self.namespaces):
            command("ip", "netns", "add", namespace)
            command("ip", "-n", namespace, "link", "set", "dev", "lo", "up")
        command("ip", "-n", self.hub, "link", "add", "bridge", "type", "bridge")
        command("ip", "-n", self.hub, "link", "set", "dev", "bridge", "addrgenmode", "none", "up")
        for rank, namespace in enumerate(self.namespaces):
            port = f"port{rank}"
            pair = ["link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace]
            command("ip", "-n", self.hub, *pair)
            command("ip", "-n", self.hub, "link", "set", "dev", port, "master", "bridge", "addrgenmode", "none", "up")
            command("ip", "-n", namespace, "addr", "add", f"{self.address(rank)}/24", "dev", INTERFACE)
            command("ip", "-n", namespace, "link", "set", "dev", INTERFACE, "addrgenmode", "none", "up")

    def _remove(self) -> None:
        for namespace in (self.hub, *self.namespaces):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)  # interfaces go with it

    def address(self, rank: int) -> str:
        """Of a rank."""
        return f"{SUBNET}.{rank + 1}"

    def throttle(self, megabits: int) -> None:
        """Let every rank send and receive at most so much a second; 0 for full speed."""
        ends = [(namespace, INTERFACE) for namespace in self.namespaces]
        ends += [(self.hub, f"port{rank}") for rank in range(len(self.namespaces))]
        for namespace, interface in ends:
            place = ["dev", interface, "root"]
            if megabits:
                limits = ["rate", f"{megabits}mbit", "burst", f"{BURST_KB}kb", "latency", f"{QUEUE_MS}ms"]
                command("tc", "-n", namespace, "qdisc", "replace", *place, "tbf", *limits)
            elif "tbf" in command("tc", "-n", namespace, "qdisc", "show", *place):
                command("tc", "-n", namespace, "qdisc", "del", *place)


class Ranks:
    """The processes in a network; a context manager that leaves none of them.

    Args:
        network: where they live.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.size = len(network.namespaces)
        self.folder = Path(tempfile.mkdtemp(prefix="throttled-"))
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Ranks:
        # What torchrun would set.
        shared = {
            "MASTER_ADDR": self.network.address(0),
            "MASTER_PORT": str(PORT),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "throttled",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
        }
        for rank, namespace in enumerate(self.network.namespaces):
            with self._log(rank).open("w") as log:
                process = subprocess.Popen(
                    ["ip", "netns", "exec", namespace, sys.executable, __file__, "rank"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            self.processes.append(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()  # `ip netns exec` has become the rank itself
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def ask(self, **task: Any) -> list[Answer]:
        """Let all ranks do something at the same time; returns their answers in rank order.

        Raises:
            SystemExit: if a rank fails, or does not answer in time; with what it has printed last.
        """
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        deadline = time.monotonic() + ANSWER_SECONDS
        answers: dict[int, Answer] = {}
        while len(answers) < self.size:
            # Any of them, in any order: the one that fails is seldom the first, and the others wait for it.
            waiting = {process.stdout: rank for rank, process in enumerate(self.processes) if rank not in answers}
            ready = select.select(list(waiting), [], [], max(deadline - time.monotonic(), 0.0))[0]
            if not ready:
                raise SystemExit(f"ranks {sorted(waiting.values())} did not do {task} in {ANSWER_SECONDS:.0f} s.")
            for pipe in ready:
                rank = waiting[pipe]
                line = pipe.readline()
                if not line:
                    raise SystemExit(f"rank {rank} failed at {task}:\n{self._log(rank).read_text()[-4000:]}")
                answers[rank] = json.loads(line)
        return [answers[rank] for rank in range(self.size)]


def command(*words: str) -> str:
    """Run one of the system's tools; returns what it prints.

    Raises:
        SystemExit: if it fails, with what it says.
    """
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"`{' '.join(words)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def check_system() -> None:
    """See that namespaces can be made here.

    Raises:
        SystemExit: if they cannot.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        what = f"{' and '.join(missing)} (package iproute2)" if missing else "root"
        raise SystemExit(
            f"This benchmark makes network namespaces, which needs Linux, iproute2 and root: no {what} here."
        )


def link_name(megabits: int) -> str:
    """For the table."""
    return f"{megabits} Mbit/s" if megabits else "full speed"


@dataclass
class Fit:
    """What one fit has measured, of all ranks together: seconds and bytes.

    Attributes:
        step: the median step of all ranks.
        cpu: CPU time a step and rank, the threads that communicate included.
        first: the first step, of the slowest rank.
        sent: bytes a step and rank that left the interface, headers and all.
        messages: bytes a step and rank of messages, as the strategy counts them (DDP does not).
    """

    step: float
    cpu: float
    first: float
    sent: float
    messages: float


def summed_up(answers: list[Answer]) -> Fit:
    """The ranks' answers as one."""
    return Fit(
        step=median(step for answer in answers for step in answer["steps"]),
        cpu=mean(answer["cpu"] for answer in answers),
        first=max(answer["first"] for answer in answers),
        sent=mean(answer["sent"] for answer in answers),
        messages=mean(answer["messages"] for answer in answers),
    )


def rows(size: int, megabits: int, fits: dict[str, list[Fit]]) -> list[str]:
    """One row of the table for each side."""
    lines = []
    for side, mine in fits.items():
        ratio, spread = "-", "-"
        if side != OURS and OURS in fits:
            ratios = [theirs.step / ours.step for theirs, ours in zip(mine, fits[OURS])]
            ratio, spread = f"{median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}"
        messages = f"{1e-6 * mean(fit.messages for fit in mine):.2f}" if side == OURS else "-"
        cells = (
            size,
            link_name(megabits),
            side,
            f"{1e3 * median(fit.step for fit in mine):.0f}",
            f"{1e3 * min(fit.step for fit in mine):.0f} - {1e3 * max(fit.step for fit in mine):.0f}",
            ratio,
            spread,
            f"{1e3 * median(fit.cpu for fit in mine):.0f}",
            f"{1e-6 * mean(fit.sent for fit in mine):.2f}",
            messages,
            f"{median(fit.first for fit in mine):.2f}",
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def measured_rate(ranks: Ranks, megabits: int) -> str:
    """A row of the table of links: what plain messages reach."""
    # About two seconds of a throttled link, and at full speed enough to leave the start behind.
    answers = ranks.ask(bytes=int(2 * megabits * 1e6 / 8) if megabits else 2**28)
    one_way, ring = (min(answer[name] for answer in answers) for name in ("one way", "ring"))
    return f"| {ranks.size} | {link_name(megabits)} | {one_way:.0f} | {ring:.0f} |"


def compare(size: int, links: list[int], sides: list[str], steps: int, repeats: int) -> list[str]:
    """All links for one number of ranks: prints the rows of the table, and returns those of the measured rates."""
    rates = []
    with Network(size) as network, Ranks(network) as ranks:
        for side in sides:  # warm up, and make the process group
            ranks.ask(side=side, steps=1, world_size=size)
        for megabits in links:
            network.throttle(megabits)
            rates.append(measured_rate(ranks, megabits))
            # DDP takes seconds a step on the slowest links, where steps hardly differ.
            few = steps if megabits == 0 or megabits >= 1000 else max(steps // 3, 2)
            fits: dict[str, list[Fit]] = {side: [] for side in sides}
            for repeat in range(repeats):
                # Turn the order, so that drift of the machine favours nobody.
                turn = repeat % len(sides)
                for side in sides[turn:] + sides[:turn]:
                    fits[side].append(summed_up(ranks.ask(side=side, steps=few, world_size=size)))
                    step = 1e3 * fits[side][-1].step
                    print(f"{size} ranks, {link_name(megabits)}, {side}: {step:.0f} ms", file=sys.stderr, flush=True)
            print("\n".join(rows(size, megabits, fits)), flush=True)
    return rates


def stop(number: int, frame: FrameType | None) -> None:
    """Make a signal an ordinary exception, so that namespaces are removed."""
    raise SystemExit(f"stopped by {signal.Signals(number).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--links", type=int, nargs="+", default=[100, 1000, 0], help="Mbit/s; 0 is full speed")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["econtrol", "ddp", "powersgd"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=12, help="timed steps a fit; a third of it on links under 1 Gbit/s"
    )
    args = parser.parse_args()
    check_system()
    signal.signal(signal.SIGTERM, stop)
    start, rates = time.monotonic(), []
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    for size in args.ranks:
        rates += compare(size, args.links, [SIDES[side] for side in args.sides], args.steps, args.repeats)
    print("\n| ranks | link | gloo, one way, Mbit/s | gloo, ring, Mbit/s |\n|---|---|---|---|")
    print("\n".join(rates))
    print(f"\n{time.monotonic() - start:.0f} s in all.", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] == ["rank"]:
        run_rank()
    else:
        main()

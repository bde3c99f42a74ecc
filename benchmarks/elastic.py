"""What an elastic federation does when its processes die, stop, or nothing happens at all.

Real processes under ``lightning_fed.launch``, MoDeST on digits with the small convnet, ten nodes a rank. Each rank
appends one line a finished round to a file in a folder that this driver reads; the driver kills and stops ranks.

``kills``: all but one of five ranks are killed (SIGKILL) at random moments, rank 0 among them, and at least one of them
while it hosts an aggregator of the round. ``stop``: one of three ranks is stopped (SIGSTOP) and goes on later.
``overhead``: no failures, against the same protocol simulated over collectives (``on_peer_loss="raise"``).
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_fed.data import DigitsDataModule
from lightning_fed.modest.membership import hash_order
from lightning_fed.modules import ImageClassifier
from lightning_fed.strategies import MoDeSTStrategy

NODES_PER_RANK, ROUNDS, DEADLINE = 10, 40, 150.0
PING, AGGREGATION, RESTART, AGGREGATORS = 0.5, 1.0, 3.0, 2
FOREVER = 1_000_000  # rounds; the driver ends such a fit
WARM_UP_ROUNDS = 5
KEEP = "KEEP" in os.environ  # the folders also of fits that went well
Line = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ one rank


@dataclass(frozen=True)
class Settings:
    """What the ranks of one fit are told."""

    ranks: int
    nodes: int
    rounds: int = ROUNDS
    elastic: bool = True
    success_fraction: float = 0.8
    validate: bool = True
    seed: int = 0


class Report(Callback):
    """Appends a line at the start of the fit (round -1) and at the end of each round."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = (folder / f"rank{rank}.jsonl").open("a", buffering=1)
        self.last_round = folder / "end"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, -1, trained=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy, round = trainer.strategy, trainer.current_epoch
        assert isinstance(strategy, MoDeSTStrategy)
        self._write(trainer, round, trained=len(strategy.trained_in(round)), **strategy.round_facts(round).numbers)
        trainer.should_stop = trainer.should_stop or self.last_round.exists()

    def _write(self, trainer: Trainer, round: int, **facts: float) -> None:
        times = {"time": time.monotonic(), "cpu": time.process_time()}
        line = {**times, "round": round, "pid": os.getpid(), "leader": trainer.is_global_zero, **facts}
        self.file.write(json.dumps(line) + "\n")


def run_rank(folder: Path, settings: Settings) -> None:
    """One rank's whole life: fit, then test the consensus model that this rank has."""
    rank = int(os.environ.get("RANK", 0))
    faulthandler.dump_traceback_later(DEADLINE - 10, file=(folder / f"rank{rank}.stacks").open("w"))
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(settings.seed, verbose=False)
    strategy = MoDeSTStrategy(
        num_clients=settings.nodes,
        local_steps=5,
        sample_size=10,
        num_aggregators=AGGREGATORS,
        success_fraction=settings.success_fraction,
        aggregation_timeout=AGGREGATION,
        min_models=1,
        ping_timeout=PING,
        restart_timeout=RESTART,
        on_peer_loss="drop" if settings.elastic else "raise",
    )
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=settings.ranks,
        max_epochs=settings.rounds,
        callbacks=[Report(folder, rank)],
        limit_val_batches=1.0 if settings.validate else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = ImageClassifier("small_convnet", lr=0.2)
    data = DigitsDataModule(num_clients=settings.nodes, batch_size=16, seed=settings.seed)
    trainer.fit(module, data)
    result = {"rounds": trainer.current_epoch, **trainer.test(module, data, verbose=False)[0]}
    (folder / f"rank{rank}.result").write_text(json.dumps(result))


# ---------------------------------------------------------------------------------------------------------- the driver


class Hung(Exception):
    """A fit did not do in time what it should have done."""


class Fit:
    """The processes of one fit; a context manager that leaves none of them, and keeps the folder of one that failed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="elastic-"))
        self.deadline = time.monotonic() + DEADLINE
        rank = [sys.executable, __file__, "rank", str(self.folder), json.dumps(asdict(settings))]
        launch = [sys.executable, "-m", "lightning_fed.launch", "--ranks", str(settings.ranks), "--", *rank]
        with (self.folder / "log").open("w") as log:
            self.launcher = subprocess.Popen(launch, stdout=log, stderr=log)

    def __enter__(self) -> Fit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        for _ in range(2):  # the second signal makes the launcher kill its ranks
            if self.launcher.poll() is None:
                self.launcher.send_signal(signal.SIGTERM)
                time.sleep(0.5)
        self.launcher.wait()
        if kind is not None:
            say(f"failed: {error!r}; see {self.folder}")
        elif not KEEP:
            shutil.rmtree(self.folder)
        return kind is Hung

    def lines(self, rank: int) -> list[Line]:
        """What a rank has written so far."""
        path = self.folder / f"rank{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def pid(self, rank: int) -> int:
        return self.lines(rank)[-1]["pid"]

    def newest_round(self) -> int:
        """The newest that a rank has finished, numbered from 0; -1 if all ranks have started; else -2."""
        lines = [self.lines(rank) for rank in range(self.settings.ranks)]
        return max(line[-1]["round"] for line in lines) if all(lines) else -2

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition.

        Raises:
            Hung: if that takes longer than a fit may take, or the ranks have ended meanwhile.
        """
        while not condition():
            if time.monotonic() > self.deadline or self.launcher.poll() is not None:
                raise Hung(f"after round {self.newest_round()}, launcher's exit code {self.launcher.poll()}")
            time.sleep(0.01)

    def await_round(self, round: int) -> None:
        """Wait until a rank has finished a round."""
        self.until(lambda: self.newest_round() >= round)

    def end(self) -> None:
        """Wait for all ranks' ends."""
        try:
            self.launcher.wait(max(self.deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            raise Hung(f"no end after round {self.newest_round()}") from None

    def result(self, rank: int) -> dict[str, float]:
        """What a rank that has finished found out about its model."""
        path = self.folder / f"rank{rank}.result"
        if not path.exists():
            raise Hung(f"rank {rank} failed after {self.newest_round()}")
        return json.loads(path.read_text())

    def restarts(self) -> int:
        """How often a round was started again."""
        return (self.folder / "log").read_text().count("starts it again")


def hosts_of_aggregators(round: int, nodes: int, dead: list[int]) -> list[int]:
    """The ranks that aggregate when ``round`` (from 0) was the last one that has ended, as nodes would find them."""
    order = hash_order(nodes, round + 3) // NODES_PER_RANK  # protocol: from 1, and named after what is made of a round
    return [rank for rank in order.tolist() if rank not in dead][:AGGREGATORS]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- kills


@dataclass
class Kill:
    """A rank's death: when, after which round, and how many of the round's aggregators died with it."""

    rank: int
    time: float
    round: int
    aggregators: int
    wait: float = 0.0


def kill_ranks(fit: Fit, draw: random.Random, victims: list[int]) -> list[Kill]:
    """Kill ranks one after the other, one of them because it hosts an aggregator."""
    kills: list[Kill] = []
    rounds = sorted(draw.sample(range(1, ROUNDS - 8), len(victims)))
    aimed = draw.randrange(len(victims)) if victims else 0

    def present() -> list[int]:
        return hosts_of_aggregators(fit.newest_round(), fit.settings.nodes, [kill.rank for kill in kills])

    for number, round in enumerate(rounds):
        fit.await_round(round)
        if number == aimed:
            fit.until(lambda: any(rank in victims for rank in present()))
            victim = next(rank for rank in present() if rank in victims)
            time.sleep(draw.uniform(0, 0.05))
        else:
            victim = draw.choice(victims)
            time.sleep(draw.uniform(0, 0.4))
        hit, reached = present().count(victim), fit.newest_round()
        os.kill(fit.pid(victim), signal.SIGKILL)
        kills.append(Kill(victim, time.monotonic(), reached, hit))
        victims.remove(victim)
    return kills


def waits(fit: Fit, kills: list[Kill]) -> float:
    """The longest time between two round ends of one rank; charges each such time to the last kill before its end."""
    longest = 0.0
    for rank in range(fit.settings.ranks):
        ends = [line["time"] for line in fit.lines(rank) if line["round"] >= 0]
        for begin, end in pairwise(ends):
            longest = max(longest, end - begin)
            for kill in [kill for kill in kills if kill.time < end][-1:]:
                kill.wait = max(kill.wait, end - begin)
    return longest


def measure_kills(args: argparse.Namespace) -> None:
    finished, accuracies, longest, restarts = 0, [], [], []
    kills: list[Kill] = []
    for repetition in range(args.first, args.first + args.repetitions):
        draw = random.Random(repetition)
        survivor = draw.randrange(1, args.ranks)
        victims = [rank for rank in range(args.ranks) if rank != survivor] if args.victims else []
        with Fit(Settings(args.ranks, args.ranks * NODES_PER_RANK, seed=repetition)) as fit:
            mine = kill_ranks(fit, draw, victims)
            fit.end()
            result = fit.result(survivor)
            finished += result["rounds"] == ROUNDS
            accuracies.append(result["test/acc"])
            longest.append(waits(fit, mine))
            restarts.append(fit.restarts())
            kills += mine
            deaths = " ".join(f"{kill.rank}@{kill.round}({kill.aggregators}):{kill.wait:.2f}s" for kill in mine)
            say(f"{repetition}: {result['test/acc']:.3f} {longest[-1]:.2f} s, {restarts[-1]} restarts, {deaths}")
    print(f"- fits that finished all {ROUNDS} rounds: {finished} of {args.repetitions}")
    if not accuracies:
        return
    print(f"- test accuracy: {median(accuracies):.3f} ({min(accuracies):.3f} - {max(accuracies):.3f})")
    print(f"- longest time between two round ends, s: median {median(longest):.2f}, max {max(longest):.2f}")
    print(f"- restarts: {sum(restarts)}, in {sum(map(bool, restarts))} fits")
    if kills:
        hosted = Counter(kill.aggregators for kill in kills)
        print(f"- kills: {len(kills)}; of ranks that hosted 1 aggregator of the round: {hosted[1]}, 2: {hosted[2]}")
        print("\n| longest wait after a kill, s | kills |\n|---|---|")
        for low, high in pairwise((0, PING, 2 * PING, AGGREGATION + PING, RESTART, 2 * RESTART, float("inf"))):
            print(f"| {low} - {high} | {sum(low <= kill.wait < high for kill in kills)} |")


# ---------------------------------------------------------------------------------------------------------------- stop


def rate(fit: Fit, ranks: list[int], begin: float, end: float) -> float:
    """Rounds a second that these ranks have finished, on average."""
    return mean(sum(begin <= line["time"] < end for line in fit.lines(rank)) for rank in ranks) / (end - begin)


def measure_stop(args: argparse.Namespace) -> None:
    columns = "rounds/s before | during | after | longest wait, s | caught up, s | trained, s | restarts"
    print(f"| stopped | seconds | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number, seconds in enumerate([3 * PING] * args.repetitions + [10.0]):
        stopped = number % 3
        others = [rank for rank in range(3) if rank != stopped]
        with Fit(Settings(3, 3 * NODES_PER_RANK, rounds=FOREVER, seed=number)) as fit:
            fit.await_round(WARM_UP_ROUNDS)
            began = time.monotonic()
            time.sleep(args.window)
            pid, stop = fit.pid(stopped), time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            reached, go = fit.newest_round(), time.monotonic()
            os.kill(pid, signal.SIGCONT)
            time.sleep(args.window)
            ended = time.monotonic()
            (fit.folder / "end").touch()
            fit.end()
            rates = [rate(fit, others, *span) for span in ((began, stop), (stop, go), (go, ended))]
            ends = [[line["time"] for line in fit.lines(rank) if line["time"] > stop - 1] for rank in others]
            longest = max(end - begin for times in ends for begin, end in pairwise(times))
            later = [line for line in fit.lines(stopped) if line["round"] > reached]
            caught_up = next((f"{line['time'] - go:.2f}" for line in later), "never")
            trained = next((f"{line['time'] - go:.2f}" for line in later if line["trained"]), "never")
            cells = [*(f"{value:.1f}" for value in rates), f"{longest:.2f}", caught_up, trained, str(fit.restarts())]
            print(f"| rank {stopped} | {seconds} | " + " | ".join(cells) + " |", flush=True)
            assert all(fit.result(rank) for rank in range(3))


# ------------------------------------------------------------------------------------------------------------ overhead


def measure_overhead(args: argparse.Namespace) -> None:
    """Every node's model is awaited, so that all sides train the same clients; nobody validates."""
    sides = {"elastic, 2 ranks": (2, True), "collective, 2 ranks": (2, False), "1 rank": (1, False)}
    walls: dict[str, list[float]] = {name: [] for name in sides}
    cpus: dict[str, list[float]] = {name: [] for name in sides}
    trained: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(args.repetitions):
        for name, (ranks, elastic) in sides.items():
            settings = Settings(ranks, 50, args.rounds, elastic, success_fraction=1.0, validate=False, seed=repetition)
            with Fit(settings) as fit:
                fit.end()
                lines = [fit.lines(rank)[1 + WARM_UP_ROUNDS :] for rank in range(ranks)]
                count = len(lines[0]) - 1
                walls[name].append(1000 * (lines[0][-1]["time"] - lines[0][0]["time"]) / count)
                cpus[name].append(1000 * sum(side[-1]["cpu"] - side[0]["cpu"] for side in lines) / count)
                shares = lines if elastic else lines[:1]  # a simulation knows of all clients on each rank
                trained[name].append(sum(line["trained"] for side in shares for line in side[1:]) / count)
                say(f"{repetition} {name}: wall {walls[name][-1]:.1f} ms, CPU {cpus[name][-1]:.1f} ms")
    print("| exchange | wall, ms a round | range | CPU of all ranks, ms a round | range | trained a round |")
    print("|---|---|---|---|---|---|")
    for name in sides:
        cells = [f"{median(times):.1f} | {min(times):.1f} - {max(times):.1f}" for times in (walls[name], cpus[name])]
        print(f"| {name} | {' | '.join(cells)} | {mean(trained[name]):.2f} |")
    for kind, times in (("wall", walls), ("CPU", cpus)):
        ratios = [ours / theirs for ours, theirs in zip(times["elastic, 2 ranks"], times["collective, 2 ranks"])]
        print(f"\n{kind}, elastic / collective: {median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    kills = commands.add_parser("kills")
    kills.add_argument("--repetitions", type=int, default=20)
    kills.add_argument("--first", type=int, default=0, help="number of the first repetition, which is its seed")
    kills.add_argument("--ranks", type=int, default=5)
    kills.add_argument("--no-victims", dest="victims", action="store_false", help="for comparison")
    stop = commands.add_parser("stop")
    stop.add_argument("--repetitions", type=int, default=5, help="of three ping timeouts; then one of ten seconds")
    stop.add_argument("--window", type=float, default=5.0, help="seconds before and after")
    overhead = commands.add_parser("overhead")
    overhead.add_argument("--repetitions", type=int, default=5)
    overhead.add_argument("--rounds", type=int, default=60)
    rank = commands.add_parser("rank", help="what the launcher runs")
    rank.add_argument("folder", type=Path)
    rank.add_argument("settings", type=json.loads)
    args = parser.parse_args()
    if args.command == "rank":
        run_rank(args.folder, Settings(**args.settings))
    else:
        {"kills": measure_kills, "stop": measure_stop, "overhead": measure_overhead}[args.command](args)


if __name__ == "__main__":
    main()

"""SIGKILL at random moments, and checkpoints that another number of ranks resumes."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

import numpy as np
from chaos_case import SECONDS_TO_END, Broken, Case, Whole, leftovers, outcome_of, run_whole
from chaos_ranks import Hang, Ranks
from chaos_run import SAVE_EVERY, Outcome, Run, differences, fit

AGAIN = 0.3  # of the killed runs are killed a second time, after they were resumed
RANKS = (1, 2, 4)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Wholes(dict[tuple[str, int], Whole]):
    """The uninterrupted runs, by strategy and ranks, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, key: tuple[str, int]) -> Whole:
        strategy, ranks = key
        self[key] = run_whole(Run(strategy, tempfile.mkdtemp(dir=self.folder), ranks))
        return self[key]


@dataclass
class Tally:
    """What has become of a strategy's killed runs."""

    kills: int = 0
    half_saved: int = 0
    equal: int = 0
    unequal: int = 0
    hangs: int = 0
    steps_lost: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def row(self, name: str) -> str:
        cells = [self.kills, self.half_saved, self.equal, self.unequal, self.hangs]
        return f"| {name} | {' | '.join(map(str, cells))} | {max(self.waits, default=0):.1f} |"


def kill_and_resume(case: Case, tally: Tally, again: bool) -> None:
    """Kill a run once or twice, resume it, and compare.

    Raises:
        Broken: if it does not end with the bits of the uninterrupted run.
        Hang: if a process outlives the time-out.
    """
    kills, wanted = 0, 1 + again
    while kills < wanted:
        before = leftovers(case.folder)
        ends = case.kill()
        if ends is None and kills:
            break  # it has ended before the second kill, and `finish` resumes its last checkpoint
        if ends is None:
            shutil.rmtree(case.folder)
            continue
        kills += 1
        tally.kills += 1
        tally.half_saved += bool(leftovers(case.folder) - before)
    case.compare(case.finish())


def measure_kills(moments: int, strategies: list[str], most_ranks: int, seed: int) -> int:
    """Kill runs at so many moments, print a table, and return how many runs were not as they should have been."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    wholes, trial = Wholes(folder), 0
    while sum(tally.kills for tally in tallies.values()) < moments:
        draw = random.Random(f"{seed}/{trial}")
        name, ranks = strategies[trial % len(strategies)], 1 + (trial // len(strategies)) % most_ranks
        case = Case(Run(name, str(folder / f"{trial}"), ranks), wholes[name, ranks], draw)
        tally, before = tallies[name], tallies[name].kills
        left = moments - sum(tally.kills for tally in tallies.values())
        try:
            kill_and_resume(case, tally, left > 1 and draw.random() < AGAIN)
            tally.equal += 1
            shutil.rmtree(case.folder)
        except (Broken, Hang) as error:
            tally.unequal += isinstance(error, Broken)
            tally.hangs += isinstance(error, Hang)
            say(f"FAILED, seed {seed}, trial {trial}, {name} on {ranks} ranks, see {case.folder}: {error}")
            if tally.kills == before:
                tally.kills += 1
        tally.waits += case.waits
        say(f"{trial}: {name}, {ranks} ranks, {tally.kills - before} kills, resumed at joint step {case.begins}")
        trial += 1
    print("| strategy | kills | while it saved | runs equal | unequal | hangs | longest wait for the other rank, s |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(tallies[name].row(name) for name in strategies if name in tallies))
    totals = [sum(getattr(tally, name) for tally in tallies.values()) for name in ("kills", "half_saved", "equal")]
    failed = sum(tally.unequal + tally.hangs for tally in tallies.values())
    print(f"\n{totals[0]} kills, {totals[1]} of them while a checkpoint was written or deleted, in {trial} runs:")
    print(f"{totals[2]} of {trial} bitwise equal to the uninterrupted run.")
    if not failed:
        shutil.rmtree(folder)
    return failed


# ---------------------------------------------------------------------------------------------- other numbers of ranks


def largest_difference(one: Outcome, other: Outcome) -> float:
    """Between the numbers of two outcomes."""
    return float(max(np.abs(one[name] - other[name]).max(initial=0.0) for name in ("model", "rows", "buffers")))


def without_step_metrics(outcome: Outcome) -> Outcome:
    """What every rank knows of itself alone is not the same on another number of ranks."""
    metrics = {name: value for name, value in outcome["metrics"].items() if not name.endswith("_step")}
    return {**outcome, "metrics": metrics}


def measure_ranks(strategies: list[str], seed: int, tolerance: float = 1e-6) -> int:
    """Resume on other numbers of ranks, print a table, and return how many runs were not as they should have been."""
    pairs, failed = [*permutations(RANKS, 2)], 0
    print("| strategy | " + " | ".join(f"{a} -> {b}" for a, b in pairs) + " |\n|---" + "|---" * len(pairs) + "|")
    for name in strategies:
        draw = random.Random(f"{seed}/{name}")
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            saved: dict[int, Outcome] = {}
            for size in RANKS:
                run = Run(name, f"{folder}/saved-on-{size}", size, keeps_all=True)
                with Ranks(size, fit, run, log=run.log) as ranks:
                    saved[size] = outcome_of(ranks.ends(SECONDS_TO_END))
            cells = []
            for number, (size, other) in enumerate(pairs):
                steps = range(SAVE_EVERY, saved[size]["steps"][0], SAVE_EVERY)
                path = f"{folder}/saved-on-{size}/step={draw.choice(steps)}.ckpt"
                run = replace(run, folder=f"{folder}/{number}", ranks=other, resume=path)
                with Ranks(other, fit, run, log=run.log) as ranks:
                    resumed = outcome_of(ranks.ends(SECONDS_TO_END))
                whole, resumed = without_step_metrics(saved[size]), without_step_metrics(resumed)
                different = differences(whole, resumed, tolerance)
                failed += bool(different)
                cells.append(f"{largest_difference(whole, resumed):.1e}" + f" {different}" * bool(different))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return failed

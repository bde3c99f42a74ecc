"""The randomized loop: episodes of one run each, with one to three injections, until the time is over."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from chaos_case import Broken, Case
from chaos_injections import INJECTIONS, TOO_LATE, Elastic
from chaos_kills import Wholes, say
from chaos_ranks import Hang
from chaos_run import ELASTIC, Outcome, Run

ELASTIC_RANKS, ELASTIC_PAUSE = 3, 0.3
ELASTIC_SHARE = 0.3  # of the episodes
MOST_INJECTIONS = 3


@dataclass
class Account:
    """What has become of the runs into which something was injected.

    Attributes:
        handled: how, and how often.
        right: runs that ended with the bits of the uninterrupted one, or whose surviving ranks went on to the end.
        lost: runs that did not.
        hangs: runs of which a process has outlived its time-out.
    """

    handled: Counter[str] = field(default_factory=Counter)
    right: int = 0
    lost: int = 0
    hangs: int = 0

    def row(self, name: str, otherwise: str) -> str:
        times = sum(number for words, number in self.handled.items() if words != TOO_LATE)
        ways = "; ".join(f"{words}: {number}" for words, number in self.handled.most_common())
        return f"| {name} | {times} | {ways or otherwise} | {self.right} | {self.lost} | {self.hangs} |"


def available() -> list[str]:
    """The injections that this machine lets us do."""
    is_root = os.geteuid() == 0 and shutil.which("ip") is not None
    if is_root:
        is_root = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode == 0
    return [name for name, injection in INJECTIONS.items() if is_root or not injection.needs_root]


def empty(folder: Path) -> None:
    """Delete what is in a folder, which may be a disk of its own."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass
class Loop:
    """Runs episodes, and counts.

    Attributes:
        strategies: what is drawn from.
        seed: of all episodes.
        folder: where all runs save.
        accounts: by injection.
        episodes: of each strategy.
    """

    strategies: list[str]
    seed: int
    folder: Path
    accounts: dict[str, Account] = field(default_factory=lambda: {name: Account() for name in INJECTIONS})
    episodes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.wholes = Wholes(self.folder)
        self.available = available()

    def run(self, number: int) -> None:
        """One episode, which its number and the seed determine, but for the machine's timing."""
        draw = random.Random(f"{self.seed}/{number}")
        elastic = draw.random() < ELASTIC_SHARE
        name = draw.choice(list(ELASTIC) if elastic else self.strategies)
        size = ELASTIC_RANKS if elastic else draw.choice([1, 2])
        chosen = self._draw(draw, elastic, size)
        title = f"{number}: {'elastic ' * elastic}{name}, {size} ranks"
        self.episodes["elastic" if elastic else name] += 1
        folder, done = self.folder / f"{number}", dict.fromkeys(chosen, 0)
        try:
            if elastic:
                self._elastic(Elastic(Run(name, str(folder), size, elastic=True, pause=ELASTIC_PAUSE), draw), chosen)
            else:
                self._ordinary(Case(Run(name, str(folder), size), self.wholes[name, size], draw), chosen)
            for one in done:
                self.accounts[one].right += 1
            say(f"{title}: {', '.join(chosen)}")
            shutil.rmtree(folder, ignore_errors=True)
        except (Broken, Hang) as error:
            for one in done:
                self.accounts[one].lost += isinstance(error, Broken)
                self.accounts[one].hangs += isinstance(error, Hang)
            say(f"FAILED, seed {self.seed}, episode {title}, {chosen}, see {folder}: {type(error).__name__} {error}")

    def _draw(self, draw: random.Random, elastic: bool, size: int) -> list[str]:
        """The injections of an episode."""
        names = [
            name
            for name in self.available
            if INJECTIONS[name].elastic == elastic and INJECTIONS[name].fewest_ranks <= size
        ]
        weights = [INJECTIONS[name].weight for name in names]
        return draw.choices(names, weights, k=1 if elastic else draw.randint(1, MOST_INJECTIONS))

    def _elastic(self, case: Elastic, chosen: list[str]) -> None:
        for name in chosen:
            words, _ = INJECTIONS[name].happen(case)
            self.accounts[name].handled[words] += 1

    def _ordinary(self, case: Case, chosen: list[str]) -> None:
        """Inject, then resume without interruptions if the run has not come to its end yet, and compare."""
        outcome: Outcome | None = None
        with ExitStack() as surroundings:
            for name in dict.fromkeys(chosen):
                surroundings.enter_context(INJECTIONS[name].surroundings(case.folder))
            for name in chosen:
                words, outcome = INJECTIONS[name].happen(case)
                self.accounts[name].handled[words] += 1
                if outcome is not None:
                    case.compare(outcome)
                if outcome is not None or words == TOO_LATE:
                    empty(case.folder)  # what is injected next needs a run that is not over
            if outcome is None:
                case.compare(case.finish())

    def table(self) -> str:
        """What was injected, and what was lost."""
        head = "| injection | times | handled | runs right | silent losses | hangs |\n|---|---|---|---|---|---|\n"
        missing = {name: "not drawn" if name in self.available else "skipped: needs root" for name in self.accounts}
        return head + "\n".join(account.row(name, missing[name]) for name, account in self.accounts.items())


def measure_loop(minutes: float, strategies: list[str], seed: int, first: int) -> int:
    """Run episodes for so many minutes, print a table, and return how many were not as they should have been."""
    start = time.monotonic()
    loop = Loop(strategies, seed, Path(tempfile.mkdtemp(prefix="chaos-")))
    number = first
    while time.monotonic() < start + 60 * minutes:
        loop.run(number)
        number += 1
    print(loop.table())
    counts = ", ".join(f"{name} {times}" for name, times in sorted(loop.episodes.items()))
    print(f"\n{number - first} episodes in {(time.monotonic() - start) / 60:.1f} minutes, seed {seed}: {counts}.")
    failed = sum(account.lost + account.hangs for account in loop.accounts.values())
    if not failed:
        shutil.rmtree(loop.folder)
    return failed

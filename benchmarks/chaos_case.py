"""A run that is interrupted at a random moment, again and again if wanted, and resumed until it ends."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from chaos_ranks import End, Ranks
from chaos_run import TIMEOUT, Outcome, Run, differences, fit, joined

from lightning_fed import newest_complete_checkpoint

# The documented time-out, and time for a busy machine to start and end processes in.
SECONDS_TO_END = 2 * TIMEOUT + 60.0
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Whole:
    """A run that nothing has interrupted.

    Attributes:
        outcome: what it has led to.
        first_save: seconds until its first checkpoint was there.
        seconds: until its end.
    """

    outcome: Outcome
    first_save: float
    seconds: float


class Broken(Exception):
    """A run was not what it should have been."""


def has_saved(folder: str) -> bool:
    """Whether there is an ordinary file, which is the last of its checkpoint's files to appear."""
    return any(Path(folder).glob("*.ckpt"))


def all_ended_well(ends: dict[int, End]) -> bool:
    """Whether every rank has returned something."""
    return all(end.value is not None for end in ends.values())


def outcome_of(ends: dict[int, End]) -> Outcome:
    """What the ranks have returned together.

    Raises:
        Broken: with what the ranks said, if one of them has not.
    """
    if not all_ended_well(ends):
        raise Broken("a run that nothing interrupts has failed:\n" + "\n".join(end.error for end in ends.values()))
    return joined({rank: end.value for rank, end in ends.items()})


def run_whole(run: Run) -> Whole:
    """Run without interruptions, in a folder that is deleted."""
    with Ranks(run.ranks, fit, run, log=run.log) as ranks:
        while ranks.are_running and not has_saved(run.folder):
            time.sleep(POLL_SECONDS)
        first_save = time.monotonic() - ranks.start
        outcome = outcome_of(ranks.ends(SECONDS_TO_END))
        seconds = time.monotonic() - ranks.start
    shutil.rmtree(run.folder)
    Path(run.log).unlink()
    return Whole(outcome, first_save, seconds)


@dataclass
class Case:
    """A run in a folder of its own.

    Attributes:
        run: its strategy, folder and ranks.
        whole: the same run without interruptions.
        draw: decides moments, victims and ways.
        waits: seconds from each interruption until all processes were gone.
        begins: for each resumed run, the joint step that it began with.
    """

    run: Run
    whole: Whole
    draw: random.Random
    waits: list[float] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the run saves."""
        return Path(self.run.folder)

    def way_to_resume(self) -> str | None:
        """What a user would pass as ``ckpt_path``: one of two ways, if there is a checkpoint at all."""
        newest = newest_complete_checkpoint(self.folder)
        if newest is None:
            return None
        return "last" if any(self.folder.glob("last*.ckpt")) and self.draw.random() < 0.5 else str(newest)

    def start(self) -> Ranks:
        """Start, or resume."""
        return Ranks(self.run.ranks, fit, replace(self.run, resume=self.way_to_resume()), log=self.run.log)

    def interrupt(self, act: Callable[[Ranks], None]) -> tuple[dict[int, End], bool]:
        """Start or resume, and do something to the ranks at a random moment after their first checkpoint.

        Returns:
            how all ranks have ended, and whether something was done to them before they had.
        """
        fresh = not has_saved(self.run.folder)
        with self.start() as ranks:
            while fresh and ranks.are_running and not has_saved(self.run.folder):
                time.sleep(POLL_SECONDS)
            moment = time.monotonic() + self.draw.uniform(0, self.whole.seconds - fresh * self.whole.first_save)
            while ranks.are_running and time.monotonic() < moment:
                time.sleep(POLL_SECONDS)
            acts = ranks.are_running
            if acts:
                act(ranks)
            since = time.monotonic()
            ends = ranks.ends(SECONDS_TO_END)
        self.waits += [time.monotonic() - since] * acts
        return ends, acts

    def kill(self) -> dict[int, End] | None:
        """SIGKILL one of the ranks, or all; the others must end by themselves. None if they had ended before."""
        ranks = range(self.run.ranks)
        victims = self.draw.choice([*([rank] for rank in ranks), [*ranks]])

        def act(ranks: Ranks) -> None:
            for victim in victims:
                ranks.send(victim, signal.SIGKILL)

        ends, killed = self.interrupt(act)
        if not killed and not all_ended_well(ends):
            raise Broken("\n".join(end.error for end in ends.values()))
        return ends if killed and not all_ended_well(ends) else None

    def finish(self) -> Outcome:
        """Run to the end, without interruptions.

        Raises:
            Broken: if the run fails.
        """
        with self.start() as ranks:
            outcome = outcome_of(ranks.ends(SECONDS_TO_END))
        self.begins.append(outcome["began"][0])
        return outcome

    def compare(self, outcome: Outcome) -> None:
        """Ask for the bits of the uninterrupted run.

        Raises:
            Broken: naming what differs.
        """
        different = differences(self.whole.outcome, outcome)
        if different:
            raise Broken(f"{different} differ after a resume at joint step {outcome['began'][0]}")


def leftovers(folder: Path) -> set[str]:
    """What is there of checkpoints that were being written or deleted: temporary files, directories of no file."""
    directories = {path.name: path.name.split(".federation-")[0] for path in folder.glob("*.federation-*")}
    owned = {path.name for path in folder.glob("*.federation-*") if (path / "manifest.json").exists()}
    alone = {name for name, stem in directories.items() if not (folder / f"{stem}.ckpt").exists()}
    return {str(path) for path in folder.rglob("*.writing")} | alone | (directories.keys() - owned)

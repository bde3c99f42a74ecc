"""What happens to a run: a signal, a full disk, a damaged file, a lost link; and what must follow.

An injection gets a :class:`~chaos_case.Case`, or an :class:`Elastic`, and returns how the package has handled it, and
the outcome of the run, if it has come to its end.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from chaos_case import POLL_SECONDS, SECONDS_TO_END, Broken, Case, all_ended_well, outcome_of
from chaos_ranks import End, Hang, Place, Ranks
from chaos_run import EPOCHS, TIMEOUT, Outcome, Run, complete_files, fit
from throttled_links import INTERFACE, SUBNET, Network, command

from lightning_fed import newest_complete_checkpoint
from lightning_fed.federation.manifest import damage as damage_of

Handled = tuple[str, Outcome | None]
TOO_LATE = "too late: the run had ended"
DISK_BYTES, CHECKPOINT_BYTES = 2**22, 150_000
# Past the time-out: up to 5 s for ranks that may have failed at one place, and the end of the process.
SECONDS_PAST_TIMEOUT = 15.0
# A process group whose first rank is gone before the others have found it is looked for twice.
SECONDS_TO_MEET = 2 * TIMEOUT
# After so many retransmissions TCP gives a connection up: 12 s, instead of the quarter of an hour of Linux's default.
RETRANSMISSIONS = 5


def errors(ends: dict[int, End]) -> str:
    return "\n".join(end.error for end in ends.values())


# ------------------------------------------------------------------------------------------------------------- signals


def kill(case: Case) -> Handled:
    """SIGKILL to one of the ranks, or to all."""
    before = len(case.waits)
    ends = case.kill()
    if ends is None:
        return TOO_LATE, None
    survived = any(end.error for end in ends.values())
    if case.waits[before] > SECONDS_TO_MEET + SECONDS_PAST_TIMEOUT:
        raise Hang(f"the other rank has ended {case.waits[before]:.0f} s after the kill")
    return "the other rank ended with an error" * survived or "resumed", None


def stop(case: Case) -> Handled:
    """SIGSTOP, some seconds, SIGCONT: a slow rank."""
    victim, seconds = case.draw.randrange(case.run.ranks), case.draw.uniform(0.5, 3)

    def act(ranks: Ranks) -> None:
        ranks.send(victim, signal.SIGSTOP)
        time.sleep(seconds)
        ranks.send(victim, signal.SIGCONT)

    ends, acted = case.interrupt(act)
    return "waited for" if acted else TOO_LATE, outcome_of(ends)


def freeze(case: Case) -> Handled:
    """SIGSTOP for longer than the time-out: the other rank must give up."""
    victim = case.draw.randrange(case.run.ranks)

    def act(ranks: Ranks) -> None:
        ranks.send(victim, signal.SIGSTOP)
        deadline = time.monotonic() + SECONDS_TO_MEET + SECONDS_PAST_TIMEOUT
        while ranks.are_running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        late = ranks.are_running
        ranks.send(victim, signal.SIGCONT)
        if late:
            raise Hang(f"the other rank waits for longer than {SECONDS_TO_MEET:.0f} s")

    ends, _ = case.interrupt(act)
    if all_ended_well(ends):
        return TOO_LATE, outcome_of(ends)
    return "the other rank gave up after the time-out", None


def terminate(case: Case) -> Handled:
    """SIGTERM to one of the ranks."""
    victim = case.draw.randrange(case.run.ranks)
    ends, _ = case.interrupt(lambda ranks: ranks.send(victim, signal.SIGTERM))
    if all_ended_well(ends):
        return TOO_LATE, outcome_of(ends)
    if ends[victim].died:
        return "ended before its training began", None
    if not all("SIGTERMException" in end.error for end in ends.values()):
        raise Broken(f"SIGTERM to rank {victim}: {errors(ends)}")
    return "saved and ended", None


# ----------------------------------------------------------------------------------------------------------- the disk


class SmallDisk:
    """A tmpfs of 4 MB at a folder, where the system lets us mount one; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        command("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.folder))

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def fill_disk(case: Case) -> Handled:
    """Leave less room than a checkpoint takes, from a random moment on; make room again for the next run."""
    filler, left = case.folder / "filler", case.draw.randrange(CHECKPOINT_BYTES)
    spoiled_before = damages(case.folder)

    def act(ranks: Ranks) -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(file.tell() - left, 0))

    ends, acted = case.interrupt(act)
    filler.unlink(missing_ok=True)
    if all_ended_well(ends):
        return "no checkpoint needed the room" if acted else TOO_LATE, outcome_of(ends)
    if not all("could not be written" in end.error for end in ends.values()):
        raise Broken(f"full disk: {errors(ends)}")
    spoiled = damages(case.folder) - spoiled_before
    if spoiled or any(case.folder.rglob("*.writing")):
        raise Broken(f"the full disk has spoiled a checkpoint: {spoiled}")
    return "all ranks raised OSError, the last checkpoint was whole", None


def damages(folder: Path) -> set[str]:
    """What is wrong with the checkpoints in a folder, also by earlier injections."""
    return {words for path in complete_files(folder) for words in damage_of(path)}


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def spoil(case: Case) -> Handled:
    """Cut, flip a bit of, or delete one file of the newest checkpoint, and resume from that one."""
    if not complete_files(case.folder):
        case.kill()
    if not complete_files(case.folder):
        return "there was no checkpoint yet", None
    newest = complete_files(case.folder)[-1]
    directories = case.folder.glob(f"{newest.stem}.federation-*")
    target = case.draw.choice(sorted([newest, *(file for folder in directories for file in folder.iterdir())]))
    case.draw.choice([cut, flip, delete])(target, case.draw)
    if not damage_of(newest):
        return "no file of the checkpoint (left over from a killed run)", None
    contents = {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()}
    by_name = newest.exists() and newest.stem.startswith("last") and case.draw.random() < 0.5
    run = replace(case.run, resume="last" if by_name else str(newest))
    with Ranks(run.ranks, fit, run, log=run.log) as ranks:
        ends = ranks.ends(SECONDS_TO_END)
    if all_ended_well(ends):
        outcome = outcome_of(ends)
        if not any("is damaged" in words for words in outcome["warnings"]):
            raise Broken(f"{target} was damaged, and nothing says so")
        return "warned, and resumed from the one before", outcome
    if not all("ValueError" in end.error and newest.name in end.error for end in ends.values()):
        raise Broken(f"{target} was damaged: {errors(ends)}")
    if contents != {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()}:
        raise Broken(f"{target} was damaged, and the refused run has changed files")
    offered = newest_complete_checkpoint(case.folder)
    if offered is not None and not all(str(offered) in end.error for end in ends.values()):
        raise Broken(f"{target} was damaged, and {offered} was not offered: {errors(ends)}")
    return f"refused, {'the one before offered' if offered else 'none before it'}", None


# ------------------------------------------------------------------------------------------------- elastic federations


class Links(Network):
    """Namespaces of ranks, and of the store, whose links are cut; a context manager that leaves none."""

    STORE = f"{SUBNET}.254"

    def _build(self) -> None:
        super()._build()
        command("ip", "-n", self.hub, "addr", "add", f"{self.STORE}/24", "dev", "bridge")
        for namespace in (self.hub, *self.namespaces):
            setting = f"net.ipv4.tcp_retries2={RETRANSMISSIONS}"
            command("ip", "netns", "exec", namespace, "sysctl", "-q", "-w", setting)

    @property
    def places(self) -> list[Place]:
        """Of the ranks."""
        return [Place(namespace, INTERFACE, self.STORE) for namespace in self.namespaces]

    @property
    def store(self) -> Place:
        """Of the store: at the hub, which reaches every rank."""
        return Place(self.hub, "bridge", self.STORE)

    def cut(self, ranks: list[int]) -> None:
        """Drop what two ranks send each other, without a word; of one rank, also what it sends to the store."""
        for rank in ranks:
            state = ["down"] if len(ranks) == 1 else ["type", "bridge_slave", "isolated", "on"]
            command("ip", "-n", self.hub, "link", "set", "dev", f"port{rank}", *state)

    def mend(self, ranks: list[int]) -> None:
        """Let it through again."""
        for rank in ranks:
            state = ["up"] if len(ranks) == 1 else ["type", "bridge_slave", "isolated", "off"]
            command("ip", "-n", self.hub, "link", "set", "dev", f"port{rank}", *state)


@dataclass
class Elastic:
    """A run whose ranks may die without the others.

    Attributes:
        run: its strategy, folder and ranks.
        draw: decides moments, victims and ways.
    """

    run: Run
    draw: random.Random

    def interrupt(self, act: Callable[[Ranks], None], links: Links | None = None) -> dict[int, End]:
        """Start, do something to the ranks after their first checkpoint, and wait for their ends."""
        places = (links.places, links.store) if links else (None, Place())
        with Ranks(self.run.ranks, fit, self.run, places=places[0], store=places[1], log=self.run.log) as ranks:
            while ranks.are_running and not any(Path(self.run.folder).glob("*.ckpt")):
                time.sleep(POLL_SECONDS)
            time.sleep(self.draw.uniform(0, EPOCHS * self.run.pause / 2))
            act(ranks)
            return ranks.ends(SECONDS_TO_END)

    def require(self, ends: dict[int, End], ranks: set[int]) -> None:
        """Ask of some ranks that they have ended well, and of one of all that it has led the fit to its last epoch."""
        values = {rank: end.value for rank, end in ends.items()}
        leaders = [value for value in values.values() if value is not None and value["leads"]]
        if any(values[rank] is None for rank in ranks) or [leader["epochs"] for leader in leaders] != [self.run.epochs]:
            raise Broken(f"elastic ranks: {[end.value or end.error for end in ends.values()]}")


def kill_elastic(case: Elastic) -> Handled:
    """SIGKILL to all but one or two of three ranks."""
    victims = case.draw.sample(range(case.run.ranks), case.draw.randrange(1, case.run.ranks))

    def act(ranks: Ranks) -> None:
        for victim in victims:
            ranks.send(victim, signal.SIGKILL)
            time.sleep(case.draw.choice([0, 0.5]))

    case.require(case.interrupt(act), {*range(case.run.ranks)} - {*victims})
    return "the others finished all rounds", None


def stop_elastic(case: Elastic) -> Handled:
    """SIGSTOP, shorter or longer than pings may take, then SIGCONT."""
    victim, seconds = case.draw.randrange(case.run.ranks), case.draw.choice([0.2, 1, 3])

    def act(ranks: Ranks) -> None:
        ranks.send(victim, signal.SIGSTOP)
        time.sleep(seconds)
        ranks.send(victim, signal.SIGCONT)

    case.require(case.interrupt(act), {*range(case.run.ranks)})
    return "the leader finished all rounds, and all ended well", None


def cut_link(case: Elastic) -> Handled:
    """Cut off a rank, or the link between two, and mend it after some seconds, or never."""
    ranks = case.draw.sample(range(case.run.ranks), case.draw.choice([1, 2]))
    seconds = case.draw.choice([1.0, 3.0, None])
    links = Links(case.run.ranks)
    with links:

        def act(_: Ranks) -> None:
            links.cut(ranks)
            if seconds is not None:
                time.sleep(seconds)
                links.mend(ranks)

        try:
            ends = case.interrupt(act, links)
        except Hang as error:
            raise Hang(f"links of {ranks} cut for {seconds} s: {error}") from error
    if len(ranks) == 2:
        case.require(ends, {*range(case.run.ranks)})
        return "between two ranks: the leader finished all rounds, and all ended well", None
    case.require(ends, {*range(case.run.ranks)} - {*ranks})
    how = "it finished too" if ends[ranks[0]].value else "it ended with an error"
    return f"of one rank: the others finished all rounds, {how}", None


# --------------------------------------------------------------------------------------------------------------- all


@dataclass(frozen=True)
class Injection:
    """One kind of event.

    Attributes:
        happen: lets it happen.
        weight: how often, against the others.
        fewest_ranks: on which it means something.
        elastic: of a federation whose ranks may die.
        needs_root: for a mount or for network namespaces.
    """

    happen: Callable[..., Handled]
    weight: float = 1.0
    fewest_ranks: int = 1
    elastic: bool = False
    needs_root: bool = False

    def surroundings(self, folder: Path) -> AbstractContextManager[None]:
        """What must be there before the run is."""
        return SmallDisk(folder) if self.happen is fill_disk else nullcontext()


INJECTIONS = {
    "SIGKILL": Injection(kill, 2.0),
    "SIGSTOP, 0.5 - 3 s": Injection(stop),
    "SIGSTOP, past the time-out": Injection(freeze, 0.3, fewest_ranks=2),
    "SIGTERM": Injection(terminate, 1.5),
    "full disk": Injection(fill_disk, 1.5, needs_root=True),
    "damaged checkpoint": Injection(spoil, 2.0),
    "elastic: SIGKILL": Injection(kill_elastic, elastic=True),
    "elastic: SIGSTOP": Injection(stop_elastic, 0.7, elastic=True),
    "elastic: lost link": Injection(cut_link, 1.0, elastic=True, needs_root=True),
}

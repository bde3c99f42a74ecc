"""``lightning-fed launch``: start the ranks of an elastic federation, whose survivors go on when others die.

It differs from torchrun in that a rank's death is reported and nothing more, and from Lightning's own launcher in
that rank 0 may die too. The store in which ranks find each other lives in the launcher.

One machine::

    lightning-fed launch --ranks 4 -- lightning-fed fit --config experiment.yaml --trainer.devices 4

Several machines, with the same number of ranks on each. Lightning demands ``devices * num_nodes == ranks``::

    first:   lightning-fed launch --ranks 8 --ranks-of-this-machine 0-3 --port 29400 -- \\
                 lightning-fed fit --config experiment.yaml --trainer.devices 4 --trainer.num_nodes 2
    second:  lightning-fed launch --ranks 8 --ranks-of-this-machine 4-7 --store first:29400 -- \\
                 lightning-fed fit --config experiment.yaml --trainer.devices 4 --trainer.num_nodes 2

The launcher that hosts the store stays until the ranks of all machines have ended. With ``--ranks 0`` it does nothing
but host one until it is told to end; under SLURM, whose ``srun`` starts the ranks::

    lightning-fed launch --ranks 0 --port 29400 &
    LIGHTNING_FED_STORE=$(hostname):29400 srun --no-kill --kill-on-bad-exit=0 \\
        lightning-fed fit --config experiment.yaml ...
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from types import FrameType

import torch.distributed as dist

from lightning_fed.federation.peer_network import STORE_VARIABLE, connect_store
from lightning_fed.federation.store_host import host_store, listen

SECONDS_BETWEEN_LOOKS = 0.1
# After a signal that asks ranks to end, as torchrun waits.
SECONDS_TO_END = 30.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Launcher:
    """Starts ranks, tells how they end, and restarts those that crash.

    Args:
        command: what each rank runs.
        ranks: the ranks of this machine.
        num_ranks: ranks on all machines.
        address: host and port of the store.
        restarts: how often a rank is started again after a crash.
    """

    def __init__(
        self, command: list[str], ranks: range, num_ranks: int, address: tuple[str, int], restarts: int
    ) -> None:
        self.command, self.ranks, self.num_ranks, self.address = command, ranks, num_ranks, address
        self.restarts_left = dict.fromkeys(ranks, restarts)
        self.run_id = uuid.uuid4().hex
        self.restarts = restarts
        self.running: dict[int, subprocess.Popen] = {}
        self.succeeded: list[int] = []
        self._patience = float("inf")  # when ranks that have been asked to end are killed

    def run(self) -> int:
        """Run the ranks to their end; returns how many ended well."""
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        try:
            for rank in self.ranks:
                self._start(rank)
            while self.running:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self._look()
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return len(self.succeeded)

    @property
    def interrupted(self) -> bool:
        """Whether a signal has told the launcher to end."""
        return self._patience != float("inf")

    def _look(self) -> None:
        """See which ranks have ended."""
        if time.monotonic() > self._patience:
            self._kill()
        for rank, process in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[rank]
            _say(f"rank {rank} {_ending(code)}")
            if code == 0:
                self.succeeded.append(rank)
            elif self.restarts_left[rank] and not self.interrupted:
                self.restarts_left[rank] -= 1
                _say(f"rank {rank} starts again ({self.restarts_left[rank]} restarts left)")
                self._start(rank)

    def _start(self, rank: int) -> None:
        if self.interrupted:
            return
        # A session of its own: an interrupt from the keyboard reaches it once, through the launcher.
        self.running[rank] = subprocess.Popen(self.command, env=self._environment(rank), start_new_session=True)

    def _environment(self, rank: int) -> dict[str, str]:
        """What torchrun sets, as far as Lightning and torch read it, and where the store is."""
        host, port = self.address
        return {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            STORE_VARIABLE: f"{host}:{port}",
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - self.ranks.start),
            "GROUP_RANK": str(rank // len(self.ranks)),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_WORLD_SIZE": str(len(self.ranks)),
            "TORCHELASTIC_RUN_ID": self.run_id,
            # A default process group, should there be one, is made through the launcher's store as well.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_MAX_RESTARTS": str(self.restarts),
            "TORCHELASTIC_RESTART_COUNT": str(self.restarts - self.restarts_left[rank]),
        }

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Tell the ranks of a signal; the second time they are killed."""
        self._patience = 0.0 if self.interrupted else time.monotonic() + SECONDS_TO_END
        for process in self.running.values():
            process.send_signal(number)

    def _kill(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its data loader workers
                process.wait()


def main(argv: list[str] | None = None) -> int:
    """Run the launcher.

    Args:
        argv: what follows the program's name; by default that of this process.

    Returns:
        the exit code: 0 if at least one rank of this machine ended well.
    """
    settings = parse(sys.argv[1:] if argv is None else argv)
    store = None
    if settings.store is None:
        listener = listen("", settings.port)
        settings.store = "127.0.0.1", listener.getsockname()[1]
        store = host_store(listener)
        _say(f"store on port {settings.store[1]}")
    if settings.ranks == 0:
        _sleep_until_told_to_end()
        return 0
    host, port = settings.store
    client = store or connect_store(host, port, timeout=60.0)
    launcher = Launcher(settings.command, settings.of_this_machine, settings.ranks, settings.store, settings.restarts)
    succeeded = launcher.run()
    _say(f"{succeeded} of {len(settings.of_this_machine)} ranks ended well")
    ended = _count_ended(client, len(settings.of_this_machine))
    if store is not None and ended < settings.ranks and not launcher.interrupted:
        _await_other_machines(store, settings.ranks)
    return 0 if succeeded else 1


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; ends the program with a message if it makes no sense."""
    parser = argparse.ArgumentParser("lightning-fed launch", description="Ranks that outlive each other.")
    parser.add_argument("--ranks", type=int, required=True, help="on all machines; 0 to host nothing but the store")
    parser.add_argument("--restarts", type=int, default=0, help="how often a rank is started again after a crash")
    parser.add_argument("--port", type=int, default=0, help="of the store hosted here; by default any free one")
    parser.add_argument("--ranks-of-this-machine", metavar="FIRST-LAST", help="by default all")
    parser.add_argument("--store", type=_address, metavar="HOST:PORT", help="one that is hosted elsewhere")
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="what each rank runs")
    settings = parser.parse_args(argv)
    if settings.ranks < 0 or settings.restarts < 0:
        parser.error("--ranks and --restarts must not be negative")
    if bool(settings.command) != bool(settings.ranks):
        parser.error("a command is needed after --, except with --ranks 0, which runs none")
    settings.of_this_machine = range(settings.ranks)
    if settings.ranks_of_this_machine is not None:
        try:
            first, last = map(int, settings.ranks_of_this_machine.split("-"))
        except ValueError:
            parser.error(f"--ranks-of-this-machine {settings.ranks_of_this_machine} is not of the form FIRST-LAST")
        settings.of_this_machine = range(first, last + 1)
        count = len(settings.of_this_machine)
        if not count or last >= settings.ranks or settings.ranks % count or first % count:
            parser.error(
                f"ranks {first} to {last} of {settings.ranks}: each machine must have the same number of ranks"
            )
    return settings


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host:
        raise ValueError(text)
    return host, int(port)


def _count_ended(store: dist.Store, count: int) -> int:
    """Tell the store that so many ranks have ended; returns how many have on all machines, -1 without a store."""
    try:
        return store.add("launch/ended", count)
    except RuntimeError:
        return -1


def _await_other_machines(store: dist.Store, num_ranks: int) -> None:
    _say("waits, with the store, for the ranks of other machines")
    try:
        while store.add("launch/ended", 0) < num_ranks:
            time.sleep(1)
    except KeyboardInterrupt:
        _say("interrupted")


def _sleep_until_told_to_end() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.sigwait(SIGNALS)


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return "ended well" if code == 0 else f"failed with exit code {code}"


def _say(text: str) -> None:
    print(f"lightning-fed launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

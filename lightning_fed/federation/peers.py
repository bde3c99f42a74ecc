"""The other ranks of an elastic federation, during one fit."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_fed.federation.client_logs import LogEntry, Logs
from lightning_fed.federation.peer_events import PeerEvents
from lightning_fed.federation.peer_network import STORE_VARIABLE, PeerNetwork, store_address
from lightning_fed.federation.survivors import Survivors

# How long ranks wait at first for those that start more slowly, and how often they look.
START_TIMEOUT = 60.0
LOOK_INTERVAL = 0.02


class Peers:
    """What one rank has of the others: the wires, the thread that listens, and who is alive.

    Args:
        rank: this one.
        num_ranks: how many there are.
        fit: number of the fit in this process; the networks of two fits never meet.
        ping_timeout: seconds in which a living rank answers.
        message_timeout: seconds that a message may take.

    Raises:
        RuntimeError: if there is no store that outlives the ranks.
    """

    def __init__(self, rank: int, num_ranks: int, fit: int, ping_timeout: float, message_timeout: float) -> None:
        address = store_address()
        if address is None:
            raise RuntimeError(
                "on_peer_loss='drop' needs a store that outlives every rank, and whatever started this rank has none: "
                "start with `lightning-fed launch`, with torchrun, or with plain `python` (start_method='popen'), or "
                f"set {STORE_VARIABLE} to the host:port of a store."
            )
        self.network = PeerNetwork(
            *address,
            rank=rank,
            num_ranks=num_ranks,
            prefix=f"lightning_fed/{fit}",
            send_timeout=message_timeout,
        )
        self.events = PeerEvents(self.network)
        self.survivors = Survivors(self.network, ping_timeout)
        self._was_stopped = False
        self.events.on("stop", lambda message: self._stop())
        self._logs: list[dict[str, Any]] = []
        self.events.on("logs", lambda message: self._logs.append(message.header["entries"]))

    @property
    def has_returned(self) -> bool:
        """Whether this process takes the place of one that has died."""
        return self.network.incarnation > 1

    @property
    def is_stopped(self) -> bool:
        """Whether the leader has ended the fit, early or while this rank lagged behind."""
        return self._was_stopped or self.survivors.is_over

    def require_equal_start(self, module: nn.Module) -> None:
        """Refuse a module that other ranks have initialized otherwise.

        Raises:
            ValueError: naming the way out.
        """
        digest = hashlib.sha256()
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                digest.update(
                    name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                )
        mine = digest.hexdigest()
        if self.network.store.compare_set("start", "", mine).decode() != mine:
            raise ValueError(
                f"rank {self.network.rank} has another initial model than the rank that was first, but clients start "
                "from a common one: call seed_everything(...) before the module is made."
            )

    def start(self) -> None:
        """Listen, and give slower ranks time to start; once a fit."""
        if self.events.is_alive():
            return
        self.events.start()
        if self.has_returned:
            return
        store, deadline = self.network.store, time.monotonic() + START_TIMEOUT
        store.add("started", 1)
        while (started := store.add("started", 0)) < self.network.num_ranks:
            if time.monotonic() > deadline:
                rank_zero_warn(f"only {started} of {self.network.num_ranks} ranks have started; going on with those.")
                return
            time.sleep(LOOK_INTERVAL)

    def gather_logs(self, mine: Logs) -> list[Logs]:
        """What ranks have logged, on the leader; of the others as much as has arrived by now, without any waiting.

        What comes late is in the next round's. torchmetrics objects stay on their rank.
        """
        if not self.survivors.is_leader:
            plain = {name: entry.to_plain() for name, entry in mine.items() if entry.value is not None}
            self.network.note(self.survivors.leader, {"kind": "logs", "entries": plain})
            return [mine]
        with self.events.changed:
            arrived, self._logs = self._logs, []
        others = [{name: LogEntry.from_plain(plain) for name, plain in logs.items()} for logs in arrived]
        return [mine, *others]

    def stop(self) -> None:
        """Tell all ranks to end their fit with the round in which they are."""
        for rank in range(self.network.num_ranks):
            if rank != self.network.rank:
                self.network.note(rank, {"kind": "stop"})

    def _stop(self) -> None:
        self._was_stopped = True

    def close(self) -> None:
        """Deliver what can be delivered soon, and end."""
        self.survivors.finish()
        if self.events.is_alive():
            self.events.stop()
        self.network.flush(self.survivors.ping_timeout)
        self.network.close()

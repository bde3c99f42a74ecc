"""The federation's part of a checkpoint: a directory of clients beside the ordinary file.

``epoch=3.ckpt`` is an ordinary Lightning checkpoint that holds the consensus model. ``epoch=3.federation-1f0c82aa/``
beside it holds one file a rank with its clients' rows and optimizer states, and one with the algorithm's own state. The
ordinary file names its directory, and is written after it: a crash at any moment leaves a pair that belongs together.
Files are keyed by client, so a run can resume on another number of ranks.
"""

from __future__ import annotations

import uuid
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_fed.federation.layout import Layout
from lightning_fed.federation.rounds import hold_rows
from lightning_fed.federation.rows import trainable_parameters
from lightning_fed.federation.virtual_clock import VirtualClock

if TYPE_CHECKING:
    from lightning_fed.federation.strategy import FederatedStrategy

KEY = "lightning_fed"


@dataclass
class FederationCheckpoint:
    """A checkpoint that a run resumes from.

    Attributes:
        header: what the ordinary file says about the federation.
        path: of the ordinary file.
    """

    header: dict[str, Any]
    path: Path

    # ----------------------------------------------------------------------------------------------------- writing

    @staticmethod
    def write_clients(strategy: FederatedStrategy, checkpoint: dict[str, Any], path: Path) -> Path:
        """Write this rank's clients, and put the header into the ordinary checkpoint; returns the directory."""
        bank, layout = strategy.bank, strategy.layout
        directory = path.with_name(f"{path.stem}.federation-{strategy.gather_plain(uuid.uuid4().hex[:8])[0]}")
        hosts = [strategy.global_rank] if strategy.is_elastic else range(layout.num_hosts)
        blocks = [layout.clients_of(host) for host in hosts]
        checkpoint[KEY] = {
            "algorithm": type(strategy).__name__,
            "num_clients": layout.num_clients,
            "parameters": bank.rows.width,
            "settings": strategy.fixed_settings(),
            "round": strategy.round,
            "joint_index": strategy.joint_index,
            "seed": strategy.seed,
            "sent_bytes": strategy.exchange.sent_bytes.tolist(),
            "server_bytes": strategy.exchange.server_bytes,
            "clock": strategy.clock.state() if strategy.clock is not None else None,
            "directory": directory.name,
            "blocks": [(block.start, block.stop) for block in blocks],
        }
        if layout.replica_of_rank(strategy.global_rank) == 0:
            clients = strategy.exchange.clients
            content = {
                "present": list(bank.present),
                "rows": bank.rows.snapshot(),
                "buffers": bank.buffers.snapshot(),
                "counters": torch.stack([bank.counters_of(client) for client in clients]),
                "algorithm": {name: matrix.detach().clone() for name, matrix in strategy.client_matrices().items()},
                "clients": {
                    client: bank.state_of(client)
                    for client in sorted({*clients, *bank.present})
                    if bank.has_state(client)
                },
            }
            strategy.checkpoint_io.save_checkpoint(content, directory / block_name(clients.start, clients.stop))
        if strategy.is_global_zero:
            strategy.checkpoint_io.save_checkpoint(strategy.algorithm_state(), directory / "algorithm.pt")
        return directory

    @staticmethod
    def remove_directories(path: Path, keep: Path | None = None) -> None:
        """Delete the clients' directories of an ordinary file, but for one."""
        filesystem = get_filesystem(path)
        for found in filesystem.glob(f"{path.with_name(path.stem)}.federation-*"):
            if keep is None or Path(found).name != keep.name:
                filesystem.rm(found, recursive=True)

    # ----------------------------------------------------------------------------------------------------- reading

    @staticmethod
    def read(checkpoint: dict[str, Any], path: Path, required: bool) -> FederationCheckpoint | None:
        """Take the header out of an ordinary checkpoint.

        Raises:
            ValueError: if it is required (to resume a fit) and absent.
        """
        header = checkpoint.get(KEY)
        if header is not None:
            return FederationCheckpoint(header, path.resolve() if path.is_symlink() else path)
        if required:
            raise ValueError(
                f"ckpt_path={str(path)!r} was not saved by a federated strategy (or with save_weights_only=True), so "
                "there is no federation to resume: load its weights with `load_from_checkpoint` and fit without "
                "ckpt_path."
            )
        return None

    def check(self, algorithm: str, layout: Layout, module: nn.Module, settings: dict[str, Any]) -> None:
        """Refuse to resume another federation.

        Raises:
            ValueError: naming what differs.
        """
        parameters = sum(parameter.numel() for parameter in trainable_parameters(module))
        mine = {"algorithm": algorithm, "num_clients": layout.num_clients, "parameters": parameters, **settings}
        theirs = {**self.header, **self.header["settings"]}
        for name in mine:
            if theirs[name] != mine[name]:
                raise ValueError(
                    f"the checkpoint {str(self.path)!r} has {name}={theirs[name]!r}, but this run has {mine[name]!r}: "
                    "resume with the settings of the run that saved it, or load only its weights with "
                    "`load_from_checkpoint`."
                )
        directory = self.path.with_name(self.header["directory"])
        if not get_filesystem(directory).exists(str(directory)):
            raise ValueError(
                f"the clients' directory {str(directory)!r} of the checkpoint {str(self.path)!r} is missing: keep it "
                "beside the file, or load only the file's weights with `load_from_checkpoint`."
            )

    def restore(self, strategy: FederatedStrategy) -> None:
        """Rows, buffers, counters, bytes, the algorithm's state, and the position in the run."""
        bank, exchange = strategy.bank, strategy.exchange
        strategy.round, strategy.joint_index = self.header["round"], self.header["joint_index"]
        exchange.sent_bytes[:] = np.array(self.header["sent_bytes"], dtype=np.int64)
        exchange.server_bytes = self.header["server_bytes"]
        if strategy.clock is not None:
            self._restore_clock(strategy.clock)
        if not strategy.keeps_rows and strategy.joint_index:
            hold_rows(strategy, strategy.cohort)
        for client, position, content in self._clients(strategy):
            if position is not None:
                bank.set_counters(client, content["counters"][position])
            if not bank.has_row(client):
                continue
            slot, saved = bank.slot(client), self._saved_row(client, content["present"])
            for rows, name in ((bank.rows, "rows"), (bank.buffers, "buffers")):
                rows.matrix[slot] = content[name][saved].to(rows.matrix)
            for name, matrix in strategy.client_matrices().items():
                matrix[slot] = content["algorithm"][name][saved].to(matrix)
        strategy.load_algorithm_state(self._load(strategy, "algorithm.pt"))
        strategy.consensus_is_stale = True

    def _saved_row(self, client: int, present: list[int]) -> int:
        """Which row of a file is a client's.

        Raises:
            ValueError: if it has none, because the run that saved it kept no rows of idle clients.
        """
        row = bisect_left(present, client)
        if present[row : row + 1] != [client]:
            raise ValueError(
                f"the checkpoint {str(self.path)!r} has no row of client {client}, because it was saved with "
                "evaluate='consensus' and float_buffers='mix', where idle clients keep none: use the same settings, or "
                "load only its weights with `load_from_checkpoint`."
            )
        return row

    def _restore_clock(self, clock: VirtualClock) -> None:
        state = self.header.get("clock")
        if state is not None:
            clock.load_state(state)
        else:
            rank_zero_warn(f"{str(self.path)!r} was saved without a clock, so time is counted from its round on.")

    def restore_optimizers(self, strategy: FederatedStrategy) -> None:
        """The clients' optimizer and loss-scaler states, once optimizers exist."""
        for client, _, content in self._clients(strategy):
            if client in content["clients"]:
                strategy.bank.load_state_of(client, content["clients"][client])
        strategy.bank.detach_optimizers()  # from what Lightning's file has of the client that was bound

    def _clients(self, strategy: FederatedStrategy) -> Any:
        """Yields (client, its position in the file's block, the file's content) for each client of this rank.

        The position is None for clients that are not at home anywhere, of which only the present ones have a state.
        """
        mine, exchange = strategy.exchange.clients, strategy.exchange
        for start, stop in self.header["blocks"]:
            if exchange.deals_evenly:
                content = self._load(strategy, block_name(start, stop))
                for client in set(content["present"]) & set(exchange.present.tolist()):
                    yield client, None, content
            elif overlap := range(max(start, mine.start), min(stop, mine.stop)):
                content = self._load(strategy, block_name(start, stop))
                for client in overlap:
                    yield client, client - start, content

    def _load(self, strategy: FederatedStrategy, name: str) -> dict[str, Any]:
        return strategy.checkpoint_io.load_checkpoint(
            self.path.with_name(self.header["directory"]) / name, map_location=torch.device("cpu"), weights_only=True
        )


def block_name(start: int, stop: int) -> str:
    """The file of a rank's clients ``start .. stop - 1``."""
    return f"clients-{start:05d}-{stop - 1:05d}.pt"

"""The federation's part of a checkpoint: a directory of clients beside the ordinary file.

``epoch=3.ckpt`` is an ordinary Lightning checkpoint that holds the consensus model. ``epoch=3.federation-kqzmbtra/``
beside it holds one file a rank with its clients' rows and optimizer states, one with the algorithm's own state, and a
manifest. The ordinary file names its directory, and appears after it: a crash at any moment leaves a pair that belongs
together. Files are keyed by client, so a run can resume on another number of ranks.
"""

from __future__ import annotations

import uuid
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_fed.federation.durable_files import Digest, DurableCheckpointIO, stage
from lightning_fed.federation.layout import Layout
from lightning_fed.federation.manifest import DIRECTORY, Manifest, damage, directories_of, newest_complete_checkpoint
from lightning_fed.federation.rounds import hold_rows, remembers_buffers
from lightning_fed.federation.rows import trainable_parameters
from lightning_fed.federation.running_values import saved_values
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
    def write(strategy: FederatedStrategy, checkpoint: dict[str, Any], path: Path) -> None:
        """Write the clients of all ranks, the algorithm's state, a manifest and the ordinary file; a collective call.

        A ``checkpoint_io`` that the user has given to the Trainer writes its own way, without a manifest.

        Raises:
            OSError: on all ranks, if one of them cannot write. The checkpoint that was there before is unchanged.
        """
        directory = path.with_name(f"{path.stem}{DIRECTORY}{strategy.gather_plain(random_word())[0]}")
        checkpoint[KEY] = header_of(strategy, directory.name)
        digests: dict[str, Digest] = {}
        with failing_together(strategy, path, directory):
            for name, content in contents_of(strategy).items():
                if isinstance(strategy.checkpoint_io, DurableCheckpointIO):
                    file = stage(content, directory / name)
                    file.commit()
                    digests[name] = file.digest
                else:
                    strategy.checkpoint_io.save_checkpoint(content, directory / name)
        files = {name: digest for of_rank in strategy.gather_plain(digests) for name, digest in of_rank.items()}
        with failing_together(strategy, path, directory):
            if strategy.is_global_zero and files:
                file = stage(checkpoint, path)
                try:
                    Manifest(file.digest, files).write(directory)
                    file.commit()
                except OSError:
                    file.discard()
                    raise
            elif strategy.is_global_zero:
                strategy.checkpoint_io.save_checkpoint(checkpoint, path)
        if strategy.is_global_zero:
            FederationCheckpoint.remove_directories(path, keep=directory)

    @staticmethod
    def remove_directories(path: Path, keep: Path | None = None) -> None:
        """Delete the clients' directories of an ordinary file, but for one."""
        for directory in directories_of(path):
            if keep is None or directory.name != keep.name:
                get_filesystem(path).rm(str(directory), recursive=True)

    # ----------------------------------------------------------------------------------------------------- reading

    @staticmethod
    def choose(strategy: FederatedStrategy, path: Path) -> Path:
        """The checkpoint to load: the wanted one, or instead of a damaged ``last.ckpt`` the newest complete one.

        One rank looks at all files, and the others hear of it; a collective call.

        Raises:
            ValueError: if the checkpoint is damaged, naming its damaged files and the newest complete one beside it.
        """
        path = path.resolve() if path.is_symlink() else path
        wrong: list[str] = []
        complete: Path | None = None
        if (strategy.global_rank == 0 or strategy.is_elastic) and isinstance(
            strategy.checkpoint_io, DurableCheckpointIO
        ):
            wrong = damage(path)
            complete = newest_complete_checkpoint(path.parent) if wrong else None
        wrong, instead = strategy.gather_plain((wrong, str(complete or "")))[0]
        if not wrong:
            return path
        what = f"the checkpoint {str(path)!r} is damaged ({'; '.join(wrong)})"
        if instead and path.stem.startswith(ModelCheckpoint.CHECKPOINT_NAME_LAST):
            rank_zero_warn(f"{what}: the run goes on from {instead!r}, the newest complete one beside it.")
            return Path(instead)
        way_out = (
            f"resume from the newest complete one beside it, ckpt_path={instead!r}"
            if instead
            else ("there is no complete one beside it, so restore it from a copy, or fit without ckpt_path")
        )
        raise ValueError(f"{what}: {way_out}.")

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
        strategy.load_algorithm_state(self._load(strategy, "algorithm.pt"))  # first: a secret names the cohort
        if not strategy.keeps_rows and strategy.joint_index:
            hold_rows(strategy, strategy.cohort)
        matrices = [(bank.rows.matrix, "rows"), (bank.buffers.matrix, "buffers")]
        if remembers_buffers(strategy) and strategy.joint_index:
            strategy.buffers_before = torch.empty_like(bank.buffers.matrix)
            matrices.append((strategy.buffers_before, "buffers_before"))
        for start, stop, content in self._blocks(strategy):
            for client, position in clients_of_block(strategy, start, stop, content):
                if position is not None:
                    bank.set_counters(client, content["counters"][position])
                if not bank.has_row(client):
                    continue
                slot, saved = bank.slot(client), self._saved_row(client, content["present"])
                for matrix, name in matrices:
                    matrix[slot] = content[name][saved].to(matrix)
                for name, matrix in strategy.client_matrices().items():
                    matrix[slot] = content["algorithm"][name][saved].to(matrix)
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

    def restore_training(self, strategy: FederatedStrategy) -> None:
        """What exists in a fit only: the clients' optimizers, loss scalers and gradients, and what was logged."""
        for start, stop, content in self._blocks(strategy):
            for client, _ in clients_of_block(strategy, start, stop, content):
                if client in content["clients"]:
                    strategy.bank.load_state_of(client, content["clients"][client])
            if start in strategy.exchange.clients and content["running"] is not None:
                strategy.local_step.running_values.append(content["running"])
        strategy.bank.detach_optimizers()  # from what Lightning's file has of the client that was bound

    def _blocks(self, strategy: FederatedStrategy) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yields (start, stop, content) for each file that may tell of this rank's clients, read once."""
        mine, exchange = strategy.exchange.clients, strategy.exchange
        for start, stop in self.header["blocks"]:
            if exchange.deals_evenly or range(max(start, mine.start), min(stop, mine.stop)):
                yield start, stop, self._load(strategy, block_name(start, stop))

    def _load(self, strategy: FederatedStrategy, name: str) -> dict[str, Any]:
        return strategy.checkpoint_io.load_checkpoint(
            self.path.with_name(self.header["directory"]) / name, map_location=torch.device("cpu"), weights_only=True
        )


def random_word() -> str:
    """Tells directories apart. Of letters alone: Lightning takes digits behind ``hpc_ckpt_`` for a version."""
    return "".join(chr(ord("a") + byte % 26) for byte in uuid.uuid4().bytes[:8])


def clients_of_block(
    strategy: FederatedStrategy, start: int, stop: int, content: dict[str, Any]
) -> Iterator[tuple[int, int | None]]:
    """Yields (client, its position in the file's block) for each client of this rank that a file tells of.

    The position is None for clients that are not at home anywhere, of which only the present ones have a state.
    """
    mine, exchange = strategy.exchange.clients, strategy.exchange
    if exchange.deals_evenly:
        for client in set(content["present"]) & set(exchange.present.tolist()):
            yield client, None
        return
    for client in range(max(start, mine.start), min(stop, mine.stop)):
        yield client, client - start


def header_of(strategy: FederatedStrategy, directory: str) -> dict[str, Any]:
    """What the ordinary file says about the federation."""
    layout = strategy.layout
    hosts = [strategy.global_rank] if strategy.is_elastic else range(layout.num_hosts)
    blocks = [layout.clients_of(host) for host in hosts]
    return {
        "algorithm": type(strategy).__name__,
        "num_clients": layout.num_clients,
        "parameters": strategy.bank.rows.width,
        "settings": strategy.fixed_settings(),
        "round": strategy.round,
        "joint_index": strategy.joint_index,
        "seed": strategy.seed,
        "sent_bytes": strategy.exchange.sent_bytes.tolist(),
        "server_bytes": strategy.exchange.server_bytes,
        "clock": strategy.clock.state() if strategy.clock is not None else None,
        "directory": directory,
        "blocks": [(block.start, block.stop) for block in blocks],
    }


def contents_of(strategy: FederatedStrategy) -> dict[str, dict[str, Any]]:
    """What this rank writes, by the names of the files."""
    bank, contents = strategy.bank, {}
    if strategy.layout.replica_of_rank(strategy.global_rank) == 0:
        clients = strategy.exchange.clients
        contents[block_name(clients.start, clients.stop)] = {
            "present": list(bank.present),
            "rows": bank.rows.snapshot(),
            "buffers": bank.buffers.snapshot(),
            "buffers_before": strategy.buffers_before.clone() if remembers_buffers(strategy) else None,
            "counters": torch.stack([bank.counters_of(client) for client in clients]),
            "algorithm": {name: matrix.detach().clone() for name, matrix in strategy.client_matrices().items()},
            "clients": {
                client: bank.state_of(client) for client in sorted({*clients, *bank.present}) if bank.has_state(client)
            },
            "running": saved_values(strategy.local_step),
        }
    if strategy.is_global_zero:
        contents["algorithm.pt"] = strategy.algorithm_state()
    return contents


@contextmanager
def failing_together(strategy: FederatedStrategy, path: Path, directory: Path) -> Iterator[None]:
    """If a rank cannot write what it writes inside, all ranks give up the checkpoint, and raise."""
    failure = ""
    try:
        yield
    except OSError as error:
        failure = f"{type(error).__name__}: {error}"
    failures = {rank: words for rank, words in enumerate(strategy.gather_plain(failure)) if words}
    if failures:
        filesystem = get_filesystem(directory)
        if strategy.is_global_zero and filesystem.exists(str(directory)):
            filesystem.rm(str(directory), recursive=True)
        raise OSError(
            f"the checkpoint {str(path)!r} could not be written ({failures}, by rank): make room, or save elsewhere "
            "(the `dirpath` of ModelCheckpoint). The checkpoints that were there before are unchanged."
        )


def block_name(start: int, stop: int) -> str:
    """The file of a rank's clients ``start .. stop - 1``."""
    return f"clients-{start:05d}-{stop - 1:05d}.pt"

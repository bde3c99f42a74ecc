"""Files that are whole or absent, whatever moment a crash chooses, and that show it if they were changed later."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_fed.federation.plain_values import plain_values

CHUNK_BYTES = 2**24
TEMPORARY = ".writing"


class Digest(NamedTuple):
    """What tells a file's content from any other."""

    size: int
    sha256: str


class DurableCheckpointIO(TorchCheckpointIO):
    """``torch.save`` under a temporary name, ``fsync``, then a rename: a crash leaves the old file or the new one.

    Files elsewhere than on a local disk appear when their upload is complete, as the services promise.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file.

        Raises:
            OSError: if it cannot be written. What was there before is unchanged.
        """
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r} mean nothing to {type(self).__name__}: leave them out."
            )
        stage(checkpoint, path).commit()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Read a file of plain values, whatever is asked for: nothing in it runs.

        Raises:
            ValueError: if it holds other objects, naming one, and the way out.
        """
        with plain_values(path):
            return super().load_checkpoint(path, map_location, weights_only=True)


class StagedFile(ABC):
    """A file that is written, and does not appear yet.

    Attributes:
        digest: of its bytes.
    """

    digest: Digest

    @abstractmethod
    def commit(self) -> None:
        """Let it appear, instead of what was there."""

    @abstractmethod
    def discard(self) -> None:
        """Drop it."""


def stage(content: Any, path: str | Path) -> StagedFile:
    """Write a file that appears when it is committed.

    Args:
        content: for ``torch.save``, or bytes that are taken as they are.
        path: where it is going to appear.

    Raises:
        OSError: if it cannot be written; nothing is left of it.
    """
    filesystem = get_filesystem(path)
    filesystem.makedirs(os.path.dirname(path), exist_ok=True)
    return LocalFile(content, Path(path)) if isinstance(filesystem, LocalFileSystem) else RemoteFile(content, path)


class LocalFile(StagedFile):
    """On a local disk: under a temporary name beside its own."""

    def __init__(self, content: Any, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + TEMPORARY)
        try:
            with open(self.temporary, "wb") as file:
                self.digest = write(content, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self.discard()
            raise

    def commit(self) -> None:
        os.replace(self.temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def discard(self) -> None:
        self.temporary.unlink(missing_ok=True)


class RemoteFile(StagedFile):
    """Elsewhere: in memory, until it is uploaded."""

    def __init__(self, content: Any, path: str | Path) -> None:
        self.path = path
        self.buffer = io.BytesIO()
        self.digest = write(content, self.buffer)

    def commit(self) -> None:
        get_filesystem(self.path).pipe_file(str(self.path), self.buffer.getvalue())

    def discard(self) -> None:
        self.buffer.close()


class HashingWriter:
    """Counts and hashes what goes through to a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.hash = file, 0, hashlib.sha256()

    def write(self, part: Any) -> int:
        written = memoryview(part).nbytes
        self.hash.update(part)
        self.size += written
        self.file.write(part)
        return written

    def flush(self) -> None:
        self.file.flush()


def write(content: Any, file: IO[bytes]) -> Digest:
    """Write bytes, or anything else as ``torch.save`` does."""
    writer = HashingWriter(file)
    if isinstance(content, bytes):
        writer.write(content)
    else:
        try:
            torch.save(content, writer)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch ends its archive also after a write that has failed, and what it then says hides why.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    return Digest(writer.size, writer.hash.hexdigest())


def digest_of(path: str | Path) -> Digest | None:
    """What a file holds now; None if it is absent.

    Raises:
        OSError: if the disk does not give it.
    """
    filesystem, size, hash = get_filesystem(path), 0, hashlib.sha256()
    if not filesystem.isfile(str(path)):
        return None
    with filesystem.open(str(path), "rb") as file:
        while part := file.read(CHUNK_BYTES):
            hash.update(part)
            size += len(part)
    return Digest(size, hash.hexdigest())

"""Which files make up a checkpoint, and whether they are still what was written.

Beside ``last.ckpt`` there is ``last.federation-kqzmbtra/`` with the clients' files and ``manifest.json``, which has the
size and the SHA-256 of each of them and of ``last.ckpt`` itself. The manifest is written before ``last.ckpt`` appears.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_fed.federation.durable_files import Digest, digest_of, stage

MANIFEST = "manifest.json"
DIRECTORY = ".federation-"


@dataclass
class Manifest:
    """What a checkpoint was when it was written.

    Attributes:
        ordinary: digest of the ordinary file.
        files: those of the files in the directory, by name.
    """

    ordinary: Digest
    files: dict[str, Digest]

    def write(self, directory: Path) -> None:
        """Write it beside the files that it tells of, and its own hash behind it."""
        content = json.dumps({"ordinary": self.ordinary, "files": self.files}).encode()
        stage(content + b"\n" + hash_of(content) + b"\n", directory / MANIFEST).commit()

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest of a directory; None if there is none that can be read."""
        path = str(directory / MANIFEST)
        filesystem = get_filesystem(path)
        try:
            written, hash, _ = filesystem.cat_file(path).split(b"\n")
            if hash != hash_of(written):
                return None
            content: dict[str, Any] = json.loads(written)
            files = {name: Digest(*digest) for name, digest in content["files"].items()}
            return cls(Digest(*content["ordinary"]), files)
        except (OSError, ValueError):
            return None

    def damage(self, directory: Path) -> list[str]:
        """What is wrong with the directory's files, a few words each."""
        found = {Path(entry).name for entry in get_filesystem(directory).ls(str(directory), detail=False)} - {MANIFEST}
        wrong = [f"{directory.name}/{name} is not in its manifest" for name in sorted(found - self.files.keys())]
        for name, digest in self.files.items():
            wrong += [f"{directory.name}/{name} {words}" for words in difference(directory / name, digest)]
        return wrong


def hash_of(content: bytes) -> bytes:
    """As a manifest ends with it."""
    return hashlib.sha256(content).hexdigest().encode()


def difference(path: Path, digest: Digest) -> list[str]:
    """In which way a file is not what it was, if it is not."""
    try:
        now = digest_of(path)
    except OSError as error:
        return [f"cannot be read ({error})"]
    if now is None:
        return ["is missing"]
    if now.size != digest.size:
        return [f"has {now.size:,} bytes instead of {digest.size:,}"]
    return [] if now == digest else ["has other bytes than were written"]


def directories_of(path: Path) -> list[Path]:
    """The clients' directories of an ordinary file: one, but for moments in which it is replaced."""
    found = get_filesystem(path).glob(f"{path.with_name(path.stem)}{DIRECTORY}*")
    return [path.with_name(Path(entry).name) for entry in found]


def damage(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a few words for each file; nothing, if it has no clients' directory.

    Args:
        path: of the ordinary file.
    """
    directories = directories_of(path)
    manifests = [(directory, manifest) for directory in directories if (manifest := Manifest.read(directory))]
    if directories and not manifests:
        return [f"{directories[0].name}/{MANIFEST} is missing or damaged"]
    wrong: list[str] = []
    for directory, manifest in manifests:
        ordinary = difference(path, manifest.ordinary)
        if not ordinary:
            return manifest.damage(directory)
        wrong = [f"{path.name} {words}" for words in ordinary]
    return wrong


def newest_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder that has all its files, as they were written.

    Args:
        folder: where a ModelCheckpoint has saved.

    Returns:
        what to pass as ``ckpt_path``; None if no federation's checkpoint in the folder is complete.
    """
    filesystem = get_filesystem(folder)
    found = [Path(entry) for entry in filesystem.glob(f"{folder}/*.ckpt")]
    for path in sorted(found, key=lambda path: filesystem.modified(str(path)), reverse=True):
        if directories_of(path.resolve()) and not damage(path.resolve()):
            return path
    return None

"""Links between two ranks that may die: a gloo group of two for each direction.

A timeout or a death breaks every connection of a gloo group, so no two links share one. What travels is JSON and
tensors; nothing that comes from another rank is ever unpickled.
"""

from __future__ import annotations

import json
import os
import queue
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SENDER, RECEIVER = 0, 1  # the ranks within a link's group
DATA, ACKNOWLEDGEMENT, CLOSING = 0, 1, 2  # the tags of what a link carries
FOREVER = timedelta(days=3650)
SHORTEST = 0.001  # seconds; gloo takes zero for "no timeout"
LONGEST_HEADER = 64 * 2**20  # bytes
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
}


@dataclass
class Received:
    """A message from another rank.

    Attributes:
        sender: the rank that sent it.
        header: what it says, as JSON can.
        tensors: on the CPU; none with a note.
    """

    sender: int
    header: dict[str, Any]
    tensors: list[Tensor]


@dataclass
class PeerLost:
    """A link to or from a rank broke: it died, or did not take a message in time. It may come back.

    Attributes:
        rank: the peer; the own rank if the store is gone, after which no note can arrive and no link be made.
    """

    rank: int


Inbox = queue.SimpleQueue[Received | PeerLost]


@dataclass
class Parcel:
    """A message ready for a link.

    Attributes:
        text: header and kinds of tensors in JSON, uint8.
        tensors: contiguous copies on the CPU.
    """

    text: Tensor
    tensors: list[Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def pack(header: dict[str, Any], tensors: Sequence[Tensor]) -> Parcel:
    """Copy a message, so that the caller may change its tensors afterwards.

    Raises:
        TypeError: if the header is not a JSON object, or a tensor is of a kind that links do not carry.
    """
    kinds = []
    for tensor in tensors:
        if (name := str(tensor.dtype).removeprefix("torch.")) not in DTYPES:
            raise TypeError(f"a tensor of {tensor.dtype} cannot be sent; can be: {', '.join(DTYPES)}.")
        kinds.append([name, list(tensor.shape)])
    if not isinstance(header, dict):
        raise TypeError(f"a header must be a dict that JSON can hold, not {type(header).__name__}.")
    text = bytearray(json.dumps({"header": header, "tensors": kinds}).encode())
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for tensor in tensors]
    return Parcel(torch.frombuffer(text, dtype=torch.uint8), copies)


def unpack(text: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
    """The header and the still empty tensors that a parcel's text announces.

    Raises:
        ValueError: if the text is anything else.
    """
    try:
        message = json.loads(text.numpy().tobytes())
        header, kinds = message["header"], message["tensors"]
        if not isinstance(header, dict):
            raise TypeError(f"a header of type {type(header).__name__}")
        return header, [torch.empty(shape, dtype=DTYPES[name]) for name, shape in kinds]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"refused a message that is not what links carry: {error}") from error


class Link:
    """One direction between two ranks. Both construct it at the same time.

    Args:
        store: a store of this link alone, on a connection of its own.
        side: ``SENDER`` or ``RECEIVER``.
        timeout: seconds to wait for the other side.

    Raises:
        RuntimeError: if the other side did not come in time.
    """

    def __init__(self, store: dist.Store, side: int, timeout: float) -> None:
        gloo: Any = dist.ProcessGroupGloo  # whose stub lacks most of it
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout)
        options._devices = [_device()]
        options._threads = 1  # they run collectives, of which there are none
        self._group = gloo(store, side, 2, options)
        self._other = 1 - side

    def send(self, parcel: Parcel, timeout: float) -> None:
        """Send a message and wait until the other side has all of it.

        Args:
            parcel: the message.
            timeout: seconds.

        Raises:
            RuntimeError: if the other side is dead or too slow; the link is then broken.
        """
        deadline = time.monotonic() + timeout
        # Of an answer to each message, because a send succeeds as soon as its bytes lie in this machine's buffers.
        answer = self._group.recv([torch.empty(1, dtype=torch.uint8)], self._other, ACKNOWLEDGEMENT)
        length = torch.tensor([len(parcel.text)])
        parts = [length, parcel.text, *map(_bytes_of, parcel.tensors)]
        works = [self._group.send([part], self._other, DATA) for part in parts if part.numel()]
        _wait([*works, answer], deadline)

    def receive(self, timeout: float) -> tuple[dict[str, Any], list[Tensor]]:
        """Wait, for ever if need be, for a message to begin; returns its header and tensors.

        Args:
            timeout: seconds from the beginning of the message to its end.

        Raises:
            RuntimeError: if the link broke.
            ValueError: if what came is not a message.
        """
        length = torch.empty(1, dtype=torch.int64)
        self._group.recv([length], self._other, DATA).wait(FOREVER)
        deadline = time.monotonic() + timeout
        if not 0 < length.item() <= LONGEST_HEADER:
            raise ValueError(f"refused a message with a header of {length.item()} bytes.")
        text = torch.empty(int(length.item()), dtype=torch.uint8)
        _wait([self._group.recv([text], self._other, DATA)], deadline)
        header, tensors = unpack(text)
        parts = [_bytes_of(tensor) for tensor in tensors if tensor.numel()]
        _wait([self._group.recv([part], self._other, DATA) for part in parts], deadline)
        _wait([self._group.send([torch.ones(1, dtype=torch.uint8)], self._other, ACKNOWLEDGEMENT)], deadline)
        return header, tensors

    def close(self) -> None:
        """Break the link, also under a thread of this rank that waits in it. May be called again."""
        # Gloo cannot abort a wait, but a timeout closes all connections of its group, here and on the other side.
        with suppress(RuntimeError):
            _wait([self._group.recv([torch.empty(1, dtype=torch.uint8)], self._other, CLOSING)], time.monotonic())


@cache
def _device() -> Any:
    """What all links of this process share: a network interface and the thread that serves it."""
    gloo: Any = dist.ProcessGroupGloo
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]  # as in an ordinary process group
    return gloo.create_device(interface=interface) if interface else gloo.create_default_device()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _wait(works: Sequence[dist.Work], deadline: float) -> None:
    for work in works:
        work.wait(timedelta(seconds=max(deadline - time.monotonic(), SHORTEST)))

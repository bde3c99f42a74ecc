"""What a compressor is: it packs rows into bytes that travel, and unpacks them into what the receiver adds up.

Shapes: C = rows (clients of this rank), P = numbers in a row, B = bytes of one message.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_fed.checks import check_choice, check_numbers

Scope = Literal["model", "layer"]


@dataclass(frozen=True)
class Layer:
    """One tensor of the model, as a stretch of a row.

    Attributes:
        name: for messages to the user.
        shape: of the tensor.
    """

    name: str
    shape: torch.Size

    @property
    def size(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class SparseVector:
    """An unpacked message of few entries.

    Attributes:
        indices: places in the row, distinct, int64 ``[K]``.
        values: ``[K]``.
    """

    indices: Tensor
    values: Tensor

    def add_to_(self, row_P: Tensor, weight: float = 1.0) -> None:
        """``row += weight * C(v)``, in place."""
        row_P.index_add_(0, self.indices, self.values.to(row_P.dtype), alpha=weight)


@dataclass(frozen=True)
class DenseVector:
    """An unpacked message in which every entry may be non-zero: ``values`` is ``[P]``."""

    values: Tensor

    def add_to_(self, row_P: Tensor, weight: float = 1.0) -> None:
        """``row += weight * C(v)``, in place."""
        row_P.add_(self.values, alpha=weight)


class Compressor(ABC):
    """``v -> C(v)`` with a wire format: what :meth:`unpack` returns is what the sender takes for sent, to the bit.

    The constructor takes plain settings; :meth:`bind` makes a copy that knows the rows. All messages of a bound
    compressor have the same number of bytes.

    Args:
        scope: compress the whole ``"model"`` as one vector, or every ``"layer"`` (parameter tensor) by itself.

    Attributes:
        layers: of the rows, once bound.
        width: P, once bound.
        dtype: of the numbers on the wire, once bound.
        device: of the rows, once bound.
        state: what each client keeps from message to message ``[C, ...]`` (a warm start); saved in checkpoints.
    """

    def __init__(self, scope: Scope = "model") -> None:
        check_choice("scope", scope, "model", "layer")
        self.scope = scope
        self.layers: Sequence[Layer] = ()
        self.width = 0
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.state: Tensor | None = None

    def bind(self, layers: Sequence[Layer], rows_CP: Tensor) -> Self:
        """A copy for rows of these layers; ``rows`` tells C, dtype and device.

        Raises:
            ValueError: if a setting does not suit the layers.
        """
        bound = copy.copy(self)
        bound.layers = tuple(layers)
        bound.width = sum(layer.size for layer in layers)
        bound.dtype, bound.device = rows_CP.dtype, rows_CP.device
        bound.prepare(len(rows_CP))
        return bound

    def prepare(self, num_rows: int) -> None:
        """Compute what depends on the layers, when bound; called once."""

    def of_rows(self, rows: slice) -> Self:
        """The same for some of the rows alone; what it keeps of them is the same memory."""
        if self.state is None:
            return self
        part = copy.copy(self)
        part.state = self.state[rows]
        return part

    @property
    def blocks(self) -> list[int]:
        """Lengths of the stretches of a row that are compressed by themselves."""
        return [self.width] if self.scope == "model" else [layer.size for layer in self.layers]

    @property
    def is_contractive(self) -> bool:
        """Whether ``E||C(v) - v||^2 <= (1 - delta) ||v||^2`` for a delta > 0, as error feedback needs it."""
        return True

    @property
    def delta_is_typical(self) -> bool:
        """Whether vectors as they occur come near delta; not if it is a worst case that says little about them."""
        return True

    @property
    @abstractmethod
    def delta(self) -> float:
        """The largest such delta that holds for all ``v``; of a compressor by layers the smallest over the layers."""

    @property
    @abstractmethod
    def message_bytes(self) -> int:
        """B, bytes of one message."""

    @abstractmethod
    def pack(self, rows_CP: Tensor, seeds: Sequence[int]) -> Tensor:
        """Compress each row into a message, uint8 ``[C, B]``.

        Args:
            rows_CP: finite numbers; left as they are.
            seeds: one a row, known to sender and receiver.
        """

    @abstractmethod
    def unpack(self, message_B: Tensor, seed: int) -> SparseVector | DenseVector:
        """C(v) from one message, uint8 ``[B]``, and the seed with which it was packed."""

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class Identity(Compressor):
    """``C(v) = v``, to compare with: 4 bytes a number in float32."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def delta(self) -> float:
        return 1.0

    @property
    def message_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def pack(self, rows_CP: Tensor, seeds: Sequence[int]) -> Tensor:
        return join(rows_CP)

    def unpack(self, message_B: Tensor, seed: int) -> DenseVector:
        return DenseVector(split(message_B, (self.dtype, self.width))[0])


class Sparsifier(Compressor):
    """A compressor that keeps K = max(1, round(ratio d)) entries of each block of d.

    Args:
        ratio: K/d, in (0, 1].
        scope: see :class:`Compressor`.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(self, ratio: float, scope: Scope = "model") -> None:
        super().__init__(scope)
        check_numbers(ratio=ratio)
        if not 0 < ratio <= 1:
            raise ValueError(
                f"ratio={ratio} of {type(self).__name__} must be in (0, 1]: it is the share of the entries that travel."
            )
        self.ratio = ratio

    @property
    def kept(self) -> list[int]:
        """K of each block."""
        return [min(size, max(1, round(self.ratio * size))) for size in self.blocks]

    @property
    def num_kept(self) -> int:
        """Entries in a message."""
        return sum(self.kept)

    @property
    def delta(self) -> float:
        return min(kept / size for kept, size in zip(self.kept, self.blocks) if size)


def join(*parts: Tensor) -> Tensor:
    """Tensors of any dtypes ``[C, ...]`` as the bytes of C messages, uint8 ``[C, B]``."""
    as_bytes = [part.reshape(len(part), -1).contiguous().view(torch.uint8) for part in parts]
    return torch.cat(as_bytes, dim=1)  # a copy, also of one part: the row may change while its message travels


def split(message_B: Tensor, *fields: tuple[torch.dtype, int]) -> list[Tensor]:
    """Inverse of :func:`join` for one message; each field is its dtype and how many numbers it has."""
    sizes = [dtype.itemsize * count for dtype, count in fields]
    # A copy starts at an aligned address, which a stretch of bytes may not.
    return [part.clone().view(dtype) for part, (dtype, _) in zip(message_B.split(sizes), fields)]

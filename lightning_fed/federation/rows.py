"""The state of many clients as rows of one matrix, of which a module's tensors are views.

Shapes: C = clients on this rank, P = numbers in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from lightning_fed.federation.host_memory import host_memory

# Rows start on 64-byte boundaries, so that a kernel sees the alignment that it would see for separate tensors.
ALIGNMENT_BYTES = 64


class Rows:
    """A matrix ``[C, P]`` whose row *c* holds what ``tensors`` hold for client *c*.

    Binding a row makes the tensors views into it; nothing is copied, so whatever trains the tensors trains the row.
    Only rows in host memory are copied: the tensors are then views of a *working row* on their own device, which is
    written back when the row is given back, or when somebody asks for :attr:`matrix`.

    Args:
        tensors: the tensors of the module, all of one dtype and device (parameters, or float buffers). Their present
            values become every client's initial values.
        num_rows: C.
        one_for_all: all rows are the same memory: the clients are replicas of one model.
        in_host_memory: keep the matrix there, wherever the tensors are; not with ``one_for_all``, whose one row trains.

    Attributes:
        bound: the vector ``[P]`` that the tensors are views of, or were made from; ``[M, P]`` of a wave.
    """

    def __init__(
        self, tensors: Sequence[Tensor], num_rows: int, one_for_all: bool = False, in_host_memory: bool = False
    ) -> None:
        self.tensors = list(tensors)
        # With the shapes of one client, which the tensors have not while they are those of a wave.
        self.templates = [torch.empty(tensor.shape, device="meta") for tensor in self.tensors]
        self.width = sum(tensor.numel() for tensor in self.tensors)
        self.one_for_all = one_for_all
        self.in_host_memory = in_host_memory and not one_for_all
        self.bound = self.gather()
        self._views: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}
        self._stacks: dict[tuple[int, int], Sequence[Tensor]] = {}
        self._working = self._none_yet()
        self._taken: list[int] = []
        self._is_copying = False
        if one_for_all:
            self._matrix = self.bound.expand(num_rows, -1)
            return
        self._storage = self._matrix = self._none_yet()
        self.resize(num_rows)
        self._matrix.copy_(self.bound)

    @property
    def matrix(self) -> Tensor:
        """All rows ``[C, P]``, up to date. Change them only while none is bound or taken."""
        self._store()
        if self._is_copying:
            torch.cuda.current_stream(self._working.device).synchronize()
            self._is_copying = False
        return self._matrix

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: what one transfer of one client's state costs."""
        return self.width * self._matrix.element_size()

    def resize(self, num_rows: int) -> None:
        """Have so many rows from now on, with undefined numbers. Memory grows with the need, and does not shrink."""
        self.give_back()
        self.forget_views()
        if num_rows > len(self._storage):
            self._storage = self._matrix = self._none_yet()  # before there is a larger one
            shape = self._padded(num_rows)
            self._storage = (
                host_memory(shape, self.bound.dtype, page_locked=self.bound.is_cuda)
                if self.in_host_memory
                else self.bound.new_zeros(shape)
            )
        self._matrix = self._storage[:num_rows, : self.width]

    def _none_yet(self) -> Tensor:
        return self.bound.new_empty((0, self.width))

    def _padded(self, num_rows: int) -> tuple[int, int]:
        """The shape of a matrix whose rows all begin on a boundary."""
        lane = ALIGNMENT_BYTES // self.bound.element_size()
        return num_rows, self.width if num_rows == 1 else -(-self.width // lane) * lane

    def gather(self) -> Tensor:
        """A new vector ``[P]`` with the tensors' present values."""
        if not self.tensors:
            return torch.zeros(0)
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def bind(self, vector: Tensor) -> None:
        """Make the tensors views into ``vector`` ``[P]`` (a row, or the consensus model)."""
        self._show(vector, _unflatten_dense_tensors(vector, self.templates))

    def bind_row(self, slot: int) -> None:
        """Make the tensors views into a row of the matrix, or into the working row that holds it meanwhile."""
        matrix = self._matrix
        if self.in_host_memory:
            matrix, slot = self.take([slot]), 0
        else:
            self.give_back()  # else a copy of this row, taken before, would be written over it later
        if slot not in self._views:
            row = matrix[slot]
            self._views[slot] = row, _unflatten_dense_tensors(row, self.templates)
        self._show(*self._views[slot])

    def bind_stack(self, matrix: Tensor) -> None:
        """Make the tensors views ``[M, *shape]`` of rows that were taken ``[M, P]``."""
        key = matrix.data_ptr(), len(matrix)
        if key not in self._stacks:
            ends = accumulate(like.numel() for like in self.templates)
            self._stacks[key] = [
                matrix[:, end - like.numel() : end].view(len(matrix), *like.shape)
                for end, like in zip(ends, self.templates)
            ]
        self._show(matrix, self._stacks[key])

    def _show(self, numbers: Tensor, views: Sequence[Tensor]) -> None:
        self.bound = numbers
        for tensor, view in zip(self.tensors, views):
            tensor.data = view

    def forget_views(self) -> None:
        """Drop the views, whose Python objects a federation of many clients should not hold from round to round."""
        self._views.clear()
        self._stacks.clear()

    def take(self, slots: Sequence[int]) -> Tensor:
        """Rows to train on ``[M, P]``, on the tensors' device. Those that were taken before are given back.

        A view of the matrix if the rows are neighbours there, in this order; else copies in working rows, as of the one
        row that several clients share, which are not written back then.
        """
        self.give_back()
        first, stop = slots[0], slots[0] + len(slots)
        is_view = not self.in_host_memory and not (self.one_for_all and len(slots) > 1)
        if is_view and list(slots) == list(range(first, stop)):
            return self._matrix[first:stop]
        if len(slots) > len(self._working):
            self.forget_views()
            self._working = self.bound.new_empty(self._padded(len(slots)))[:, : self.width]
        if self.one_for_all:  # a local rule may move the clients of a wave apart
            return self._working[: len(slots)].copy_(self._matrix[: len(slots)])
        self._taken = list(slots)
        for row, slot in zip(self._working, slots):
            row.copy_(self._matrix[slot], non_blocking=True)
        return self._working[: len(slots)]

    def give_back(self) -> None:
        """Write back the rows that were taken, if they were copied; from now on they may be changed by others."""
        if self._taken:
            self._store()
            self._taken = []

    def _store(self) -> None:
        for row, slot in zip(self._working, self._taken):
            self._matrix[slot].copy_(row, non_blocking=True)
            self._is_copying = self.in_host_memory and row.is_cuda

    def to(self, device: torch.device) -> None:
        """Move what the tensors are trained in: the matrix, or the working rows of one in host memory."""
        self.give_back()
        self.forget_views()
        if self.one_for_all:
            self._matrix = self._matrix[0].to(device).expand(len(self._matrix), -1)
        elif not self.in_host_memory:
            self._storage = self._storage.to(device)
            self._matrix = self._storage[: len(self._matrix), : self.width]
        self.bound = self.bound.to(device)
        self._working = self._none_yet()

    def snapshot(self) -> Tensor:
        """A copy of the matrix; in memory and in a file as small as the matrix itself."""
        if self.one_for_all:
            return self.matrix[0].detach().clone().expand(len(self.matrix), -1)
        return self.matrix.detach().clone()

    def release(self) -> None:
        """Give every tensor its own storage again, with its present value."""
        for tensor in self.tensors:
            tensor.data = tensor.data.clone()


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that form a row, in ``module.parameters()`` order.

    Raises:
        ValueError: if there is none, or if they do not share one dtype.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(module).__name__} has no parameter with requires_grad=True, so there is nothing to federate: "
            "unfreeze the parts that clients should train."
        )
    dtypes = {parameter.dtype for parameter in parameters}
    if len(dtypes) > 1:
        raise ValueError(
            f"the trainable parameters of {type(module).__name__} have several dtypes ({sorted(map(str, dtypes))}), "
            "but a client's row is one vector: convert the module to one dtype (for example `module.float()`) and use "
            "the Trainer's `precision` for mixed precision."
        )
    return parameters


class ModuleBuffers:
    """The persistent buffers of one kind, which stay the same tensor objects even if the module replaces them."""

    def __init__(self, module: nn.Module, floating: bool) -> None:
        self._slots = [
            (owner, name, buffer)
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
            if name not in owner._non_persistent_buffers_set
            and buffer.is_floating_point() == floating
            and (floating or buffer.dtype == torch.int64)
        ]
        dtypes = {str(buffer.dtype) for _, _, buffer in self._slots}
        if len(dtypes) > 1:
            raise ValueError(
                f"the float buffers of {type(module).__name__} have several dtypes ({sorted(dtypes)}): convert them to "
                "one, or register those that clients share with persistent=False."
            )

    @property
    def tensors(self) -> list[Tensor]:
        return [buffer for _, _, buffer in self._slots]

    def absorb(self) -> None:
        """Copy values of buffers that the module re-assigned (``self.center = ...``) into the bound row."""
        for owner, name, buffer in self._slots:
            current = owner._buffers[name]
            if current is not buffer and current is not None:
                buffer.data.copy_(current)
                owner._buffers[name] = buffer

"""The state of many clients as rows of one matrix, of which a module's tensors are views.

Shapes: C = clients on this rank, P = numbers in one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

# Rows start on 64-byte boundaries, so that a kernel sees the alignment that it would see for separate tensors.
ALIGNMENT_BYTES = 64


class Rows:
    """A matrix ``[C, P]`` whose row *c* holds what ``tensors`` hold for client *c*.

    Binding a row makes the tensors views into it; nothing is copied, so whatever trains the tensors trains the row.

    Args:
        tensors: the tensors of the module, all of one dtype and device (parameters, or float buffers). Their present
            values become every client's initial values.
        num_rows: C.
        one_for_all: all rows are the same memory: the clients are replicas of one model.
    """

    def __init__(self, tensors: Sequence[Tensor], num_rows: int, one_for_all: bool = False) -> None:
        self.tensors = list(tensors)
        self.width = sum(tensor.numel() for tensor in self.tensors)
        self.one_for_all = one_for_all
        initial = self.gather()
        self._views: dict[int, Sequence[Tensor]] = {}
        if one_for_all:
            self.matrix = initial.expand(num_rows, -1)
            return
        lane = ALIGNMENT_BYTES // initial.element_size()
        stride = self.width if num_rows == 1 else -(-self.width // lane) * lane
        self.matrix = initial.new_zeros((num_rows, stride))[:, : self.width]
        self.matrix.copy_(initial)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: what one transfer of one client's state costs."""
        return self.width * self.matrix.element_size()

    def gather(self) -> Tensor:
        """A new vector ``[P]`` with the tensors' present values."""
        if not self.tensors:
            return torch.zeros(0)
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def bind(self, vector: Tensor) -> None:
        """Make the tensors views into ``vector`` ``[P]`` (a row, or the consensus model)."""
        for tensor, view in zip(self.tensors, _unflatten_dense_tensors(vector, self.tensors)):
            tensor.data = view

    def bind_row(self, slot: int) -> None:
        """Make the tensors views into a row of the matrix. The views are kept until :meth:`forget_views`."""
        views = self._views.get(slot)
        if views is None:
            views = self._views[slot] = _unflatten_dense_tensors(self.matrix[slot], self.tensors)
        for tensor, view in zip(self.tensors, views):
            tensor.data = view

    def forget_views(self) -> None:
        """Drop the views, whose Python objects a federation of many clients should not hold from round to round."""
        self._views.clear()

    def to(self, device: torch.device) -> None:
        """Move the matrix."""
        self.forget_views()
        if self.one_for_all:
            self.matrix = self.matrix[0].to(device).expand(len(self.matrix), -1)
        else:
            self.matrix = self.matrix.to(device)

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

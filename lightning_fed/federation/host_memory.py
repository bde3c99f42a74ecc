"""Memory of the host that a GPU can copy to and from while it computes."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def host_memory(shape: tuple[int, int], dtype: torch.dtype, page_locked: bool) -> Tensor:
    """Zeros in host memory; where it can be, page-locked.

    PyTorch's own page-locked memory comes in powers of two, so a matrix could take twice its size. Ordinary memory is
    registered instead; where the driver refuses that (a limit on locked memory), it stays ordinary, and copies wait.

    Args:
        shape: of the matrix.
        dtype: of its numbers.
        page_locked: lock the pages for copies to and from a GPU.
    """
    matrix = torch.zeros(shape, dtype=dtype)
    if page_locked and matrix.numel():
        address, runtime = matrix.data_ptr(), torch.cuda.cudart()
        if int(runtime.cudaHostRegister(address, matrix.nbytes, 0)) == 0:
            weakref.finalize(matrix.untyped_storage(), runtime.cudaHostUnregister, address)
    return matrix

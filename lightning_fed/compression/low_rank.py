"""Matrices as products of two thin ones.

Shapes: C = rows, P = numbers in a row, R = rank; of a layer's matrix: ``M [m, n]``, ``P_hat [m, R]``, ``Q [n, R]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fed.checks import check_counts
from lightning_fed.compression.compressor import Compressor, DenseVector, Layer, join, split

START_SEED = 0


class LowRank(Compressor):
    """One warm-started power step for each layer (PowerSGD; Vogels, Karimireddy, Jaggi 2019, algorithm 1).

    A tensor of two or more dimensions is a matrix, its first dimension against the rest. ``P = M Q``, orthonormalised;
    ``Q = M^T P``; ``C(M) = P Q^T``. P and Q are the message, R (m + n) numbers in the rows' dtype; Q is where the
    client's next message starts, so one matrix sent again and again comes out ever closer to its best approximation of
    this rank. The very first Q is Gaussian, and the same for all clients. Vectors, and matrices that would not get
    shorter, travel whole.

    ``C(M)`` is an orthogonal projection of the columns of M, so it never expands: ``||C(M) - M||^2 = ||M||^2 -
    ||C(M)||^2``. But a single step may start at a right angle to M and then returns 0: there is no delta above 0 that
    holds for all matrices. ``delta`` is therefore 0; with the warm start it works in practice with error feedback.

    Args:
        rank: R. PowerSGD's experiments use 1 to 4, and find 4 to match SGD throughout.

    Attributes:
        state: Q of the matrices one after another, each client's last one, ``[C, sum of n R]``.

    Raises:
        ValueError: if the rank is below 1; and by :meth:`bind`, if it is larger than the smaller side of a matrix.
    """

    def __init__(self, rank: int = 4) -> None:
        super().__init__("layer")
        check_counts(rank=rank)
        self.rank = rank

    def prepare(self, num_rows: int) -> None:
        for layer in self.layers:
            self._check(layer)
        starts = sum(columns * self.rank for rows, columns in self._sides if self._shortens(rows, columns))
        # Drawn for one client and repeated, on the CPU: the same start everywhere.
        start = torch.randn(starts, generator=torch.Generator().manual_seed(START_SEED))
        self.state = start.to(self.device, self._exact).repeat(num_rows, 1)

    @property
    def delta_is_typical(self) -> bool:
        return False

    @property
    def delta(self) -> float:
        return 0.0

    @property
    def message_bytes(self) -> int:
        return self.dtype.itemsize * sum(map(sum, self._sizes))

    def pack(self, rows_CP: Tensor, seeds: Sequence[int]) -> Tensor:
        if self.state is None or len(rows_CP) != len(self.state):
            bound = 0 if self.state is None else len(self.state)
            raise ValueError(
                f"LowRank was bound to {bound} rows and keeps a warm start of each, but got {len(rows_CP)}."
            )
        # Row by row: a batched product would round otherwise than the same client's alone on another rank.
        return join(torch.stack([self._factors(row, start) for row, start in zip(rows_CP, self.state)]))

    def unpack(self, message_B: Tensor, seed: int) -> DenseVector:
        numbers = split(message_B, (self.dtype, message_B.numel() // self.dtype.itemsize))[0].to(self._exact)
        sizes = self._sizes
        parts = iter(numbers.split([size for layer in sizes for size in layer]))
        layers = []
        for of_layer in sizes:
            first = next(parts)
            if len(of_layer) == 1:
                layers.append(first)
            else:
                layers.append((first.view(-1, self.rank) @ next(parts).view(-1, self.rank).T).flatten())
        return DenseVector(torch.cat(layers).to(self.dtype))

    def _factors(self, row_P: Tensor, starts: Tensor) -> Tensor:
        """The numbers of one message; replaces the warm starts by the new ones."""
        parts, begin = [], 0
        for values, (rows, columns) in zip(row_P.split(self.blocks), self._sides):
            if not self._shortens(rows, columns):
                parts.append(values)
                continue
            end = begin + columns * self.rank
            # A copy, because products may round otherwise at another alignment, which depends on the place in the rank.
            matrix = values.to(self._exact, copy=True).view(rows, columns)
            start = starts[begin:end].clone().view(columns, self.rank)
            basis, factor = _power_step(matrix, start)
            parts += [basis.flatten().to(self.dtype), factor.flatten().to(self.dtype)]
            # A column of zeros would never find its way back if the basis stayed at a right angle to later matrices.
            starts[begin:end] = torch.where(factor.any(dim=0), factor, start).flatten()
            begin = end
        return torch.cat(parts)

    @property
    def _exact(self) -> torch.dtype:
        """Of the arithmetic: half precision has no QR decomposition."""
        return torch.float32 if self.dtype.itemsize < 4 else self.dtype

    @property
    def _sides(self) -> list[tuple[int, int]]:
        """m and n of each layer; of a vector (d, 1)."""
        return [
            (layer.shape[0], layer.size // layer.shape[0]) if len(layer.shape) > 1 and layer.size else (layer.size, 1)
            for layer in self.layers
        ]

    @property
    def _sizes(self) -> list[tuple[int, ...]]:
        """Numbers on the wire of each layer: of the whole layer, or of P and of Q."""
        return [
            (rows * self.rank, columns * self.rank) if self._shortens(rows, columns) else (rows * columns,)
            for rows, columns in self._sides
        ]

    def _shortens(self, rows: int, columns: int) -> bool:
        return self.rank * (rows + columns) < rows * columns

    def _check(self, layer: Layer) -> None:
        if len(layer.shape) < 2 or layer.size == 0:
            return
        rows, columns = layer.shape[0], layer.size // layer.shape[0]
        if self.rank > min(rows, columns):
            raise ValueError(
                f"rank={self.rank} of LowRank is larger than a side of layer {layer.name!r} of shape "
                f"{tuple(layer.shape)}, which is a {rows} x {columns} matrix: choose a rank of at most "
                f"{min(rows, columns)}, or another compressor."
            )


def _power_step(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis ``[m, R]`` near the leading left singular vectors, and the matrix in it, ``[n, R]``."""
    basis = torch.linalg.qr(matrix @ start).Q
    return basis, matrix.T @ basis

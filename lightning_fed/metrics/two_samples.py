"""What metrics of generators share: real samples on one side, generated ones on the other, as vectors.

Shapes: B = samples of a batch, d = numbers of a sample, N = real samples, M = generated ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_fed.checks import check_flags

# Numbers of a block of distances: 128 MB in float64.
BLOCK_NUMBERS = 2**24


class TwoSamples(Metric):
    """Keeps real and generated samples until they are compared: ``4 d`` bytes a sample in float32, on each rank.

    Ranks are gathered before the comparison, so that each needs memory for all samples then; the batches of ranks may
    differ in size, and a rank may have none.

    Args:
        reset_real: whether :meth:`reset` forgets the real samples too, as torchmetrics' ``reset_real_features``.
        **settings: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, reset_real: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        check_flags(reset_real=reset_real)
        self.reset_real = reset_real
        self._dimensions: int | None = None
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    def update(self, samples: Tensor, real: bool) -> None:
        """Add a batch.

        Args:
            samples: ``[B, ...]`` of any shape, which is flattened, and any float type: images, or features of them.
            real: whether they are real, or generated.

        Raises:
            ValueError: if they are no vectors, or have another size than those before.
        """
        if samples.ndim < 2 or not samples.is_floating_point():
            raise ValueError(
                f"samples are {samples.dtype} {list(samples.shape)}, but must be floats [batch, ...]: features, or "
                "images before they are rounded to bytes."
            )
        rows = samples.detach().flatten(1)
        if self._dimensions not in (None, rows.shape[1]):
            raise ValueError(
                f"samples have {rows.shape[1]} numbers, but earlier ones have {self._dimensions}: real and generated "
                "samples must be alike."
            )
        self._dimensions = rows.shape[1]
        (self.real if real else self.fake).append(self.kept(rows))

    def kept(self, rows: Tensor) -> Tensor:
        """What is kept of samples ``[B, d]``, of which all have the same d: one row each."""
        return rows if rows.dtype == torch.float64 else rows.float()

    def reset(self) -> None:
        """Forget what has been seen; with ``reset_real=False`` only the generated samples."""
        real = [] if self.reset_real else list(self.real)
        super().reset()
        self.real = real
        if not real:
            self._dimensions = None

    def both(self, least: int = 1) -> tuple[Tensor, Tensor]:
        """All real and all generated samples, float64 ``[N, d]`` and ``[M, d]``.

        Raises:
            ValueError: if either side has fewer than ``least``.
        """
        sides = {"real": self.real, "generated": self.fake}
        for name, rows in sides.items():
            if (number := sum(map(len, rows))) < least:
                raise ValueError(f"there are {number} {name} samples, but {type(self).__name__} needs {least} or more.")
        real, fake = (torch.cat(list(rows)) for rows in sides.values())
        device = torch.device("cpu") if real.device.type == "mps" else real.device  # MPS has no float64
        return real.to(device).double(), fake.to(device).double()

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        # torchmetrics gathers tensors of like dimensions and types only, which a rank without samples does not know.
        group = process_group or self.process_group
        rows = [*self.real[:1], *self.fake[:1]]
        known = [max(side.shape[1] for side in rows), int(rows[0].dtype == torch.float64)] if rows else [0, 0]
        width, is_double = torch.stack(dist_sync_fn(torch.tensor(known, device=self.device), group=group)).amax(0)
        empty = torch.zeros(0, int(width), device=self.device, dtype=torch.float64 if is_double else torch.float32)
        for name in ("real", "fake"):
            own = torch.cat([empty, *getattr(self, name)])
            setattr(self, name, [torch.cat(dist_sync_fn(own, group=group))])


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``||x_i - y_j||^2`` in blocks of rows, so that not all of them need memory at once.

    Args:
        x: ``[n, d]``.
        y: ``[m, d]``.

    Yields:
        the first row of a block, and the block ``[rows, m]``.
    """
    origin = y.mean(dim=0)  # so that a large offset of all samples costs no digits
    x, y = x - origin, y - origin
    squares = y.square().sum(dim=1)
    rows = max(1, BLOCK_NUMBERS // len(y))
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        yield start, (block.square().sum(dim=1)[:, None] + squares - 2 * block @ y.T).clamp(min=0)

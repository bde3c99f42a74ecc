"""The sliced Wasserstein distance: optimal transport along random lines, where it is a matter of sorting.

Shapes: d = numbers of a sample, N = real samples, M = generated ones, P = projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fed.checks import check_counts
from lightning_fed.metrics.two_samples import TwoSamples


class SlicedWasserstein(TwoSamples):
    """``(mean_theta W_p^p(<theta, real>, <theta, fake>))^(1/p)`` over random unit vectors theta (Bonneel et al. 2015).

    0 for equal samples only (in the limit of many projections), and defined for samples of any two sizes. It measures
    whole images as well as features. The expected value for two sets of the same distribution is not 0, and falls with
    their sizes: compare with real against real.

    Only projections are kept, ``8 P`` bytes a sample; time ``P (N + M) (d + log(N + M))``.

    Args:
        projections: P; the error of the mean over them falls with its root.
        p: of the Wasserstein distance, 1 or 2.
        seed: of the projections, which are the same on all ranks and in every measurement.
        reset_real: whether ``reset`` forgets the real samples too.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if a setting is out of range; in ``compute``, if a side has no sample.
    """

    higher_is_better = False

    def __init__(
        self, projections: int = 128, p: int = 2, seed: int = 0, reset_real: bool = True, **settings: Any
    ) -> None:
        super().__init__(reset_real, **settings)
        check_counts(projections=projections, p=p)
        check_counts(0, seed=seed)
        if p not in (1, 2):
            raise ValueError(f"p={p} of the Wasserstein distance must be 1 or 2.")
        self.projections, self.p, self.seed = projections, p, seed
        self._directions: Tensor | None = None

    def directions(self, dimensions: int) -> Tensor:
        """The unit vectors, float64 ``[d, P]``; uniform on the sphere."""
        draw = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(self.projections, dimensions, generator=draw, dtype=torch.float64)
        return torch.nn.functional.normalize(normal, dim=1).T

    def kept(self, rows: Tensor) -> Tensor:
        if rows.device.type == "mps":  # which has no float64
            rows = rows.cpu()
        if self._directions is None or len(self._directions) != rows.shape[1]:
            self._directions = self.directions(rows.shape[1])
        self._directions = self._directions.to(rows.device)
        return rows.double() @ self._directions

    def compute(self) -> Tensor:
        """The distance, a float64 scalar."""
        return transport_cost(*self.both(), self.p).mean() ** (1 / self.p)


def transport_cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    """``W_p^p`` of the samples in each column: ``int |quantile_x(t) - quantile_y(t)|^p dt``, exactly.

    Args:
        x: ``[N, P]``.
        y: ``[M, P]``.
        p: the exponent.

    Returns:
        ``[P]``.
    """
    x, y = x.sort(dim=0).values, y.sort(dim=0).values
    n, m = len(x), len(y)
    # Both quantile functions are constant between neighbours among the multiples of 1/n and 1/m. In units of 1/(n m):
    ends = torch.cat([torch.arange(m, n * m + 1, m), torch.arange(n, n * m + 1, n)]).sort().values.to(x.device)
    widths = ends.diff(prepend=ends.new_zeros(1)).to(x) / (n * m)
    return widths @ (x[(ends - 1) // m] - y[(ends - 1) // n]).abs().pow(p)

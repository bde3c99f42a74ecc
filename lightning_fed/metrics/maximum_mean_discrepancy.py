"""The maximum mean discrepancy: how far apart two sets of samples are for a kernel.

Shapes: d = numbers of a sample, N = real samples, M = generated ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fed.checks import check_kinds, check_numbers, given
from lightning_fed.metrics.two_samples import TwoSamples, squared_distances

# Of the median distance between real samples.
MULTIPLES = (0.5, 1.0, 2.0)
# Real samples that the median is taken over.
MEDIAN_SAMPLES = 1000


class MaximumMeanDiscrepancy(TwoSamples):
    """The unbiased estimate of MMD^2 (Gretton et al. 2012, lemma 6) with a mean of Gaussian kernels.

    ``mean_{i!=j} k(x_i, x_j) + mean_{i!=j} k(y_i, y_j) - 2 mean k(x_i, y_j)`` with
    ``k(x, y) = mean_b exp(-||x - y||^2 / (2 b^2))``. Its expected value is 0 for two sets of the same distribution,
    whatever their sizes, so it is negative about as often as positive there.

    ``4 d`` bytes a sample are kept; time ``(N + M)^2 d``, and memory for a block of at most 2^24 distances.

    Args:
        bandwidths: the b; None: 1/2, 1 and 2 times the median distance between real samples (over at most 1,000 of
            them). It does not depend on the generated samples, so that values of several epochs can be compared.
        reset_real: whether ``reset`` forgets the real samples too.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if a bandwidth is not positive; in ``compute``, if a side has fewer than two samples, or the median
            distance is 0.
    """

    higher_is_better = False

    def __init__(self, bandwidths: Sequence[float] | None = None, reset_real: bool = True, **settings: Any) -> None:
        super().__init__(reset_real, **settings)
        check_kinds((list, tuple), **given(bandwidths=bandwidths))
        for bandwidth in bandwidths or ():
            check_numbers("(0, inf)", bandwidths=bandwidth)
        if bandwidths is not None and not bandwidths:
            raise ValueError(f"bandwidths={bandwidths} must be positive numbers, or None for the median heuristic.")
        self.bandwidths = None if bandwidths is None else tuple(bandwidths)

    def compute(self) -> Tensor:
        """MMD^2, a float64 scalar."""
        x, y = self.both(least=2)
        bandwidths = self.bandwidths or tuple(multiple * median_distance(x) for multiple in MULTIPLES)
        n, m = len(x), len(y)
        # k(x, x) = 1, which the means over different samples leave out.
        among_x = (kernel_sum(x, x, bandwidths) - n) / (n * (n - 1))
        among_y = (kernel_sum(y, y, bandwidths) - m) / (m * (m - 1))
        return among_x + among_y - 2 * kernel_sum(x, y, bandwidths) / (n * m)


def kernel_sum(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """``sum_ij k(x_i, y_j)``."""
    total = x.new_zeros(())
    for _, squares in squared_distances(x, y):
        for bandwidth in bandwidths:
            total += (squares / (-2 * bandwidth**2)).exp().sum() / len(bandwidths)
    return total


def median_distance(samples: Tensor) -> float:
    """The median of ``||x_i - x_j||``, i < j, over at most 1,000 samples spread evenly over ``[N, d]``.

    Raises:
        ValueError: if it is 0.
    """
    chosen = torch.linspace(0, len(samples) - 1, min(len(samples), MEDIAN_SAMPLES)).round().long()
    median = float(torch.pdist(samples[chosen.to(samples.device)]).median())
    if median == 0:
        raise ValueError("the median distance between real samples is 0, since most are equal: pass bandwidths=.")
    return median

"""How much likelier a noisy sample is under the teacher than under the student, from a discriminator's logits.

Shapes: B = samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_fed.checks import check_counts, check_numbers, check_pairs, given

LARGEST_LOGIT = 10.0
EPSILON = 1e-6


def alone(sums: Tensor) -> Tensor:
    """The sum over ranks where there are none."""
    return sums


class DensityRatio(nn.Module):
    """``r = exp(logit)``, clipped, and divided by its mean at each noise level, which is 1 for the exact ratio.

    The first of the two normalisations of f-distill (arXiv 2502.15681); :meth:`scale_of` is the second. Means are taken
    over bins of equal width on EDM's spacing of noise levels, on which f-distill draws them: bins of equal width in
    sigma would put most samples into the first.

    Args:
        bounds: of r before it is normalised, 0.1 and 20 in the authors' implementation; None for no bounds but those of
            logits in [-10, 10].
        bins: of noise levels, 10 in the paper; 0 for no normalisation by noise level.
        rate: of an exponential moving average of the means, in [0, 1): 0 takes the batch alone (CIFAR-10 in the paper),
            0.5 (ImageNet-64).

    Attributes:
        bin_means: the means, ``[bins]``; a buffer.
        clipped_fraction: of the last samples, how many were out of bounds; a number.

    Raises:
        ValueError: if a setting is out of range.
    """

    bin_means: Tensor

    def __init__(self, bounds: tuple[float, float] | None = (0.1, 20.0), bins: int = 10, rate: float = 0.0) -> None:
        super().__init__()
        check_pairs("[0, inf)", **given(ratio_bounds=bounds))
        check_counts(0, ratio_bins=bins)
        check_numbers("[0, 1)", ratio_rate=rate)
        if bounds is not None and not 0 <= bounds[0] < 1 < bounds[1]:
            raise ValueError(
                f"ratio_bounds={tuple(bounds)} must have 0 <= low < 1 < high, or be None: 1 is the ratio of equals."
            )
        self.bounds, self.bins, self.rate = bounds, bins, rate
        self.register_buffer("bin_means", torch.ones(bins))
        self.clipped_fraction = torch.zeros(())

    def forward(self, logits: Tensor, positions: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] = alone) -> Tensor:
        """Density ratios ``[B]``, at least in float32; means are updated.

        Args:
            logits: ``log p / q`` as a discriminator sees it, ``[B]``; gradients flow through those in bounds.
            positions: of the noise levels on their spacing, in [0, 1], ``[B]``.
            sum_over_ranks: adds up a tensor over the ranks that train one model.
        """
        r = self.clipped(logits)
        if not self.bins:
            return r
        index = (positions * self.bins).long().clamp(0, self.bins - 1)
        sums = r.new_zeros(2, self.bins)
        sums[0].index_add_(0, index, r.detach())
        sums[1].index_add_(0, index, torch.ones_like(r))
        totals, counts = sum_over_ranks(sums)
        batch_means = (totals / counts.clamp(min=1)).to(self.bin_means.dtype)
        seen = torch.lerp(batch_means, self.bin_means, self.rate)
        self.bin_means.copy_(torch.where(counts > 0, seen, self.bin_means))
        return r / (self.bin_means[index] + EPSILON)

    def clipped(self, logits: Tensor) -> Tensor:
        """``exp(logits)`` in bounds, ``[B]``; those out of bounds are counted."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        r = logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()
        low, high = self.bounds or (0.0, float("inf"))
        outside = (logits.abs() > LARGEST_LOGIT) | (r < low) | (r > high)
        self.clipped_fraction = outside.float().mean()
        return r.clamp(low, high)

    @staticmethod
    def scale_of(h: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] = alone) -> Tensor:
        """``1 / mean(h)`` over the batch of all ranks, a number: the second normalisation."""
        h = h.detach()
        total, count = sum_over_ranks(torch.stack([h.sum(), h.new_tensor(float(len(h)))]))
        return 1 / (total / count + EPSILON)

"""Precision and recall of a generator: are its samples real, and are real samples among what it makes?

Shapes: d = numbers of a sample, N = real samples, M = generated ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fed.checks import check_counts
from lightning_fed.metrics.two_samples import TwoSamples, squared_distances


class PrecisionRecall(TwoSamples):
    """Improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A set's manifold is the union of balls around its samples, each as wide as the distance to the k-th nearest other
    sample of the set.

    * ``precision``: share of generated samples in the manifold of the real ones;
    * ``recall``: share of real samples in the manifold of the generated ones;
    * ``density``: real balls that a generated sample lies in, on average, divided by k: 1 for the same distribution,
      more where samples crowd. An outlier among the real samples, with its wide ball, counts for little;
    * ``coverage``: share of real balls with a generated sample inside, which needs no balls of generated outliers.

    They depend on N, M and k: compare numbers of the same sizes, and with real against real.

    ``4 d`` bytes a sample are kept; time ``(N + M)^2 d``, and memory for a block of at most 2^24 distances.

    Args:
        k: of the neighbours; 3 in the first paper, 5 in the second.
        reset_real: whether ``reset`` forgets the real samples too.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if k is below 1; in ``compute``, if a side has no more than k samples.
    """

    higher_is_better = True

    def __init__(self, k: int = 3, reset_real: bool = True, **settings: Any) -> None:
        super().__init__(reset_real, **settings)
        check_counts(k=k)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``density`` and ``coverage``, float64 scalars."""
        real, fake = self.both(least=self.k + 1)
        real_radii, fake_radii = (squared_radii(samples, self.k) for samples in (real, fake))
        precise, density = [], real.new_zeros(())
        recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
        covered = recalled.clone()
        for start, squares in squared_distances(fake, real):
            in_real_ball = squares <= real_radii
            in_fake_ball = squares <= fake_radii[start : start + len(squares), None]
            precise.append(in_real_ball.any(dim=1))
            density += in_real_ball.sum()
            covered |= in_real_ball.any(dim=0)
            recalled |= in_fake_ball.any(dim=0)
        return {
            "precision": torch.cat(precise).double().mean(),
            "recall": recalled.double().mean(),
            "density": density / (self.k * len(fake)),
            "coverage": covered.double().mean(),
        }


def squared_radii(samples: Tensor, k: int) -> Tensor:
    """Squared distance of each sample ``[N, d]`` to its k-th nearest other one, ``[N]``."""
    radii = []
    for start, squares in squared_distances(samples, samples):
        own = torch.arange(len(squares), device=samples.device)
        squares[own, start + own] = torch.inf
        radii.append(squares.kthvalue(k, dim=1).values)
    return torch.cat(radii)

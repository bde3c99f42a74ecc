"""Which modes of the data a generator has kept: by the known means of a mixture, or by a classifier.

Shapes: B = samples of a batch, d = numbers of a sample, M = modes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_fed.checks import check_counts, check_flags, check_kinds, check_numbers
from lightning_fed.metrics.class_moments import Float64Sums


class NearestMode(nn.Module):
    """From points to the nearest mode of a mixture, or to none.

    Args:
        means: of the modes, ``[M, d]``.
        std: of each mode, in all directions.
        within: points farther than so many standard deviations from all means are in no mode. 3 is usual; in the plane
            1.1 % of a Gaussian lies outside.

    Shapes:
        points ``[B, ...]`` of d numbers each; int64 ``[B]``, -1 for none.

    Raises:
        ValueError: if a shape or a setting is out of range.
    """

    means: Tensor

    def __init__(self, means: Tensor, std: float, within: float = 3.0) -> None:
        super().__init__()
        check_kinds(Tensor, means=means)
        if means.ndim != 2:
            raise ValueError(f"means have shape {list(means.shape)}, but must be [modes, numbers of a point].")
        check_numbers("(0, inf)", std=std, within=within)
        self.register_buffer("means", means.float(), persistent=False)
        self.std, self.within = std, within

    @property
    def num_modes(self) -> int:
        """M."""
        return len(self.means)

    def forward(self, points: Tensor) -> Tensor:
        rows = points.flatten(1).to(self.means.dtype)
        if rows.shape[1] != self.means.shape[1]:
            raise ValueError(f"points have {rows.shape[1]} numbers, but the means have {self.means.shape[1]}.")
        distances, nearest = torch.cdist(rows, self.means).min(dim=1)
        return torch.where(distances <= self.within * self.std, nearest, -1)


class ModeCoverage(Float64Sums):
    """The share of modes, or classes, that get at least a given share of the samples that they are due.

    A mode is due its share of the real samples; before there are real samples, all modes are due the same. Modes that
    are due nothing are left out. Returned are

    * ``coverage``: the share of modes that are kept;
    * ``total_variation``: ``sum_m |share of generated samples - due share| / 2`` over the modes, where samples in no
      mode count as generated: 0 if every mode has its due;
    * ``inside``: share of generated samples that are in a mode; always 1 with a classifier.

    ``16 M`` bytes are kept, no sample.

    Args:
        assign: :class:`NearestMode`, or a classifier: a module from samples to logits ``[B, M]``, or to the numbers of
            the modes, int64 ``[B]``, with -1 for none. It is put into evaluation mode.
        num_modes: M.
        least: share of its due, in (0, 1], that a mode must get.
        reset_real: whether ``reset`` forgets the real samples too.
        **settings: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if a setting is out of range, or ``assign`` gives something else; in ``compute``, if there is no
            generated sample.
    """

    higher_is_better = True
    is_differentiable = False
    real_counts: Tensor
    fake_counts: Tensor

    def __init__(
        self, assign: nn.Module, num_modes: int, least: float = 0.25, reset_real: bool = True, **settings: Any
    ) -> None:
        super().__init__(**settings)
        check_kinds(nn.Module, assign=assign)
        check_counts(num_modes=num_modes)
        check_flags(reset_real=reset_real)
        check_numbers(least=least)
        if not 0 < least <= 1:
            raise ValueError(f"least={least} must be in (0, 1]: a share of the samples that a mode is due.")
        self.assign, self.num_modes, self.least, self.reset_real = assign, num_modes, least, reset_real
        for name in ("real_counts", "fake_counts"):
            # The last one counts samples in no mode.
            self.add_state(name, torch.zeros(num_modes + 1, dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, samples: Tensor, real: bool) -> None:
        """Add a batch.

        Args:
            samples: ``[B, ...]``, what ``assign`` takes.
            real: whether they are real, or generated.
        """
        found = self.assign.eval()(samples)
        modes = found.argmax(dim=1) if found.is_floating_point() and found.ndim == 2 else found
        if modes.shape != (len(samples),) or modes.is_floating_point():
            raise ValueError(
                f"assign gives {found.dtype} {list(found.shape)} for {len(samples)} samples, but must give logits "
                f"[{len(samples)}, {self.num_modes}] or integers [{len(samples)}]."
            )
        if len(modes) and not -1 <= int(modes.min()) <= int(modes.max()) < self.num_modes:
            raise ValueError(
                f"assign gives modes {int(modes.min())} .. {int(modes.max())}, but num_modes={self.num_modes}."
            )
        counts = self.real_counts if real else self.fake_counts
        counts += torch.bincount(modes.to(counts.device) % (self.num_modes + 1), minlength=self.num_modes + 1)

    def compute(self) -> dict[str, Tensor]:
        """``coverage``, ``total_variation`` and ``inside``, float64 scalars."""
        if not self.fake_counts.sum():
            raise ValueError("there is no generated sample: call `update` with real=False before `compute`.")
        got = self.fake_counts.double() / self.fake_counts.sum()
        due = self.real_counts[:-1].double()
        due = torch.ones_like(due) / len(due) if not due.sum() else due / due.sum()
        kept = got[:-1] >= self.least * due
        return {
            "coverage": kept[due > 0].double().mean(),
            "total_variation": ((got[:-1] - due).abs().sum() + got[-1]) / 2,
            "inside": 1 - got[-1],
        }

    def reset(self) -> None:
        """Forget what has been seen; with ``reset_real=False`` only the generated samples."""
        real = self.real_counts
        super().reset()
        if not self.reset_real:
            self.real_counts = real

"""Gaussian mixtures in the plane: data whose every mode is known, on which a generator trains in minutes on a CPU."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_fed.checks import check_choice, check_counts, check_numbers
from lightning_fed.data.client_data_module import ClientDataModule, Splits
from lightning_fed.partition import Partitioner, Shards

MixtureLayout = Literal["ring", "grid"]


class GaussianMixtureDataModule(ClientDataModule):
    """Points from equally likely Gaussians on a ring or a square grid, as images of one pixel and two channels.

    Float32 ``[2, 1, 1]``, so that any image network of diffusers learns them with ``sample_size=1, in_channels=2,
    out_channels=2`` and no level that halves the size. Labels are the modes, and by default each client holds one
    mode. Every mode has the same number of points, to within one.

    With the default ``extent`` the points fill [-1, 1] about as images do: each coordinate has a standard deviation of
    0.5, EDM's ``sigma_data``.

    Args:
        layout: ``"ring"``: modes at equal angles, the first at (extent, 0); ``"grid"``: a square grid, row by row.
        modes: Gaussians, M; 8 on a ring and 25 on a grid are usual. A square number for ``"grid"``.
        std: standard deviation of each Gaussian, in both directions.
        extent: radius of the ring, or half the side of the grid.
        train_samples: points to train on.
        eval_samples: points for validation, and as many again for test.
        num_clients: N; must equal the strategy's.
        partitioner: who gets what; None means ``Shards(1)``: one mode a client, if there are as many clients as modes.
        batch_size: samples in a client's minibatch.
        eval_batch_size: samples in a minibatch of validation, test and prediction.
        num_workers: worker processes of each loader.
        client_eval_split: share of each client's samples held out to evaluate its own model on.
        drop_last: leave out the last, smaller minibatch of a client's pass.
        seed: of the points and of the partition.

    Attributes:
        means: of the Gaussians, float32 ``[M, 2]``.
        std: see above; :class:`~lightning_fed.metrics.ModeCoverage` takes both.

    Raises:
        ValueError: as :class:`ClientDataModule`; if a setting is out of range.
    """

    def __init__(
        self,
        layout: MixtureLayout = "ring",
        modes: int = 8,
        std: float = 0.05,
        extent: float = 0.7,
        train_samples: int = 8192,
        eval_samples: int = 2048,
        num_clients: int = 8,
        partitioner: Partitioner | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        num_workers: int = 0,
        client_eval_split: float = 0.0,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_clients=num_clients,
            partitioner=partitioner if partitioner is not None else Shards(1),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            client_eval_split=client_eval_split,
            drop_last=drop_last,
            seed=seed,
        )
        check_choice("layout", layout, *get_args(MixtureLayout))
        check_counts(modes=modes, train_samples=train_samples, eval_samples=eval_samples)
        check_numbers("(0, inf)", std=std, extent=extent)
        if layout == "grid" and math.isqrt(modes) ** 2 != modes:
            raise ValueError(f'modes={modes} must be a square number (4, 9, 25) for layout="grid".')
        if min(train_samples, eval_samples) < modes:
            raise ValueError(
                f"train_samples={train_samples}, eval_samples={eval_samples}: each must be at least modes={modes}."
            )
        self.means = ring(modes, extent) if layout == "ring" else grid(math.isqrt(modes), extent)
        self.std = std
        self.train_samples, self.eval_samples = train_samples, eval_samples

    @property
    def num_classes(self) -> int:
        return len(self.means)

    def splits(self) -> Splits:
        source = torch.Generator().manual_seed(self.seed)
        sizes = self.train_samples, self.eval_samples, self.eval_samples
        return Splits(*(self._points(size, source) for size in sizes))

    def _points(self, size: int, source: torch.Generator) -> TensorDataset:
        labels = (torch.arange(size) % len(self.means))[torch.randperm(size, generator=source)]
        points = self.means[labels] + self.std * torch.randn(size, 2, generator=source)
        return TensorDataset(points[:, :, None, None], labels)


def ring(modes: int, radius: float) -> Tensor:
    """Points at equal angles on a circle, ``[modes, 2]``."""
    angles = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    return (radius * torch.stack([angles.cos(), angles.sin()], dim=1)).float()


def grid(side: int, extent: float) -> Tensor:
    """A square grid around the origin, ``[side^2, 2]``."""
    ticks = torch.linspace(-extent, extent, side) if side > 1 else torch.zeros(1)
    return torch.cartesian_prod(ticks, ticks)

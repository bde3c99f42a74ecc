"""The handwritten digits that scikit-learn ships: real images, no download."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lightning_fed.data.client_data_module import ClientDataModule, Splits
from lightning_fed.partition import Dirichlet, Partitioner

VALIDATION_SAMPLES, TEST_SAMPLES = 200, 400

DigitsPixels = Literal["unit", "symmetric"]


class DigitsDataModule(ClientDataModule):
    """1,797 images of ten digits (Alpaydin, Kaynak 1998), float32 ``[1, 8, 8]``; a run takes seconds.

    1,197 samples are for training, 200 for validation, 400 for test, in the same class proportions. This division is
    fixed; ``seed`` only decides which client gets which training samples. Needs scikit-learn.

    Args:
        num_clients: N; must equal the strategy's.
        partitioner: who gets what; None means ``Dirichlet(alpha=0.3)``.
        batch_size: samples in a client's minibatch.
        eval_batch_size: samples in a minibatch of validation, test and prediction.
        num_workers: worker processes of each loader.
        client_eval_split: share of each client's samples held out to evaluate its own model on.
        drop_last: leave out the last, smaller minibatch of a client's pass.
        seed: of the partition.
        pixels: ``"unit"``: in [0, 1]; ``"symmetric"``: in [-1, 1], as diffusion models expect.

    Raises:
        ValueError: as :class:`ClientDataModule`; if ``pixels`` is unknown.
    """

    def __init__(
        self,
        num_clients: int = 20,
        partitioner: Partitioner | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 400,
        num_workers: int = 0,
        client_eval_split: float = 0.0,
        drop_last: bool = False,
        seed: int = 0,
        pixels: DigitsPixels = "unit",
    ) -> None:
        super().__init__(
            num_clients=num_clients,
            partitioner=partitioner if partitioner is not None else Dirichlet(alpha=0.3),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            client_eval_split=client_eval_split,
            drop_last=drop_last,
            seed=seed,
        )
        if not isinstance(pixels, str) or pixels not in get_args(DigitsPixels):
            raise ValueError(f'pixels={pixels!r} is unknown: use "unit" for [0, 1] or "symmetric" for [-1, 1].')
        self.pixels: DigitsPixels = pixels

    @property
    def num_classes(self) -> int:
        return 10

    def splits(self) -> Splits:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        if self.pixels == "symmetric":
            images = 2 * images - 1
        labels = torch.from_numpy(digits.target).long()
        held_out = VALIDATION_SAMPLES + TEST_SAMPLES
        train, rest = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=0)
        val, test = train_test_split(rest, test_size=TEST_SAMPLES, stratify=labels[rest], random_state=0)
        return Splits(*(TensorDataset(images[part], labels[part]) for part in (train, val, test)))

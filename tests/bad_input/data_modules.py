"""Bad settings of data modules."""

from __future__ import annotations

from typing import Any

import numpy as np
from bad_input.bad_values import (
    CHOICE,
    COUNT,
    COUNT_FROM_TWO,
    COUNT_FROM_ZERO,
    FLAG,
    NUMBER,
    PART,
    PATH,
    POSITIVE,
    SHARE_BELOW_ONE,
    Case,
    Catalogue,
    optional,
)
from federations import samples

from lightning_fed.data import (
    ClientDataModule,
    DigitsDataModule,
    FederatedDataset,
    GaussianMixtureDataModule,
    ImageFolderDataModule,
    ModularArithmeticDataModule,
    VisionDataModule,
)

CLIENTS: dict[str, Any] = {
    "num_clients": COUNT,
    "partitioner": optional(PART),
    "batch_size": COUNT,
    "eval_batch_size": COUNT,
    "num_workers": COUNT_FROM_ZERO,
    "client_eval_split": SHARE_BELOW_ONE,
    "drop_last": FLAG,
    "seed": COUNT_FROM_ZERO,
}
INDICES = ("all", 3, ["all"], [np.array([0.5])], [np.array([[1]])], [np.array([-1])], [np.array([10])])
CATALOGUE: Catalogue = {
    ClientDataModule: Case(
        {
            "train": ("digits", 3),
            "val": ("digits", 3),
            "test": ("digits", 3),
            "labels": ("all", 3),
            **CLIENTS,
        },
        valid=lambda: {"train": samples(10), "num_clients": 2},
    ),
    DigitsDataModule: Case({**CLIENTS, "pixels": CHOICE}),
    GaussianMixtureDataModule: Case(
        {
            "layout": CHOICE,
            "modes": COUNT,
            "std": POSITIVE,
            "extent": POSITIVE,
            "train_samples": (3, *COUNT),
            "eval_samples": (3, *COUNT),
            **CLIENTS,
        }
    ),
    ImageFolderDataModule: Case(
        {"root": PATH, "image_size": COUNT, "mirror": FLAG, **CLIENTS},
        valid=lambda: {"root": "images", "image_size": 8},
    ),
    ModularArithmeticDataModule: Case(
        {
            "p": COUNT_FROM_TWO,
            "operation": CHOICE,
            "train_fraction": (0.0, 1.0, -0.1, *NUMBER),
            "batch_size": optional(COUNT),
            "steps_per_epoch": COUNT,
            "seed": COUNT_FROM_ZERO,
        }
    ),
    VisionDataModule: Case(
        {
            "name": CHOICE,
            "root": PATH,
            "download": FLAG,
            "augment": FLAG,
            "val_fraction": SHARE_BELOW_ONE,
            "pixels": CHOICE,
            **CLIENTS,
        },
        valid=lambda: {"name": "cifar10"},
    ),
    FederatedDataset: Case(
        {
            "dataset": ("digits", 3, None),
            "client_indices": INDICES,
            "client_eval_indices": INDICES,
            "eval_dataset": ("digits", 3),
        },
        valid=lambda: {
            "dataset": samples(10),
            "client_indices": [np.arange(5)],
            "client_eval_indices": [np.arange(5, 10)],
        },
    ),
}

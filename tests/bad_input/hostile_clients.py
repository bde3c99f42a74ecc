"""Bad settings of robust rules and of simulated attacks."""

from __future__ import annotations

import numpy as np
from bad_input.bad_values import (
    COUNT,
    COUNT_FROM_TWO,
    NUMBER,
    POSITIVE,
    Case,
    Catalogue,
    optional,
)
from federations import samples

from lightning_fed import (
    ALittleIsEnough,
    CoordinateMedian,
    FallOfEmpires,
    GaussianNoise,
    GeometricMedian,
    Krum,
    NearestNeighborAverage,
    NotANumber,
    SignFlip,
    Silent,
    TrimmedMean,
)
from lightning_fed.data import FederatedDataset, LabelFlip

CLIENTS = ([], [-1], [0, 0], [0.5], ["0"], "0", 3, None)
CATALOGUE: Catalogue = {
    CoordinateMedian: Case(),
    TrimmedMean: Case({"byzantine": COUNT}, valid=lambda: {"byzantine": 1}),
    GeometricMedian: Case({"iterations": COUNT, "smoothing": POSITIVE}),
    Krum: Case({"byzantine": COUNT, "selected": COUNT}, valid=lambda: {"byzantine": 1}),
    NearestNeighborAverage: Case({"byzantine": COUNT}, valid=lambda: {"byzantine": 1}),
    SignFlip: Case({"clients": CLIENTS, "scale": POSITIVE}, valid=lambda: {"clients": [0]}),
    ALittleIsEnough: Case({"clients": CLIENTS, "z": optional(NUMBER)}, valid=lambda: {"clients": [0]}),
    FallOfEmpires: Case({"clients": CLIENTS, "epsilon": POSITIVE}, valid=lambda: {"clients": [0]}),
    GaussianNoise: Case({"clients": CLIENTS, "std": POSITIVE}, valid=lambda: {"clients": [0]}),
    Silent: Case({"clients": CLIENTS}, valid=lambda: {"clients": [0]}),
    NotANumber: Case({"clients": CLIENTS}, valid=lambda: {"clients": [0]}),
    LabelFlip: Case(
        {"source": ("digits", 3, None), "clients": (*CLIENTS, [2]), "num_classes": COUNT_FROM_TWO},
        valid=lambda: {
            "source": FederatedDataset(samples(10), [np.arange(5), np.arange(5, 10)]),
            "clients": [0],
            "num_classes": 4,
        },
    ),
}

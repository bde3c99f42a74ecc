"""Bad settings of metrics."""

from __future__ import annotations

import torch
from bad_input.bad_values import (
    COUNT,
    COUNT_FROM_TWO,
    COUNT_FROM_ZERO,
    FLAG,
    PAIR,
    POSITIVE,
    SHARE,
    Case,
    Catalogue,
    Fine,
    inf,
    nan,
    optional,
)
from torch import nn

from lightning_fed.metrics import (
    ClassMoments,
    DigitsFeatures,
    MaximumMeanDiscrepancy,
    ModeCoverage,
    NearestCentreAgreement,
    NearestMode,
    NeuralCollapse,
    PixelFeatures,
    PrecisionRecall,
    SlicedWasserstein,
)

SETTINGS = Fine("those of torchmetrics, which names others")
CATALOGUE: Catalogue = {
    ClassMoments: Case(
        {"num_classes": COUNT_FROM_TWO, "num_features": COUNT, "settings": SETTINGS},
        valid=lambda: {"num_classes": 3, "num_features": 2},
    ),
    NeuralCollapse: Case(
        {"num_classes": COUNT_FROM_TWO, "num_features": COUNT, "decays": optional(PAIR), "settings": SETTINGS},
        valid=lambda: {"num_classes": 3, "num_features": 2},
    ),
    NearestCentreAgreement: Case(
        {"means": ("zero", 3, None), "classes": ("all", 3), "settings": SETTINGS},
        valid=lambda: {"means": torch.zeros(3, 2)},
    ),
    PixelFeatures: Case({"num_features": COUNT}, valid=lambda: {"num_features": 4}),
    DigitsFeatures: Case(),
    MaximumMeanDiscrepancy: Case(
        {
            "bandwidths": ("wide", 3, (), (0.0,), (1.0, -1.0), (nan,), (inf,), ("wide",)),
            "reset_real": FLAG,
            "settings": SETTINGS,
        }
    ),
    ModeCoverage: Case(
        {
            "assign": ("nearest", 3, None),
            "num_modes": COUNT,
            "least": SHARE,
            "reset_real": FLAG,
            "settings": SETTINGS,
        },
        valid=lambda: {"assign": nn.Identity(), "num_modes": 3},
    ),
    NearestMode: Case(
        {"means": ("zero", 3, None), "std": POSITIVE, "within": POSITIVE},
        valid=lambda: {"means": torch.zeros(3, 2), "std": 1.0},
    ),
    PrecisionRecall: Case({"k": COUNT, "reset_real": FLAG, "settings": SETTINGS}),
    SlicedWasserstein: Case(
        {
            "projections": COUNT,
            "p": (3, *COUNT),
            "seed": COUNT_FROM_ZERO,
            "reset_real": FLAG,
            "settings": SETTINGS,
        }
    ),
}

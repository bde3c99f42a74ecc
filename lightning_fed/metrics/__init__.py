"""torchmetrics Metrics that know nothing of federation."""

from lightning_fed.metrics.class_moments import ClassMoments, Moments
from lightning_fed.metrics.neural_collapse import (
    NearestCentreAgreement,
    NeuralCollapse,
    collapse_measures,
    orthogonal_frame_norms,
)

__all__ = [
    "ClassMoments",
    "Moments",
    "NearestCentreAgreement",
    "NeuralCollapse",
    "collapse_measures",
    "orthogonal_frame_norms",
]

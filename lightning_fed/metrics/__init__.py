"""torchmetrics Metrics that know nothing of federation."""

from lightning_fed.metrics.class_moments import ClassMoments, Moments
from lightning_fed.metrics.image_features import DigitsFeatures, PixelFeatures
from lightning_fed.metrics.maximum_mean_discrepancy import MaximumMeanDiscrepancy
from lightning_fed.metrics.mode_coverage import ModeCoverage, NearestMode
from lightning_fed.metrics.neural_collapse import (
    NearestCentreAgreement,
    NeuralCollapse,
    collapse_measures,
    orthogonal_frame_norms,
)
from lightning_fed.metrics.precision_recall import PrecisionRecall
from lightning_fed.metrics.sliced_wasserstein import SlicedWasserstein

__all__ = [
    "ClassMoments",
    "DigitsFeatures",
    "MaximumMeanDiscrepancy",
    "ModeCoverage",
    "Moments",
    "NearestCentreAgreement",
    "NearestMode",
    "NeuralCollapse",
    "PixelFeatures",
    "PrecisionRecall",
    "SlicedWasserstein",
    "collapse_measures",
    "orthogonal_frame_norms",
]

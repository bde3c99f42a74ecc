"""What to watch while a model trains, and what may be done to gradients before they are stepped along."""

from lightning_fed.callbacks.diffusion_monitor import DiffusionMonitor
from lightning_fed.callbacks.federation_monitor import FederationMonitor
from lightning_fed.callbacks.generative_metrics import GenerativeMetrics
from lightning_fed.callbacks.geometry_report import GeometryReport
from lightning_fed.callbacks.grokfast import Grokfast
from lightning_fed.callbacks.neural_collapse import NeuralCollapseMonitor
from lightning_fed.callbacks.orthogonal_gradient import OrthogonalGradient
from lightning_fed.callbacks.round_progress_bar import RoundProgressBar
from lightning_fed.callbacks.sample_grid import SampleGrid
from lightning_fed.callbacks.sharpness_aware import SharpnessAware
from lightning_fed.callbacks.sharpness_monitor import SharpnessMonitor

__all__ = [
    "DiffusionMonitor",
    "FederationMonitor",
    "GenerativeMetrics",
    "GeometryReport",
    "Grokfast",
    "NeuralCollapseMonitor",
    "OrthogonalGradient",
    "RoundProgressBar",
    "SampleGrid",
    "SharpnessAware",
    "SharpnessMonitor",
]

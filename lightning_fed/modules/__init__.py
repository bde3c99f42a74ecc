"""LightningModules that run under any strategy, federated or not."""

from lightning_fed.modules.diffusion import ConsistencyTraining, DiffusionModule, DiffusionTraining, FDistill
from lightning_fed.modules.equiangular_head import EquiangularHead
from lightning_fed.modules.image_classifier import ImageClassifier
from lightning_fed.modules.modular_classifier import ModularClassifier
from lightning_fed.modules.networks import MLP, SmallConvNet
from lightning_fed.modules.stable_max import StableMaxCrossEntropy

__all__ = [
    "MLP",
    "ConsistencyTraining",
    "DiffusionModule",
    "DiffusionTraining",
    "EquiangularHead",
    "FDistill",
    "ImageClassifier",
    "ModularClassifier",
    "SmallConvNet",
    "StableMaxCrossEntropy",
]

"""LightningModules that run under any strategy, federated or not."""

from lightning_fed.modules.image_classifier import ImageClassifier
from lightning_fed.modules.networks import MLP, SmallConvNet

__all__ = ["MLP", "ImageClassifier", "SmallConvNet"]

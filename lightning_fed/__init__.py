"""Federated and decentralized training for PyTorch Lightning: pass one strategy to the Trainer."""

from lightning_fed.attacks import (
    ALittleIsEnough,
    FallOfEmpires,
    GaussianNoise,
    NotANumber,
    SignFlip,
    Silent,
)
from lightning_fed.federation.availability import AlwaysOn, AvailabilityTrace, MembershipSchedule, RandomChurn
from lightning_fed.federation.manifest import newest_complete_checkpoint
from lightning_fed.federation.virtual_clock import Constant, LogNormal, Uniform, VirtualClock
from lightning_fed.privacy import UserLevelPrivacy
from lightning_fed.robust import CoordinateMedian, GeometricMedian, Krum, NearestNeighborAverage, TrimmedMean
from lightning_fed.strategies import (
    DFedSAMStrategy,
    EControlStrategy,
    FedAvgStrategy,
    FederatedStrategy,
    GossipStrategy,
    MoDeSTStrategy,
)

__version__ = "0.1.0"

__all__ = [
    "ALittleIsEnough",
    "AlwaysOn",
    "AvailabilityTrace",
    "Constant",
    "CoordinateMedian",
    "DFedSAMStrategy",
    "EControlStrategy",
    "FallOfEmpires",
    "FedAvgStrategy",
    "FederatedStrategy",
    "GaussianNoise",
    "GeometricMedian",
    "GossipStrategy",
    "Krum",
    "LogNormal",
    "MembershipSchedule",
    "MoDeSTStrategy",
    "NearestNeighborAverage",
    "NotANumber",
    "RandomChurn",
    "SignFlip",
    "Silent",
    "TrimmedMean",
    "Uniform",
    "UserLevelPrivacy",
    "VirtualClock",
    "__version__",
    "newest_complete_checkpoint",
]

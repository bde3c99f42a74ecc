"""Federated and decentralized training for PyTorch Lightning: pass one strategy to the Trainer."""

from lightning_fed.federation.availability import AlwaysOn, AvailabilityTrace, MembershipSchedule, RandomChurn
from lightning_fed.federation.virtual_clock import Constant, LogNormal, Uniform, VirtualClock
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
    "AlwaysOn",
    "AvailabilityTrace",
    "Constant",
    "DFedSAMStrategy",
    "EControlStrategy",
    "FedAvgStrategy",
    "FederatedStrategy",
    "GossipStrategy",
    "LogNormal",
    "MembershipSchedule",
    "MoDeSTStrategy",
    "RandomChurn",
    "Uniform",
    "VirtualClock",
    "__version__",
]

"""Federated and decentralized training for PyTorch Lightning: pass one strategy to the Trainer."""

from lightning_fed.strategies import (
    DFedSAMStrategy,
    FedAvgStrategy,
    FederatedStrategy,
    GossipStrategy,
    MoDeSTStrategy,
)

__version__ = "0.1.0"

__all__ = ["DFedSAMStrategy", "FedAvgStrategy", "FederatedStrategy", "GossipStrategy", "MoDeSTStrategy", "__version__"]

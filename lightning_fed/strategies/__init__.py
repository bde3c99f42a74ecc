"""What a user passes to the Trainer."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.strategies.dfedsam import DFedSAMStrategy
from lightning_fed.strategies.econtrol import EControlStrategy
from lightning_fed.strategies.fedavg import FedAvgStrategy
from lightning_fed.strategies.gossip import GossipStrategy
from lightning_fed.strategies.modest import MoDeSTStrategy

__all__ = [
    "DFedSAMStrategy",
    "EControlStrategy",
    "FedAvgStrategy",
    "FederatedStrategy",
    "GossipStrategy",
    "MoDeSTStrategy",
]


def register_names() -> None:
    """Let ``Trainer(strategy="dfedsam")`` and its like work; Lightning knows the names once the package is imported."""
    aliases: tuple[tuple[str, type[FederatedStrategy], dict[str, Any]], ...] = (
        ("fedavg", FedAvgStrategy, {}),
        ("gossip", GossipStrategy, {}),
        ("dpsgd", GossipStrategy, {"local_steps": 1, "rounds_per_epoch": "pass"}),
        ("dfedsam", DFedSAMStrategy, {}),
        ("modest", MoDeSTStrategy, {}),
        ("econtrol", EControlStrategy, {}),
    )
    for name, strategy, settings in aliases:
        if name not in StrategyRegistry:
            summary = (strategy.__doc__ or name).strip().splitlines()[0]
            StrategyRegistry.register(name, strategy, description=summary, **settings)


register_names()

"""Waves of clients on two real ranks train what one rank trains client by client."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import all_rows, clients, loaders, silent_trainer, small_network
from ranks import run_ranks
from torch import Tensor, nn

from lightning_fed import DFedSAMStrategy, EControlStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.compression import TopK


class Noisy(pl.LightningModule):
    """Dropout and BatchNorm: whatever may depend on who shares a wave."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_network(dropout=0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


MAKE: dict[str, Any] = {
    "fedavg": lambda **s: FedAvgStrategy(cohort_size=7, evaluate="both", **s),
    "gossip": lambda **s: GossipStrategy(optimizer_state="keep", **s),
    "dfedsam": lambda **s: DFedSAMStrategy(rho=0.05, **s),
    "econtrol": lambda **s: EControlStrategy(TopK(1.0), **s),
}


def federation(name: str, world_size: int, clients_per_step: int) -> dict[str, Any]:
    pl.seed_everything(7, verbose=False)
    strategy = MAKE[name](num_clients=11, clients_per_step=clients_per_step)
    trainer = silent_trainer(strategy, devices=world_size, max_epochs=3, precision="64-true")
    trainer.fit(Noisy(), loaders(clients(11))[0])
    return {"rows": all_rows(strategy), "loss": float(trainer.callback_metrics["loss"])}


@pytest.mark.parametrize("name", MAKE)
def test_waves_on_two_ranks_train_what_single_clients_train(name: str) -> None:
    alone = federation(name, 1, 1)
    for result in run_ranks(2, federation, name, 2, 3):
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=0, atol=1e-10)
        assert result["loss"] == pytest.approx(alone["loss"], abs=1e-6)

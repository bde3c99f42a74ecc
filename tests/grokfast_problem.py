"""A small module, its training, and a look at gradients, for the tests of Grokfast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from federations import CLASSES, FEATURES, samples, silent_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCH, BATCHES = 6, 10


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9, weight_decay=0.01)


class Looks(pl.Callback):
    """The gradients before the callbacks after it, for each client of a federation."""

    def __init__(self) -> None:
        self.of: dict[Any, list[Tensor]] = defaultdict(list)

    @property
    def gradients(self) -> list[Tensor]:
        return self.of[None]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        client = trainer.strategy.bank.bound if hasattr(trainer.strategy, "bank") else None
        self.of[client].append(torch.cat([p.grad.reshape(-1) for p in pl_module.parameters()]).clone())


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    pl.seed_everything(5, verbose=False)
    fitting = {key: settings.pop(key) for key in ("ckpt_path", "weights_only") if key in settings}
    trainer = silent_trainer("auto", **{"max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, DataLoader(samples(BATCH * BATCHES), BATCH), **fitting)
    return trainer


def net(make: Callable[[], Any] = Net) -> Any:
    torch.manual_seed(0)
    return make()


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])

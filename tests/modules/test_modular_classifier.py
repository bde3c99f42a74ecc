"""The network of modular arithmetic: its size, its optimizers, its losses, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federations import silent_trainer
from lightning.pytorch import seed_everything

from lightning_fed.data import ModularArithmeticDataModule
from lightning_fed.modules import ModularClassifier, StableMaxCrossEntropy


def test_its_size_and_output() -> None:
    module = ModularClassifier(47)
    assert sum(parameter.numel() for parameter in module.parameters()) == 25_536
    assert module(torch.tensor([[0, 46], [3, 4], [5, 5]])).shape == (3, 47)


def test_operands_have_places() -> None:
    """a - b is not b - a: the two look the same embedding up, and are not added."""
    logits = ModularClassifier(11)(torch.tensor([[2, 7], [7, 2]]))
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize(("decoupled", "kind"), [(False, torch.optim.Adam), (True, torch.optim.AdamW)])
def test_its_optimizer(decoupled: bool, kind: Any) -> None:
    optimizer = ModularClassifier(11, lr=0.02, weight_decay=0.3, decoupled=decoupled).configure_optimizers()
    assert type(optimizer) is kind
    settings = optimizer.param_groups[0]
    assert (settings["lr"], settings["weight_decay"], settings["betas"]) == (0.02, 0.3, (0.9, 0.98))


@pytest.mark.parametrize("loss", ["cross_entropy", "stable_max"])
def test_it_fits_its_training_pairs(loss: Any) -> None:
    seed_everything(0, verbose=False)
    module = ModularClassifier(11, lr=0.01, loss=loss)
    trainer = silent_trainer("auto", max_epochs=2)
    trainer.fit(module, ModularArithmeticDataModule(11, steps_per_epoch=60))
    assert isinstance(module.loss, StableMaxCrossEntropy) == (loss == "stable_max")
    metrics = trainer.callback_metrics
    assert metrics["train/acc"] > 0.95 and metrics["val/acc"] < 0.95
    assert metrics["train/loss"] < metrics["val/loss"] and metrics["train/loss"].dtype == torch.float32


def test_a_loss_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="loss='hinge' is not one of"):
        ModularClassifier(loss="hinge")  # type: ignore[arg-type]

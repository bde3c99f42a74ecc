"""Diffusion modules in a federation: stop after any joint step, resume, and end where the uninterrupted run ends."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import all_rows, silent_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from small_denoisers import coloured, unet_config
from small_distillations import distillation
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FedAvgStrategy, GossipStrategy
from lightning_fed.callbacks import DiffusionMonitor
from lightning_fed.data import FederatedDataset
from lightning_fed.modules.diffusion import DiffusionTraining
from lightning_fed.modules.diffusion.consistency_training import ConsistencyTraining

CLIENTS, EPOCHS = 3, 2


def diffusion() -> DiffusionTraining:
    return DiffusionTraining(unet_config(), ema_decay=0.9, sampling_steps=2)


def consistency() -> ConsistencyTraining:
    return ConsistencyTraining(unet_config(dropout=0.3), ema_decay=0.9, total_steps=12)


def f_distill() -> pl.LightningModule:
    return distillation(ratio_rate=0.5, student_every=2, gan_weight=0.01, ema_decay=0.9)


MODULES: dict[str, Any] = {"diffusion": diffusion, "consistency": consistency, "f-distill": f_distill}
STRATEGIES: dict[str, Any] = {
    "fedavg": lambda: FedAvgStrategy(num_clients=CLIENTS, optimizer_state="keep"),
    "gossip": lambda: GossipStrategy(num_clients=CLIENTS, optimizer_state="keep"),
}


def data() -> DataLoader[Any]:
    """Two, three and four minibatches a client."""
    images = TensorDataset(coloured(36).tensors[0])
    ends = [0, 8, 20, 36]
    return DataLoader(FederatedDataset(images, [np.arange(a, b) for a, b in pairwise(ends)]), 4, shuffle=True)


def fit(module: str, strategy: str, directory: str, ranks: int = 1, resume: str | None = None) -> dict[str, Any]:
    """Train with a checkpoint after each joint step, unless resumed; tell where that has led."""
    torch.manual_seed(0)
    made = MODULES[module]()
    pl.seed_everything(3 if resume is None else 77, verbose=False)
    federation, monitor = STRATEGIES[strategy](), DiffusionMonitor(bins=2, plots=False)
    save = ModelCheckpoint(directory, "{step}-{round}", save_top_k=-1, every_n_train_steps=1)
    trainer = silent_trainer(
        federation,
        ranks,
        max_epochs=EPOCHS,
        callbacks=[monitor] if resume else [monitor, save],
        enable_checkpointing=resume is None,
    )
    trainer.fit(made, data(), ckpt_path=resume)
    return {
        "rows": all_rows(federation),
        "model": torch.cat([value.double().flatten() for value in made.state_dict().values()]).numpy(),
        "curves": monitor.curves,
        "ratios": monitor.ratios,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("module", MODULES)
def test_every_joint_step_is_a_place_to_stop(module: str, strategy: str, tmp_path: Path) -> None:
    whole = fit(module, strategy, str(tmp_path))
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(checkpoints) == 8 and len(whole["curves"]) >= 2
    for checkpoint in checkpoints:
        if checkpoint == checkpoints[-1] and strategy == "fedavg":
            del whole["rows"]  # which only the cohort of a round has
        resumed = fit(module, strategy, str(tmp_path), resume=str(checkpoint))
        np.testing.assert_equal({name: resumed[name] for name in whole}, whole, checkpoint.stem)


def test_each_rank_goes_on_with_its_own_sums(tmp_path: Path) -> None:
    whole = run_ranks(2, fit, "diffusion", "gossip", str(tmp_path), 2)
    middle = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)[5]
    resumed = run_ranks(2, fit, "diffusion", "gossip", str(tmp_path), 2, str(middle))
    np.testing.assert_equal(resumed, whole)

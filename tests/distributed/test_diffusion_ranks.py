"""A diffusion module on two gloo ranks: one model and one average on both, that of a single process's gradients."""

from __future__ import annotations

from os import environ
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from federations import silent_trainer
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_ranks
from small_denoisers import LinearNetwork, batches, unet_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed.modules.diffusion import DiffusionTraining

WORLD, BATCH, STEPS = 2, 4, 6


class Given(pl.Callback):
    """The noise of a joint batch is that of its step; a rank takes its half, one process all of it."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        generator = torch.Generator().manual_seed(trainer.global_step)
        level = torch.randn(WORLD * BATCH, generator=generator, dtype=torch.float64)
        noise = torch.randn(WORLD * BATCH, 3, generator=generator, dtype=torch.float64)
        mine = slice(None) if self.rank is None else slice(self.rank * BATCH, (self.rank + 1) * BATCH)
        pl_module.given = level[mine].exp(), noise[mine]


class WithGivenNoise(DiffusionTraining):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sigma, noise = self.given
        return self.loss(batch, sigma, noise).mean()


def flat(module: nn.Module) -> np.ndarray:
    return torch.cat([parameter.detach().double().reshape(-1) for parameter in module.parameters()]).numpy()


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS, WORLD, BATCH, 3, generator=generator, dtype=torch.float64)


def train(strategy: Any, rank: int | None, loader: DataLoader[Any], devices: int = 1) -> DiffusionTraining:
    module = WithGivenNoise(LinearNetwork(), lr=0.05, ema_decay=0.8)
    trainer = silent_trainer(
        strategy, devices, callbacks=[Given(rank)], precision="64-true", max_epochs=2, use_distributed_sampler=False
    )
    trainer.fit(module, loader)
    return module


def on_rank() -> dict[str, Any]:
    rank = int(environ["RANK"])
    loader: Any = DataLoader(data()[:, rank].reshape(-1, 3), BATCH)  # type: ignore[arg-type]
    module = train(DDPStrategy(process_group_backend="gloo"), rank, loader, WORLD)
    average: Any = module.average
    return {"weights": flat(module.denoiser), "average": flat(average.module), "updates": int(average.n_averaged)}


def test_two_ranks_are_one_process() -> None:
    one, other = run_ranks(WORLD, on_rank)
    alone = train("auto", None, DataLoader(data().reshape(-1, 3), WORLD * BATCH))  # type: ignore[arg-type]
    average: Any = alone.average
    for name, expected in (("weights", flat(alone.denoiser)), ("average", flat(average.module))):
        assert (one[name] == other[name]).all()
        assert np.abs(one[name] - expected).max() <= 1e-12
    assert one["updates"] == other["updates"] == int(average.n_averaged) == 2 * STEPS
    assert np.abs(one["weights"] - one["average"]).max() > 1e-3


def unet_on_rank() -> dict[str, Any]:
    """As a user starts it, with Lightning's own sampler and validation."""
    pl.seed_everything(0, verbose=False)
    module = DiffusionTraining(unet_config(), sampling_steps=2)
    trainer = silent_trainer(DDPStrategy(process_group_backend="gloo"), WORLD, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, batches(16), batches(8))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    average: Any = module.average
    return {
        "average": flat(average.module),
        "samples": module.sample(2, seed=0).numpy(),
        "levels": module.last_step["sigma"].numpy(),
        "loss": logged["val/loss"],
        "step": trainer.global_step,
    }


def test_a_unet_on_two_ranks() -> None:
    one, other = run_ranks(WORLD, unet_on_rank)
    assert (one["average"] == other["average"]).all() and (one["samples"] == other["samples"]).all()
    assert one["loss"] == other["loss"] and np.isfinite(one["loss"])
    assert one["step"] == 4
    # Ranks that are seeded alike would have one noise.
    assert (one["levels"] != other["levels"]).all()

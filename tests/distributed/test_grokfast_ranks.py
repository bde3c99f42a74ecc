"""Grokfast on two gloo ranks: replicas stay equal, also when ranks see different things; clients on other ranks."""

from __future__ import annotations

from os import environ
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, FEATURES, Classifier, all_rows, clients, loaders, samples, silent_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_fed import GossipStrategy
from lightning_fed.callbacks import Grokfast

WORLD, BATCH, BATCHES = 2, 4, 7
SAMPLES = WORLD * BATCH * BATCHES


class Net(pl.LightningModule):
    """Deterministic; minibatch ``overflows`` does so on rank 1, where the logged quality is the better one."""

    def __init__(self, overflows: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.overflows = overflows

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("quality", float(self.global_rank), on_step=False, on_epoch=True)
        if batch_idx == self.overflows and self.global_rank == 1:
            steep = sum(parameter.sum() for parameter in self.parameters())
            return loss + 1e37 * (steep - steep.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9, weight_decay=0.01)


def shard(rank: int) -> Subset[Any]:
    """This rank's half of each joint batch of 8."""
    return Subset(samples(SAMPLES), [i for i in range(SAMPLES) if i // BATCH % WORLD == rank])


def flat(module: nn.Module) -> np.ndarray:
    return torch.cat([parameter.detach().double().reshape(-1) for parameter in module.parameters()]).numpy()


def on_rank(grokfast: dict[str, Any], net: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    module, callback, settings = Net(**net), Grokfast(**grokfast), dict(settings)
    if (scale := settings.pop("scale", None)) is not None:
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]
    else:
        settings["precision"] = "64-true"
        module.double()  # Lightning reads a checkpoint's weights before it converts the module
    checkpoint, resume = settings.pop("checkpoint", None), settings.pop("resume", None)
    strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=settings.pop("buckets", False))
    trainer = silent_trainer(strategy, WORLD, callbacks=[callback], use_distributed_sampler=False, **settings)
    trainer.fit(module, DataLoader(shard(int(environ["RANK"])), BATCH), ckpt_path=resume)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    parts = callback.state_dict()["parts"]
    # Tensors would travel through memory that ends with this process.
    slow = {name: part["slow"].numpy() for name, part in parts.items()}
    counts = {part["count"] for part in parts.values()}
    return {"weights": flat(module), "slow": slow, "counts": counts, "is_stopped": callback.is_stopped}


def alone(grokfast: dict[str, Any], **settings: Any) -> np.ndarray:
    """One process with the whole batch of both ranks."""
    module = Net()
    trainer = silent_trainer("auto", callbacks=[Grokfast(**grokfast)], precision="64-true", **settings)
    trainer.fit(module, DataLoader(samples(SAMPLES), WORLD * BATCH))
    return flat(module)


def assert_replicas(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (one["weights"] == other["weights"]).all() and np.isfinite(one["weights"]).all()
    assert one["slow"].keys() == other["slow"].keys()
    assert all((one["slow"][name] == other["slow"][name]).all() for name in one["slow"])
    assert (one["counts"], one["is_stopped"]) == (other["counts"], other["is_stopped"])


@pytest.mark.parametrize(
    ("grokfast", "settings"),
    [
        ({"alpha": 0.9}, {"buckets": True}),
        ({"filter": "ma", "window": 4, "lamb": 5.0}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    ],
    ids=["ema", "ma"],
)
def test_replicas_stay_equal_and_are_those_of_one_process(grokfast: Any, settings: Any) -> None:
    one, other = run_ranks(WORLD, on_rank, grokfast, {}, settings)
    assert_replicas(one, other)
    whole = {name: value for name, value in settings.items() if name != "buckets"}
    assert np.abs(one["weights"] - alone(grokfast, **whole)).max() <= 1e-12


def test_an_overflow_on_one_rank_is_skipped_by_both() -> None:
    one, other = run_ranks(WORLD, on_rank, {"alpha": 0.9}, {"overflows": 2}, {"scale": 1024.0, "max_epochs": 1})
    assert_replicas(one, other)
    assert one["counts"] == {BATCHES - 1}


def test_a_metric_that_differs_between_ranks_ends_it_on_both() -> None:
    watch = {"stop_monitor": "quality", "stop_threshold": 0.5}
    one, other = run_ranks(WORLD, on_rank, watch, {}, {"max_epochs": 2})
    assert_replicas(one, other)
    assert one["is_stopped"] and one["slow"] == {}


def test_the_state_of_rank_zero_resumes_both(tmp_path: Path) -> None:
    path = str(tmp_path / "one.ckpt")
    ma = {"filter": "ma", "window": 5, "lamb": 5.0}
    run_ranks(WORLD, on_rank, ma, {}, {"max_epochs": 1, "checkpoint": path})
    resumed = run_ranks(WORLD, on_rank, ma, {}, {"max_epochs": 2, "resume": path})
    whole = run_ranks(WORLD, on_rank, ma, {}, {"max_epochs": 2})
    assert_replicas(*resumed)
    assert (resumed[0]["weights"] == whole[0]["weights"]).all()


# -------------------------------------------------------------------------------------------------------- federations


def federation(world_size: int, directory: str, resume: str | None, max_epochs: int) -> np.ndarray:
    pl.seed_everything(11, verbose=False)
    strategy = GossipStrategy(num_clients=6, optimizer_state="keep")
    callback = Grokfast("ma", window=4, lamb=2.0)
    trainer = silent_trainer(strategy, world_size, callbacks=[callback], max_epochs=max_epochs)
    trainer.fit(Classifier(momentum=0.9), *loaders(clients(6)), ckpt_path=resume)
    trainer.save_checkpoint(f"{directory}/{max_epochs}.ckpt")
    return all_rows(strategy)


def test_clients_take_their_memory_to_another_rank(tmp_path: Path) -> None:
    """Six clients on two ranks, resumed on one: what one process would have trained in one go."""
    one, other = run_ranks(WORLD, federation, WORLD, str(tmp_path), None, 2)
    resumed = federation(1, str(tmp_path / "resumed"), str(tmp_path / "2.ckpt"), 4)
    whole = federation(1, str(tmp_path / "whole"), None, 4)
    assert (one == other).all()
    np.testing.assert_allclose(resumed, whole, rtol=0, atol=1e-6)
    assert np.abs(one - whole).max() > 1e-3

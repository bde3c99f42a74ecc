"""SAM on two gloo ranks: one ball for all as in one process, a ball for each rank, and steps that go wrong on one."""

from __future__ import annotations

from os import environ
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, FEATURES, all_rows, clients, loaders, samples, silent_trainer
from federations import Classifier as FederatedClassifier
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_fed import FedAvgStrategy
from lightning_fed.callbacks import SharpnessAware

WORLD, BATCH, BATCHES = 2, 4, 7
RHO = 0.1


class Net(pl.LightningModule):
    """Deterministic; evaluation number ``bad`` on rank 1 goes wrong."""

    def __init__(self, bad: int | None = None, overflows: bool = False, leaves_out: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.bad, self.overflows, self.leaves_out, self.evaluations = bad, overflows, leaves_out, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.net[1].eval()  # ranks' statistics differ, and one process's are those of the whole batch
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        is_bad = self.global_rank == 1 and self.evaluations == self.bad
        self.evaluations += 1
        if is_bad and self.leaves_out:
            return None
        if is_bad and self.overflows:
            steep = sum(parameter.sum() for parameter in self.parameters())
            return loss + 1e37 * (steep - steep.detach())
        return loss * torch.nan if is_bad else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9, weight_decay=0.01)


def shard(rank: int) -> Subset[Any]:
    """This rank's half of each joint batch of 8."""
    return Subset(samples(2 * BATCH * BATCHES), [i for i in range(2 * BATCH * BATCHES) if i // BATCH % 2 == rank])


class Looks(pl.Callback):
    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.weights.append(flat(pl_module))


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().reshape(-1) for parameter in module.parameters()])


def on_rank(sam: dict[str, Any], net: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    module, callback, looks = Net(**(net or {})), SharpnessAware(**sam), Looks()
    scale = settings.pop("scale", None)
    if scale is not None:
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]
    else:
        settings["precision"] = "64-true"
    strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=settings.pop("buckets", False))
    trainer = silent_trainer(strategy, WORLD, callbacks=[callback, looks], use_distributed_sampler=False, **settings)
    trainer.fit(module, DataLoader(shard(int(environ["RANK"])), BATCH))
    counts = {"fallbacks": callback.fallbacks, "overflows": callback.overflows, "step": trainer.global_step}
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Tensors would travel through memory that ends with this process.
    history = [weights.numpy() for weights in looks.weights]
    return {"weights": flat(module).numpy(), "history": history, "logged": logged, **counts}


def alone(accumulate: int, clip: float | None) -> Tensor:
    """One process with the whole batch of both ranks."""
    module = Net()
    data = [sample for step in range(BATCHES) for rank in range(2) for sample in batch_of(rank, step)]
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = silent_trainer("auto", callbacks=[SharpnessAware(RHO)], precision="64-true", **settings)
    trainer.fit(module, DataLoader(data, 2 * BATCH))  # type: ignore[arg-type]
    return flat(module)


def batch_of(rank: int, step: int) -> list[Any]:
    return [shard(rank)[i] for i in range(step * BATCH, (step + 1) * BATCH)]


@pytest.mark.parametrize(("accumulate", "clip", "buckets"), [(1, None, False), (3, 0.3, True)])
def test_one_ball_for_all_is_that_of_one_process(accumulate: int, clip: float | None, buckets: bool) -> None:
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "buckets": buckets}
    one, other = run_ranks(WORLD, ranks_with, {"rho": RHO, "m_sharpness": False}, {}, settings)
    assert (one["weights"] == other["weights"]).all()
    assert np.abs(one["weights"] - alone(accumulate, clip).numpy()).max() <= 1e-8
    assert one["logged"].keys() == other["logged"].keys() == {"sam/sharpness", "sam/rho", "sam/fallbacks"}
    assert one["logged"] == other["logged"]


def ranks_with(sam: dict[str, Any], net: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return on_rank(sam, net, **settings)


@pytest.mark.parametrize(("accumulate", "buckets"), [(1, True), (3, False)])
def test_a_ball_for_each_rank_is_m_sharpness(accumulate: int, buckets: bool) -> None:
    settings = {"accumulate_grad_batches": accumulate, "buckets": buckets}
    one, other = run_ranks(WORLD, ranks_with, {"rho": RHO}, {}, settings)
    assert (one["weights"] == other["weights"]).all()
    module = Net().double()
    optimizer, parameters = module.configure_optimizers(), list(module.parameters())
    for _ in range(3):
        for start in range(0, BATCHES, accumulate):
            window = range(start, min(start + accumulate, BATCHES))
            optimizer.zero_grad()
            worst = [worst_gradient(module, rank, window, accumulate) for rank in range(WORLD)]
            for parameter, *both in zip(parameters, *worst):
                parameter.grad = (both[0] + both[1]) / 2
            optimizer.step()
    assert np.abs(one["weights"] - flat(module).numpy()).max() <= 1e-10


def worst_gradient(module: Net, rank: int, window: range, accumulate: int) -> list[Tensor]:
    """The gradient at the worst point of one rank's own ball."""
    parameters = list(module.parameters())

    def gradient() -> list[Tensor]:
        module.net[1].eval()
        losses = []
        for step in window:
            features, labels = zip(*batch_of(rank, step))
            losses.append(nn.functional.cross_entropy(module.net(torch.stack(features).double()), torch.stack(labels)))
        return list(torch.autograd.grad(sum(losses) / accumulate, parameters))

    g = gradient()
    norm = torch.cat([part.reshape(-1) for part in g]).norm()
    start = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, part in zip(parameters, g):
            parameter += RHO * part / norm
    g_s = gradient()
    with torch.no_grad():
        for parameter, before in zip(parameters, start):
            parameter.copy_(before)
    return g_s


@pytest.mark.parametrize(("m_sharpness", "buckets"), [(True, False), (False, False), (False, True)])
def test_a_nan_on_one_rank_makes_all_take_the_plain_gradient(m_sharpness: bool, buckets: bool) -> None:
    sam = {"rho": RHO, "m_sharpness": m_sharpness}
    one, other = run_ranks(WORLD, ranks_with, sam, {"bad": 3}, {"max_epochs": 1, "buckets": buckets})
    assert (one["weights"] == other["weights"]).all() and np.isfinite(one["weights"]).all()
    assert one["fallbacks"] == other["fallbacks"] == 1 == one["logged"]["sam/fallbacks"]


def test_a_loss_that_one_rank_leaves_out_ends_the_fit() -> None:
    """The other one would wait for its gradient for ever."""
    net = {"bad": 3, "leaves_out": True}
    with pytest.raises(AssertionError, match=r"returned None at SAM's perturbed point of step 1: .* Return a NaN loss"):
        run_ranks(WORLD, ranks_with, {"rho": RHO}, net, {"max_epochs": 1})


@pytest.mark.parametrize("m_sharpness", [True, False])
@pytest.mark.parametrize("evaluation", [2, 3])
def test_an_overflow_on_one_rank_makes_all_skip(evaluation: int, m_sharpness: bool) -> None:
    sam, net = {"rho": RHO, "m_sharpness": m_sharpness}, {"bad": evaluation, "overflows": True}
    one, other = run_ranks(WORLD, ranks_with, sam, net, {"max_epochs": 1, "scale": 1024.0})
    assert (one["weights"] == other["weights"]).all() and np.isfinite(one["weights"]).all()
    for result in (one, other):
        assert (result["history"][1] == result["history"][2]).all()
        assert (result["overflows"], result["fallbacks"], result["step"]) == (1, 0, BATCHES)


def test_steps_in_between_are_the_same_on_all_ranks() -> None:
    one, other = run_ranks(WORLD, ranks_with, {"rho": RHO, "every_n_steps": 3}, {}, {})
    assert (one["weights"] == other["weights"]).all()


class CliffOfClients(FederatedClassifier):
    """NaN at the worst point of the first minibatch of the first client of rank 1."""

    evaluations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.evaluations += 1
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_rank == 1 and self.evaluations == 2 else loss


def federation(world_size: int, goes_wrong: bool = False) -> Any:
    pl.seed_everything(5, verbose=False)
    strategy, callback = FedAvgStrategy(num_clients=4), SharpnessAware(0.2, adaptive=True)
    trainer = silent_trainer(strategy, world_size, callbacks=[callback])
    trainer.fit(CliffOfClients() if goes_wrong else FederatedClassifier(), *loaders(clients(4)))
    return all_rows(strategy), callback.fallbacks, float(trainer.callback_metrics["sam/fallbacks"])


def test_a_federations_clients_do_not_depend_on_their_rank() -> None:
    (one, *_), (other, *_) = run_ranks(WORLD, federation, WORLD)
    assert (one == other).all() and np.abs(one - federation(1)[0]).max() <= 1e-6


def test_fallbacks_of_a_federation_are_counted_over_all_ranks() -> None:
    for rows, fallbacks, logged in run_ranks(WORLD, federation, WORLD, True):
        assert np.isfinite(rows).all() and fallbacks == logged == 1

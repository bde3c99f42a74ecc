"""SAM in a Trainer follows a plain loop, and a federation's clients follow it each for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, samples, silent_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from pytorch_optimizer.optimizer.sam import SAM
from sharpness_loop import (
    BATCH,
    BATCHES,
    Looks,
    Net,
    batches,
    distance,
    fit,
    flat,
    plain_sam,
    twins,
    weights,
    windows,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import DFedSAMStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.callbacks import SharpnessAware
from lightning_fed.sharpness import RhoSteps, ascent

# ---------------------------------------------------------------------------------------------------- the trajectory


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])  # ten batches: 3 and 4 leave the last window incomplete
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_trajectory_is_that_of_a_plain_loop(accumulate: int, clip: float | None, adaptive: bool) -> None:
    ours, plain = twins()
    callback = SharpnessAware(0.5 if adaptive else 0.1, adaptive=adaptive)
    settings = {"precision": "64-true", "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = fit(ours, callback, **settings)
    plain_sam(plain, callback.rho, adaptive, accumulate, clip)
    assert trainer.global_step == 2 * -(-BATCHES // accumulate)
    assert distance(ours, plain) <= 1e-10
    assert distance(ours, twins()[0]) > 0.1


def norm_in_float64(param_groups: Any, device: Any = None, weight_adaptive: bool = False) -> Tensor:
    """The library's squared norm, which it rounds to float32 whatever the parameters are."""
    rescaled = [(p.grad, p.abs() if group["adaptive"] else 1) for group in param_groups for p in group["params"]]
    return torch.stack([(g * t).square().sum() for g, t in rescaled]).sum().reshape(1)


@pytest.mark.parametrize(("float64_norm", "bound"), [(True, 1e-10), (False, 1e-7)])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.3), (4, None), (4, 0.3)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_trajectory_is_that_of_pytorch_optimizer(
    adaptive: bool, accumulate: int, clip: float | None, float64_norm: bool, bound: float, monkeypatch: Any
) -> None:
    """Its ASAM has T = |w| on all parameters: no eta, so the module must have no biases."""
    if float64_norm:
        monkeypatch.setattr("pytorch_optimizer.optimizer.sam.get_global_gradient_norm", norm_in_float64)
    ours, theirs = twins(lambda: Net(bias=False))
    rho = 0.4 if adaptive else 0.1
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    fit(ours, SharpnessAware(rho, adaptive=adaptive, eta=0.0), precision="64-true", **settings)
    base = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = SAM(theirs.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, perturb_eps=0.0, **base)
    for window in windows(accumulate):

        def closure(window: list[Any] = window) -> None:
            optimizer.zero_grad()
            for batch in window:
                (theirs.loss(batch) / accumulate).backward()
            if clip is not None:  # which leaves the direction of the first pass as it is
                nn.utils.clip_grad_norm_(theirs.parameters(), clip)

        closure()
        optimizer.step(closure)  # type: ignore[arg-type]
    assert distance(ours, theirs) <= bound


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, float("inf")])
def test_the_step_is_the_steepest_one_of_its_length(p: float) -> None:
    w, g = [torch.randn(5, dtype=torch.float64) for _ in range(2)], [torch.randn(5, dtype=torch.float64), torch.ones(5)]
    g[1] = g[1].double()
    e, flat = torch.cat(ascent(w, g, 0.3, p)), torch.cat(g)
    assert float(torch.linalg.vector_norm(e, p)) == pytest.approx(0.3, rel=1e-12)
    q = 1.0 if p == float("inf") else p / (p - 1)
    assert float(e @ flat) == pytest.approx(0.3 * float(torch.linalg.vector_norm(flat, q)), rel=1e-12)  # Hoelder


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_loss_scaling_leaves_no_trace(scale: float, accumulate: int) -> None:
    """Everything but the scale is float32 here: a power of two comes and goes exactly."""

    class Unscaled(MixedPrecision):
        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    ours, plain = twins(dtype=torch.float32)
    plugin = Unscaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.3}
    fit(ours, SharpnessAware(0.1), plugins=[plugin], **settings)
    fit(plain, SharpnessAware(0.1), **settings)
    assert torch.equal(weights(ours), weights(plain))


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_fp16_is_that_of_a_plain_loop(scale: float, accumulate: int) -> None:
    ours, plain = twins(dtype=torch.float32)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    callback = SharpnessAware(0.1)
    fit(ours, callback, plugins=[plugin], accumulate_grad_batches=accumulate, gradient_clip_val=0.3)
    plain_sam(plain, 0.1, accumulate=accumulate, clip=0.3, loss_scale=scale)
    assert callback.overflows == 0 and distance(ours, plain) <= 1e-6


def test_a_radius_of_zero_is_no_callback_at_all() -> None:
    ours, plain = twins(lambda: Classifier(momentum=0.9), torch.float32)
    fit(ours, SharpnessAware(0.0))
    fit(plain)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values()))


def test_a_schedule_decides_the_radius() -> None:
    ours, plain = twins()
    fit(ours, SharpnessAware(0.9, rho_schedule=RhoSteps([0.1, 0.1], [3])), precision="64-true")
    plain_sam(plain, 0.1)
    assert (weights(ours) - weights(plain)).abs().max() <= 1e-10
    assert [RhoSteps([0.05, 0.1, 0.5], [2, 5])(step) for step in (0, 1, 2, 4, 5)] == [0.05, 0.05, 0.1, 0.1, 0.5]


def test_steps_in_between_use_the_orthogonal_part_again() -> None:
    module, looks = twins()[0], Looks()
    fit(module, SharpnessAware(0.1, every_n_steps=3, reuse=0.7), looks, precision="64-true", max_steps=5)
    plain = twins()[0]
    g_v = torch.empty(0)
    for step, (w, seen) in enumerate(zip(looks.weights, looks.gradients)):

        def gradient(at: Tensor, step: int = step) -> Tensor:
            nn.utils.vector_to_parameters(at, plain.parameters())
            found = torch.autograd.grad(plain.loss(batches()[step]), list(plain.parameters()))
            return torch.cat([g.reshape(-1) for g in found])

        g = gradient(w)
        if step % 3 == 0:
            expected = gradient(w + 0.1 * g / g.norm())
            g_v = expected - (expected @ g) / (g @ g) * g
        else:
            expected = g + 0.7 * g.norm() / g_v.norm() * g_v
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Also between two second passes, where the next steps depend on the last one."""

    def run(ckpt_path: str | None = None, **settings: Any) -> tuple[pl.Trainer, Any]:
        module, callback = twins(dtype=torch.float32)[0], SharpnessAware(0.1, every_n_steps=4)
        trainer = silent_trainer("auto", callbacks=[callback], **settings)
        trainer.fit(module, DataLoader(samples(BATCH * BATCHES), BATCH), ckpt_path=ckpt_path, weights_only=True)
        return trainer, module

    whole = run(max_epochs=2)[1]
    trainer, _ = run(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.equal(weights(run(str(tmp_path / "one.ckpt"), max_epochs=2)[1]), weights(whole))


# ------------------------------------------------------------------------------------------------------ federations


def federation(strategy: Any, *callbacks: pl.Callback, **settings: Any) -> np.ndarray:
    pl.seed_everything(5, verbose=False)
    silent_trainer(strategy, callbacks=list(callbacks), **settings).fit(Classifier(), *loaders(clients(4)))
    return all_rows(strategy)


@pytest.mark.parametrize("adaptive", [False, True])
def test_federated_averaging_with_the_callback_is_fedsam(adaptive: bool) -> None:
    """``x <- sum_i n_i / n (x - lr grad F_i(x + e_i))``, ``e_i = rho t_i^2 g_i / ||t_i g_i||``: a step a round."""
    rho, lr, dataset = 0.2, 0.1, clients(4)
    pl.seed_everything(5, verbose=False)
    module, plain = twins(lambda: Classifier(norm=False, dropout=0.0, lr=lr))
    strategy = FedAvgStrategy(num_clients=4)
    trainer = silent_trainer(strategy, callbacks=[SharpnessAware(rho, adaptive=adaptive)], precision="64-true")
    trainer.fit(module, *loaders(dataset, batch_size=100))

    features, labels = samples(52).tensors
    shards = [(features[indices].double(), labels[indices]) for indices in dataset.client_indices]
    parameters, x = list(plain.parameters()), weights(plain)
    by_size = flat([torch.full_like(w, adaptive and "weight" in name) for name, w in plain.named_parameters()]) == 1

    def gradient(at: Tensor, shard: Any) -> Tensor:
        nn.utils.vector_to_parameters(at, parameters)
        return flat(torch.autograd.grad(nn.functional.cross_entropy(plain(shard[0]), shard[1]), parameters))

    for _ in range(trainer.current_epoch):
        rows = []
        for shard in shards:
            g, t = gradient(x, shard), torch.where(by_size, x.abs() + 0.01, 1.0)
            rows.append(x - lr * gradient(x + rho * t**2 * g / (t * g).norm(), shard))
        x = sum(len(shard[1]) / 52 * row for shard, row in zip(shards, rows))  # type: ignore[assignment]
    assert float((strategy.server_row() - x).abs().max()) <= 1e-12


def test_gossip_with_the_callback_is_dfedsam() -> None:
    rows = federation(GossipStrategy(num_clients=4), SharpnessAware(0.2))
    np.testing.assert_array_equal(rows, federation(DFedSAMStrategy(num_clients=4, rho=0.2)))
    assert np.abs(rows - federation(GossipStrategy(num_clients=4))).max() > 1e-3


def test_a_federation_is_left_as_it_was() -> None:
    strategy = FedAvgStrategy(num_clients=4)
    rows = federation(strategy, SharpnessAware(0.0))
    assert strategy.local_rule is None  # the next fit may have another one
    np.testing.assert_array_equal(rows, federation(FedAvgStrategy(num_clients=4)))


def test_settings_reach_the_clients() -> None:
    start = federation(FedAvgStrategy(num_clients=4), SharpnessAware(0.3))
    for other in (
        SharpnessAware(0.3, adaptive=True),
        SharpnessAware(0.3, p=float("inf")),
        SharpnessAware(0.3, parameters="normalization"),
        SharpnessAware(0.3, rho_schedule=RhoSteps([0.3, 0.1], [3])),
    ):
        assert np.abs(federation(FedAvgStrategy(num_clients=4), other) - start).max() > 1e-4


# ------------------------------------------------------------------------------------------------------ documentation

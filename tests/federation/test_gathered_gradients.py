"""Algorithms that exchange gradients at every step, in the ordinary Lightning loop: precision, hooks, schedulers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, silent_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from lightning_fed import EControlStrategy, GossipStrategy
from lightning_fed.compression import Identity, TopK
from lightning_fed.federation.local_rules import SharpnessAwareRule
from lightning_fed.federation.strategy import FederatedStrategy

STEP = {"local_steps": 1, "rounds_per_epoch": "pass"}


def strategies(num_clients: int) -> dict[str, FederatedStrategy]:
    return {
        "econtrol": EControlStrategy(TopK(0.2), num_clients=num_clients),
        "tracking": GossipStrategy(method="tracking", num_clients=num_clients, **STEP),
        "beer": GossipStrategy(method="beer", compressor=TopK(0.3), num_clients=num_clients, **STEP),
    }


def fit(strategy: FederatedStrategy, module: Classifier, data: Any = None, **settings: Any) -> np.ndarray:
    pl.seed_everything(5, verbose=False)
    trainer = silent_trainer(strategy, **{"max_epochs": 8, **settings})
    trainer.fit(module, *(loaders(clients(3, smallest=40)) if data is None else data))
    return strategy.bank.rows.matrix.float().numpy()


def seeded_classifier() -> Classifier:
    pl.seed_everything(5, verbose=False)
    return Classifier(norm=False, dropout=0)


def fp16() -> MixedPrecision:
    """The Trainer turns 16-mixed into bf16 on a CPU, unless it is given as a plugin."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("name", ["econtrol", "tracking", "beer"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_precisions(name: str, precision: Any) -> None:
    module, strategy = Classifier(), strategies(3)[name]
    rows = fit(strategy, module, **({"plugins": [fp16()]} if precision == "16-mixed" else {"precision": precision}))
    assert np.isfinite(rows).all() and module.trainer.callback_metrics["val/acc"] > 0.5


@pytest.mark.parametrize("name", ["econtrol", "tracking"])
def test_loss_scaling_leaves_no_trace(name: str) -> None:
    """Directions are scaled for the optimizer's unscaling; powers of two come and go exactly, but fp16 rounds."""

    def run(**settings: Any) -> np.ndarray:
        strategy = strategies(3)["tracking"] if name == "tracking" else EControlStrategy(Identity(), num_clients=3)
        return fit(strategy, seeded_classifier(), max_epochs=2, **settings)

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    difference = np.abs(run() - run(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])).max()
    assert 0 < difference < 0.01


def test_an_overflow_is_left_out_by_all_and_lowers_the_one_scale() -> None:
    dataset = clients(2, smallest=8, step=0)
    dataset.dataset.tensors[0][:8] = 1e30  # client 0's gradient overflows at every step
    module = Classifier(norm=False)
    start = torch.cat([parameter.detach().reshape(-1).clone() for parameter in module.parameters()]).numpy()
    strategy = EControlStrategy(TopK(0.2), num_clients=2)
    with pytest.warns(UserWarning, match="not finite, so all clients leave this step out"):
        rows = fit(strategy, module, (DataLoader(dataset, 4),), max_epochs=3, plugins=[fp16()])
    np.testing.assert_array_equal(rows, [start, start])
    scales = [float(strategy.bank.state_of(client)["scaler"][0]) for client in range(2)]
    assert scales[0] == scales[1] < 65536
    assert strategy.round_facts(0).numbers["skipped_steps"] == strategy.round == 6


class HooksCalled(pl.Callback):
    """Counts, and sees what the optimizer is going to use."""

    def __init__(self) -> None:
        self.steps = 0
        self.gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1
        self.gradients.append(torch.cat([parameter.grad.reshape(-1) for parameter in pl_module.parameters()]))


def test_hooks_see_the_estimate_once_a_step() -> None:
    strategy, hooks = EControlStrategy(TopK(0.2), num_clients=3), HooksCalled()
    module = Classifier(norm=False)
    fit(strategy, module, max_epochs=1, callbacks=[hooks])
    assert hooks.steps == strategy.round == module.trainer.global_step == 11
    torch.testing.assert_close(hooks.gradients[-1], strategy._mean.mean, rtol=0, atol=0)


def test_hooks_see_each_clients_tracker() -> None:
    strategy, hooks = strategies(3)["tracking"], HooksCalled()
    fit(strategy, Classifier(norm=False), max_epochs=1, callbacks=[hooks])
    assert hooks.steps == 3 * strategy.round
    torch.testing.assert_close(torch.stack(hooks.gradients[-3:]), strategy._gossip.trackers, rtol=0, atol=0)


class StepSchedule(Classifier):
    """A learning rate that changes at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=22)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_schedulers_may_step_with_the_clients() -> None:
    """Clients that share a rank take the same number of steps here, so a rate by steps has a meaning."""
    module = StepSchedule()
    fit(EControlStrategy(TopK(0.2), num_clients=3), module, max_epochs=2)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_local_rule_changes_each_clients_gradient_before_it_is_sent() -> None:
    def run(rho: float | None) -> np.ndarray:
        rule = None if rho is None else SharpnessAwareRule(rho)
        strategy = EControlStrategy(Identity(), error_feedback="none", num_clients=3, local_rule=rule)
        return fit(strategy, seeded_classifier(), max_epochs=1)

    np.testing.assert_array_equal(run(None), run(0.0))
    assert np.abs(run(None) - run(0.5)).max() > 1e-3


def test_clients_share_one_model_and_one_optimizer_state() -> None:
    strategy = EControlStrategy(TopK(0.2), num_clients=3)
    fit(strategy, Classifier(momentum=0.9), max_epochs=1)
    rows = strategy.bank.rows.matrix
    assert rows.stride(0) == 0 and rows.untyped_storage().nbytes() == strategy.bank.rows.row_bytes
    states = [strategy.bank.optimizer_states(client) for client in range(3)]
    assert states[0] is states[1] is states[2]

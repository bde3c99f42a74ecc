"""What Grokfast keeps: in checkpoints, and for each client of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from grokfast_problem import Looks, Net, fit, net, weights
from torch import Tensor

from lightning_fed import EControlStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.callbacks import Grokfast
from lightning_fed.compression import Identity

# ------------------------------------------------------------------------------------------------------- checkpoints


class AdamNet(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.02)


@pytest.mark.parametrize("filter", ["ema", "ma"])
@pytest.mark.parametrize("make", [Net, AdamNet])
def test_a_resumed_run_goes_on_to_the_bit(filter: Any, make: Any, tmp_path: Path) -> None:
    """After ten steps a ring of seven is in its middle."""

    def run(**settings: Any) -> tuple[pl.Trainer, Net]:
        module = net(make)
        return fit(module, Grokfast(filter, window=7), **settings), module

    trainer, _ = run(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = run(ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)[1]
    assert torch.equal(weights(resumed), weights(run()[1]))


@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_a_state_that_is_read_before_the_module_has_its_dtype(filter: Any) -> None:
    fit(net(), first := Grokfast(filter, window=3), max_epochs=1)
    parts = {
        name: {key: value.double() if isinstance(value, Tensor) else value for key, value in part.items()}
        for name, part in first.state_dict()["parts"].items()
    }
    results = []
    for state in (first.state_dict()["parts"], parts):
        module, callback = net(), Grokfast(filter, window=3)
        copies = {
            name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in p.items()} for name, p in state.items()
        }
        callback.load_state_dict({"is_stopped": False, "parts": copies})
        fit(module, callback)
        results.append(weights(module))
    fit(fresh := net(), Grokfast(filter, window=3))
    assert torch.equal(*results) and not torch.equal(results[0], weights(fresh))


@pytest.mark.gpu
@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_a_state_that_is_read_before_the_module_moves(filter: Any, tmp_path: Path) -> None:
    def run(**settings: Any) -> tuple[pl.Trainer, Net]:
        module = net()
        return fit(module, Grokfast(filter, window=7), accelerator="gpu", **settings), module

    run(max_epochs=1)[0].save_checkpoint(tmp_path / "one.ckpt")
    resumed = run(ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)[1]
    torch.testing.assert_close(weights(resumed), weights(run()[1]))


def test_another_filter_or_window_begins_anew() -> None:
    fit(net(), first := Grokfast("ma", window=3), max_epochs=1)
    for other in (Grokfast(), Grokfast("ma", window=5)):
        fresh = Grokfast(other.filter, window=other.window)
        modules = net(), net()
        other.load_state_dict(first.state_dict())
        for module, callback in zip(modules, (other, fresh)):
            fit(module, callback)
        assert torch.equal(*map(weights, modules))


# -------------------------------------------------------------------------------------------------------- federations


def federated(strategy: Any, *callbacks: pl.Callback, **settings: Any) -> np.ndarray:
    pl.seed_everything(5, verbose=False)
    trainer = silent_trainer(strategy, callbacks=list(callbacks), **settings)
    trainer.fit(Classifier(norm=False, dropout=0.0), *loaders(clients(3)))
    return all_rows(strategy)


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
def test_each_client_filters_its_own_gradients(optimizer_state: Any) -> None:
    before, after = Looks(), Looks()
    strategy = FedAvgStrategy(num_clients=3, local_steps=4, optimizer_state=optimizer_state)
    federated(strategy, before, Grokfast(alpha=0.9, lamb=2.0), after, max_epochs=3)
    assert sorted(before.of) == [0, 1, 2]
    for client, seen in before.of.items():
        for step in range(12):
            first = 0 if optimizer_state == "keep" else step - step % 4
            h = seen[first]
            for g in seen[first : step + 1]:
                h = 0.9 * h + 0.1 * g
            torch.testing.assert_close(after.of[client][step], seen[step] + 2 * h)


def test_a_weight_of_zero_changes_no_federation() -> None:
    plain, ours = (GossipStrategy(num_clients=3, optimizer_state="keep") for _ in range(2))
    assert np.array_equal(federated(plain), federated(ours, Grokfast(lamb=0.0)))


@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_a_resumed_federation_goes_on_to_the_bit(filter: Any, tmp_path: Path) -> None:
    def run(max_epochs: int, **resume: Any) -> tuple[pl.Trainer, np.ndarray]:
        pl.seed_everything(5, verbose=False)
        strategy = GossipStrategy(num_clients=3, optimizer_state="keep")
        callback = Grokfast(filter, window=5, warmup=0)
        trainer = silent_trainer(strategy, callbacks=[callback], max_epochs=max_epochs)
        trainer.fit(Classifier(momentum=0.9), *loaders(clients(3)), **resume)
        return trainer, all_rows(strategy)

    trainer, early = run(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, whole = run(4, ckpt_path=str(tmp_path / "two.ckpt"))[1], run(4)[1]
    assert np.array_equal(resumed, whole) and not np.array_equal(early, whole)


def test_an_algorithms_common_gradient_is_filtered_once() -> None:
    before, after = Looks(), Looks()
    federated(EControlStrategy(Identity(), num_clients=3), before, Grokfast(alpha=0.5, lamb=1.0), after, max_epochs=1)
    (seen,), (filtered,) = before.of.values(), after.of.values()
    h = seen[0]
    for g, ours in zip(seen, filtered):
        h = 0.5 * h + 0.5 * g
        torch.testing.assert_close(ours, g + h)


def test_when_it_ends_clients_forget() -> None:
    strategy = FedAvgStrategy(num_clients=3, optimizer_state="keep")
    federated(strategy, Grokfast(stop_step=2), max_epochs=2)
    memories = [strategy.bank.optimizer_states(client)[0]["grokfast"] for client in range(3)]  # type: ignore[index]
    assert memories == [{}, {}, {}]

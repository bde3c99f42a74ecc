"""Each client's optimizer is its own, also what an optimizer keeps in its parameter groups: its count of steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import timm.optim
import torch
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from pytorch_optimizer import AdEMAMix

from lightning_fed import EControlStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.compression import Identity
from lightning_fed.federation.strategy import FederatedStrategy


class Chosen(Classifier):
    """The classifier with an optimizer of the test's choice."""

    make: Any = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters(), lr=0.01)


class Counts(pl.Callback):
    """How many steps each client has taken, in each round, and what its optimizer says of it at the end of one."""

    def __init__(self) -> None:
        self.done: Counter[tuple[int, int]] = Counter()
        self.counted: dict[tuple[int, int], int] = {}

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self.done[trainer.strategy.round, trainer.strategy.bank.bound] += 1

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        strategy = trainer.strategy
        self.counted[strategy.round, strategy.bank.bound] = int(optimizer.param_groups[0].get("step", 0))


def fit(strategy: FederatedStrategy, make: Any, seed: int = 0, **trainer: Any) -> Counts:
    counts = Counts()
    pl.seed_everything(seed, verbose=False)
    resume = trainer.pop("ckpt_path", None)
    trainer_ = silent_trainer(strategy, max_epochs=3, callbacks=[counts, *trainer.pop("callbacks", [])], **trainer)
    module = Chosen(norm=False)
    module.make = make
    trainer_.fit(module, *loaders(clients(4)), ckpt_path=resume)
    return counts


@pytest.mark.parametrize("make", [AdEMAMix, timm.optim.Lamb])
@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_a_client_counts_its_own_steps(make: Any, policy: Any) -> None:
    counts = fit(FedAvgStrategy(num_clients=4, optimizer_state=policy), make)
    assert len(set(counts.done.values())) > 1  # clients have shards of different sizes
    for (round, client), counted in counts.counted.items():
        earlier = sum(counts.done[before, client] for before in range(round)) if policy == "keep" else 0
        assert counted == earlier + counts.done[round, client] - 1  # read just before the last step of the round


class SaveAfter(pl.Callback):
    """Saves a checkpoint in the middle of the second round."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.strategy.round, trainer.strategy.joint_index) == (1, 2):
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GossipStrategy, {"optimizer_state": "keep"}),
        (EControlStrategy, {"compressor": Identity(), "rounds_per_epoch": 4}),
    ],
)
def test_counts_are_saved_and_resumed(kind: Any, settings: Any, tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole, resumed = kind(num_clients=4, **settings), kind(num_clients=4, **settings)
    if kind is EControlStrategy:
        fit(whole, AdEMAMix, enable_checkpointing=True, callbacks=[pl.callbacks.ModelCheckpoint(tmp_path, "middle")])
    else:
        fit(whole, AdEMAMix, callbacks=[SaveAfter(path)])
    fit(resumed, AdEMAMix, seed=1, ckpt_path=path)
    np.testing.assert_array_equal(all_rows(resumed), all_rows(whole))
    for client in range(4):
        (of_whole,), (of_resumed,) = (strategy.bank.optimizer_states(client) for strategy in (whole, resumed))
        assert str(of_whole["added to param_groups"]) == str(of_resumed["added to param_groups"])


def test_replicas_of_one_model_count_its_steps() -> None:
    strategy = EControlStrategy(Identity(), num_clients=4, rounds_per_epoch=4)
    counts = fit(strategy, AdEMAMix)
    assert strategy.bank.optimizer_states(0)[0]["added to param_groups"] == {0: {"step": 12}}
    assert max(counts.counted.values()) == 11

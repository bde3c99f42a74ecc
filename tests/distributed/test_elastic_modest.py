"""MoDeST between real processes that are killed, stopped and started again: the others finish their fit."""

from __future__ import annotations

import csv
import os
import random
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from elastic_ranks import ElasticRanks
from federations import Classifier, clients, loaders, silent_trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_fed import MoDeSTStrategy, RandomChurn, VirtualClock
from lightning_fed.federation.peer_network import connect_store, store_address

PING, RESTART = 0.5, 3.0
SETTINGS: dict[str, Any] = {
    "sample_size": 6,
    "num_aggregators": 2,
    "success_fraction": 0.8,
    "aggregation_timeout": 2 * PING,
    "min_models": 1,
    "ping_timeout": PING,
    "restart_timeout": RESTART,
    "on_peer_loss": "drop",
}


class Progress(pl.Callback):
    """Writes each epoch's end into the store, where the test reads it; may wait there for a word from the test."""

    def __init__(self, pause_at: int | None) -> None:
        self.rank, self.pause_at = int(os.environ["RANK"]), pause_at
        self.store = connect_store(*store_address(), 30)  # type: ignore[misc]
        self.ends: list[float] = []
        self.trained_in: dict[int, list[int]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy: Any = trainer.strategy
        if batch.is_last_of_round and (clients := strategy.trained_in(batch.round)):
            self.trained_in[batch.round] = sorted(clients)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ends.append(time.monotonic())
        self.store.set(f"epoch/{self.rank}/{trainer.current_epoch}", "")
        if trainer.current_epoch == self.pause_at:
            self.store.wait(["go on"])


def fit(
    num_clients: int,
    epochs: int,
    settings: dict[str, Any],
    directory: str | None = None,
    pause_at: int | None = None,
    patience: int | None = None,
    ckpt_path: str | None = None,
) -> dict[str, Any]:
    """One rank's whole run; what is left of it."""
    pl.seed_everything(1, verbose=False)
    progress = Progress(pause_at)
    callbacks: list[Any] = [progress]
    if patience is not None:
        callbacks.append(EarlyStopping("val/loss", patience=patience, min_delta=1e9))
    if directory is not None:
        callbacks.append(ModelCheckpoint(directory, "{epoch}", monitor="val/acc", mode="max", save_top_k=-1))
    strategy = MoDeSTStrategy(num_clients=num_clients, **settings)
    trainer = silent_trainer(
        strategy,
        devices=int(os.environ["WORLD_SIZE"]),
        max_epochs=epochs,
        callbacks=callbacks,
        logger=CSVLogger(directory, flush_logs_every_n_steps=1) if directory is not None else False,
        enable_checkpointing=directory is not None,
        log_every_n_steps=1,
    )
    module = Classifier()
    train, val = loaders(clients(num_clients, 6, 0))
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    live = strategy._live
    assert live is not None
    fitted = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "model": live.newest[1].numpy(),
        "round": live.newest[0],
        "epochs": trainer.current_epoch,
        "leads": strategy.is_global_zero,
        "trained_in": progress.trained_in,
        "restarts": live.restarts,
        "metrics": fitted,
        "loss": trainer.validate(module, val, verbose=False)[0]["val/loss"],
        "bytes": strategy.exchange.sent_bytes.copy(),
        "longest_wait": max(np.diff(progress.ends)),
    }


def await_leader(ranks: ElasticRanks, leader: int) -> None:
    """Wait until a rank leads, and has logged something."""
    ranks.await_key("lightning_fed/0/leader")
    deadline = time.monotonic() + 20
    while int(ranks.store.get("lightning_fed/0/leader")) != leader:
        assert time.monotonic() < deadline, f"rank {leader} does not lead"
        time.sleep(0.01)
    time.sleep(0.3)


def go_on(ranks: ElasticRanks) -> None:
    ranks.store.set("go on", "")


def test_without_failures_it_is_the_simulated_federation() -> None:
    settings = {**SETTINGS, "success_fraction": 1.0, "restart_timeout": 60.0, "aggregation_timeout": None}
    with ElasticRanks(3, fit, 12, 5, settings) as ranks:
        results = ranks.results()
    pl.seed_everything(1, verbose=False)
    strategy = MoDeSTStrategy(num_clients=12, **{**settings, "on_peer_loss": "raise"})
    trainer, (train, val) = silent_trainer(strategy, max_epochs=5), loaders(clients(12, 6, 0))
    trainer.fit(Classifier(), train, val)
    simulated = torch.cat([strategy.bank.consensus[0], strategy.bank.consensus[1]]).numpy()
    for result in results.values():
        assert result["round"] == 6
        np.testing.assert_allclose(result["model"], simulated, rtol=0, atol=1e-6)
    assert [result["leads"] for _, result in sorted(results.items())] == [True, False, False]
    assert results[0]["metrics"]["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]), abs=1e-6)
    for round, plan in enumerate(strategy.replay(5)):
        trained = sorted(client for result in results.values() for client in result["trained_in"].get(round, []))
        assert trained == sorted(plan.starts)


def test_survivors_of_kills_finish_and_take_over_logs_validation_and_checkpoints(tmp_path: Path) -> None:
    with ElasticRanks(3, fit, 15, 100, SETTINGS, str(tmp_path)) as ranks:
        for victim in (0, 1):
            await_leader(ranks, victim)
            ranks.await_key(f"epoch/{victim}/2")
            ranks.kill(victim)
        results = ranks.results()
    assert list(results) == [2]
    survivor = results[2]
    assert survivor["epochs"] == 100 and survivor["round"] == 101 and survivor["leads"]
    assert np.isfinite(survivor["loss"]) and survivor["metrics"]["val/loss"] == pytest.approx(survivor["loss"])
    assert survivor["longest_wait"] < 2 * RESTART
    assert set(survivor["trained_in"][99]) <= set(range(10, 15))
    logs = sorted((tmp_path / "lightning_logs").glob("*/metrics.csv"))
    assert len(logs) == 3, "one of each leader"
    validated = sorted(int(row["epoch"]) for path in logs for row in csv.DictReader(path.open()) if row.get("val/loss"))
    assert len(validated) == len(set(validated)), "by one rank at a time"
    assert validated[0] == 0 and validated[-1] == 99
    newest = tmp_path / "epoch=99.ckpt"
    module = Classifier.load_from_checkpoint(newest)
    model = torch.cat([parameter.flatten() for parameter in module.parameters()]).detach()
    np.testing.assert_array_equal(model.numpy(), survivor["model"][: len(model)])


def test_a_stopped_rank_is_replaced_and_then_takes_part_again() -> None:
    with ElasticRanks(3, fit, 12, 60, SETTINGS) as ranks:
        ranks.await_key("epoch/1/2")
        ranks.stop(2)
        time.sleep(3 * PING)
        ranks.await_key("epoch/1/8")  # the others go on meanwhile
        reached = max(round for round in range(60) if ranks.store.check([f"epoch/1/{round}"]))
        ranks.resume(2)
        results = ranks.results()
    assert len(results) == 3 and all(result["epochs"] == 60 for result in results.values())
    trained_in = results[2]["trained_in"]
    assert any(round < 4 for round in trained_in) and any(round > reached + 1 for round in trained_in)
    np.testing.assert_array_equal(results[0]["model"], results[2]["model"])


def test_a_rank_that_is_started_again_catches_up_and_trains() -> None:
    with ElasticRanks(3, fit, 12, 60, SETTINGS, None, 20) as ranks:
        ranks.await_key("epoch/1/2")
        ranks.kill(0)
        ranks.await_key("epoch/1/8")
        ranks.restart(0)
        ranks.await_key("epoch/0/8")
        go_on(ranks)
        results = ranks.results()
    assert len(results) == 3 and all(result["epochs"] == 60 for result in results.values())
    assert results[0]["trained_in"], "its clients trained"
    assert min(results[0]["trained_in"]) > 8, "in later rounds than it missed"
    assert not results[0]["leads"] and results[1]["leads"]


def test_local_buffers_do_not_travel() -> None:
    with ElasticRanks(2, fit, 8, 3, {**SETTINGS, "float_buffers": "local"}) as ranks:
        results = ranks.results()
    parameters = sum(parameter.numel() for parameter in Classifier().parameters())
    assert all(result["epochs"] == 3 and len(result["model"]) == parameters for result in results.values())


def test_the_leader_stops_all_ranks_early() -> None:
    with ElasticRanks(2, fit, 8, 500, SETTINGS, None, None, 3) as ranks:
        results = ranks.results()
    assert all(result["epochs"] < 30 for result in results.values())


def test_a_run_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    with ElasticRanks(2, fit, 12, 3, SETTINGS, str(tmp_path)) as ranks:
        first = ranks.results()
    checkpoint = str(tmp_path / "epoch=2.ckpt")
    with ElasticRanks(3, fit, 12, 6, SETTINGS, None, None, None, checkpoint) as ranks:
        second = ranks.results()
    for result in second.values():
        assert result["epochs"] == 6 and result["round"] == 7 and min(result["trained_in"]) >= 3
    assert second[0]["loss"] < first[0]["loss"]
    assert sum(second[0]["bytes"]) > sum(first[0]["bytes"]), "bytes are counted on"


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(3))
def test_four_of_five_ranks_are_killed(repetition: int) -> None:
    """Ten nodes a rank; aggregators and rank 0 among the dead; at three random moments of the protocol."""
    draw = random.Random(repetition)
    victims = draw.sample(range(1, 5), 3)
    victims.insert(draw.randrange(4), 0)
    rounds = sorted(draw.randrange(2, 25) for _ in victims)
    with ElasticRanks(5, fit, 50, 30, {**SETTINGS, "sample_size": 10}) as ranks:
        last = next(rank for rank in range(5) if rank not in victims)
        for victim, round in zip(victims, rounds):
            ranks.await_key(f"epoch/{last}/{round}", 60)
            time.sleep(draw.uniform(0, 0.3))
            ranks.kill(victim)
        results = ranks.results(100)
    assert list(results) == [last]
    assert results[last]["epochs"] == 30 and np.isfinite(results[last]["loss"])
    assert results[last]["longest_wait"] < 2 * RESTART


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("availability", RandomChurn(0.1, 0.1), "availability=.* is for simulations"),
        ("clock", VirtualClock(), "clock=.* is for simulations"),
        ("rounds_per_epoch", 2, "rounds_per_epoch=2 is for simulations"),
        ("evaluate", "both", "evaluate='both' is for simulations"),
    ],
)
def test_settings_of_simulations_are_refused(setting: str, value: Any, message: str) -> None:
    strategy = MoDeSTStrategy(num_clients=4, sample_size=2, on_peer_loss="drop", **{setting: value})
    with pytest.raises(ValueError, match=message):
        silent_trainer(strategy, devices=2).fit(Classifier(), *loaders(clients(4)))

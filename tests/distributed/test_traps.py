"""The traps that Lightning and torch.distributed set for a federation; each test fails without its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, samples, silent_trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from ranks import run_ranks
from torch.utils.data import DataLoader

from lightning_fed import DFedSAMStrategy, FedAvgStrategy, GossipStrategy


def count_broadcasts_while_training() -> int:
    calls = 0
    original = torch.distributed.broadcast

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    class Watch(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            torch.distributed.broadcast = counted

        def on_train_end(self, *args: Any) -> None:
            torch.distributed.broadcast = original

    trainer = silent_trainer(GossipStrategy(num_clients=3), 2, callbacks=[Watch()])
    trainer.fit(Classifier(), *loaders(clients(3, smallest=8, step=8)))
    return calls


def test_no_batch_begins_with_a_broadcast() -> None:
    """Lightning broadcasts at every batch, which pairs with other collectives once ranks have unequal work."""
    assert run_ranks(2, count_broadcasts_while_training) == [0, 0]


def rows_before_and_after_validate() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, float]]]:
    pl.seed_everything(0, verbose=False)
    strategy = GossipStrategy(num_clients=4, evaluate="both")
    trainer = silent_trainer(strategy, 2, max_epochs=2)
    module, (train, val) = Classifier(), loaders(clients(4))
    trainer.fit(module, train, val)
    before = all_rows(strategy)
    first, second = trainer.validate(module, val, verbose=False)[0], trainer.validate(module, val, verbose=False)[0]
    after = all_rows(strategy)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, train, val)
    return before, after, all_rows(strategy), [dict(first), dict(second)]


def test_validate_after_fit_keeps_every_clients_model() -> None:
    """DDP broadcasts rank 0's weights when it is set up to validate."""

    for before, after, continued, (first, second) in run_ranks(2, rows_before_and_after_validate):
        np.testing.assert_array_equal(before, after)
        assert np.abs(before[0] - before[3]).max() > 1e-3
        assert first == second and first["val/acc/clients_min"] < first["val/acc/clients_max"]
        np.testing.assert_array_equal(continued, uninterrupted_rows())


def uninterrupted_rows() -> np.ndarray:
    pl.seed_everything(0, verbose=False)
    strategy = GossipStrategy(num_clients=4, evaluate="both")
    silent_trainer(strategy, 1, max_epochs=3).fit(Classifier(), *loaders(clients(4)))
    return all_rows(strategy)


def save_and_resume(directory: str) -> tuple[np.ndarray, np.ndarray]:
    strategy = GossipStrategy(num_clients=4)
    module, data = Classifier(), loaders(clients(4))
    trainer = silent_trainer(strategy, 2, max_epochs=1)
    trainer.fit(module, *data)
    trainer.save_checkpoint(Path(directory) / "one.ckpt")
    saved = all_rows(strategy)
    resumed = GossipStrategy(num_clients=4)
    restored = []

    class Look(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            restored.append(all_rows(resumed))

    silent_trainer(resumed, 2, max_epochs=2, callbacks=[Look()]).fit(
        Classifier(), *data, ckpt_path=str(Path(directory) / "one.ckpt")
    )
    return saved, restored[0]


def test_a_checkpoint_holds_each_clients_own_row_and_set_up_does_not_overwrite_it(tmp_path: Path) -> None:
    """The initial broadcast comes after a checkpoint is loaded; plain shard writers keep one rank's tensors for all."""
    for saved, restored in run_ranks(2, save_and_resume, str(tmp_path)):
        np.testing.assert_array_equal(saved, restored)
        assert len({row.tobytes() for row in saved}) == 4


class Seen(pl.Callback):
    """Which samples each client was given, and in which round."""

    def __init__(self) -> None:
        self.rounds: list[dict[int, list[int]]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        batch = args[2]
        if batch.index == 0:
            self.rounds.append({})
        for part in batch.parts:
            self.rounds[-1].setdefault(part.client, []).extend(part.batch[0].reshape(-1).tolist())


class Numbers(pl.LightningModule):
    """A module whose data are sample numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch[0].mean()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def numbered(num_clients: int) -> DataLoader[Any]:
    dataset = clients(num_clients)
    dataset.dataset.tensors = (torch.arange(float(len(dataset))).reshape(-1, 1),)
    return DataLoader(dataset, 4, shuffle=True)


def seen_samples(resume: str | None = None) -> list[dict[int, list[int]]]:
    seen = Seen()
    strategy = FedAvgStrategy(num_clients=4, cohort_size=2, seed=5)
    trainer = silent_trainer(strategy, callbacks=[seen], use_distributed_sampler=True)
    trainer.fit(Numbers(), numbered(4), ckpt_path=resume)
    return seen.rounds


def test_clients_keep_their_samples_and_rounds_of_unequal_length_are_whole() -> None:
    """Lightning injects a sampler of its own, and freezes the number of batches of an epoch."""
    shards = clients(4).client_indices
    rounds = seen_samples()
    assert len(rounds) == 3
    for round_ in rounds:
        assert len(round_) == 2
        for client, given in round_.items():
            assert sorted(given) == shards[client].tolist()


def test_an_order_of_the_users_is_kept() -> None:
    """The sampler that Lightning injects for training always shuffles."""
    seen = Seen()
    ordered = DataLoader(numbered(4).dataset, 4, shuffle=False)
    silent_trainer(GossipStrategy(num_clients=4), callbacks=[seen], use_distributed_sampler=True).fit(
        Numbers(), ordered
    )
    for round_ in seen.rounds:
        assert list(round_.values()) == [indices.tolist() for indices in clients(4).client_indices]


def test_a_resumed_run_does_not_replay_the_first_epochs_plan(tmp_path: Path) -> None:
    """Lightning asks for the loader's iterator before it tells the sampler the epoch."""
    whole = seen_samples()
    trainer = silent_trainer(FedAvgStrategy(num_clients=4, cohort_size=2, seed=5), max_epochs=1)
    trainer.fit(Numbers(), numbered(4))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert whole[0] != whole[1] != whole[2]
    assert seen_samples(str(tmp_path / "one.ckpt")) == whole[1:]


def monitored(directory: str) -> tuple[str, float, float]:
    pl.seed_everything(0, verbose=False)
    best = ModelCheckpoint(directory, monitor="val/loss", save_top_k=2)
    stop = EarlyStopping("val/loss", patience=5)
    trainer = silent_trainer(
        GossipStrategy(num_clients=4), 2, max_epochs=4, enable_checkpointing=True, callbacks=[best, stop]
    )
    trainer.fit(Classifier(), *loaders(clients(4)))
    assert best.best_model_score is not None
    return best.best_model_path, float(best.best_model_score), float(trainer.callback_metrics["val/loss"])


def test_ranks_agree_on_monitored_metrics_without_sync_dist(tmp_path: Path) -> None:
    """A rank's own value would freeze "best" at the first epoch: saving needs every rank to have improved."""
    one, other = run_ranks(2, monitored, str(tmp_path))
    assert one == other
    assert "epoch=0" not in one[0]


class RankLocal(Classifier):
    """Logs a value that ranks do not share, where nothing can reduce it."""

    def on_validation_epoch_end(self) -> None:
        self.log("rank", float(self.trainer.global_rank))


def monitor_rank_local_value(directory: str) -> str:
    checkpoint = ModelCheckpoint(directory, monitor="rank")
    trainer = silent_trainer(
        GossipStrategy(num_clients=2), 2, enable_checkpointing=True, callbacks=[checkpoint], num_sanity_val_steps=1
    )
    with pytest.raises(ValueError) as error:
        trainer.fit(RankLocal(), *loaders(clients(2)))
    assert trainer.global_step == 0
    return str(error.value)


def test_a_monitored_value_that_differs_between_ranks_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for message in run_ranks(2, monitor_rank_local_value, str(tmp_path)):
        assert "'rank' differs between ranks ([0.0, 1.0]" in message and "sync_dist=True" in message


@pytest.mark.parametrize("name", ["fedavg", "gossip", "dpsgd", "dfedsam"])
def test_short_names_work_once_the_package_is_imported(name: str) -> None:
    trainer = silent_trainer(name)
    assert type(trainer.strategy).__name__.lower().startswith({"dpsgd": "gossip"}.get(name, name))


class Counting(Classifier):
    """Counts its evaluations, and has statistics and metrics that a second evaluation would disturb."""

    forwards = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return super().forward(features)


def fit_counting(strategy: Any) -> tuple[Counting, float, pl.Trainer]:
    pl.seed_everything(1, verbose=False)
    module = Counting(lr=0.0, dropout=0.5)
    trainer = silent_trainer(strategy, max_epochs=1)
    trainer.fit(module, DataLoader(samples(24), 4))
    return module, float(trainer.callback_metrics["train/acc"]), trainer


def test_the_second_evaluation_of_sam_leaves_no_trace() -> None:
    """With a zero learning rate, SAM and plain gossip must report the same, and see the same statistics."""
    plain, plain_accuracy, plain_trainer = fit_counting(GossipStrategy(num_clients=2))
    sharp, sharp_accuracy, sharp_trainer = fit_counting(DFedSAMStrategy(num_clients=2, rho=0.5))
    assert (plain.forwards, sharp.forwards) == (6, 12)
    assert plain_accuracy == sharp_accuracy
    assert plain_trainer.callback_metrics["train/loss"] == sharp_trainer.callback_metrics["train/loss"]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(sharp.state_dict()[name], value, rtol=0, atol=0)

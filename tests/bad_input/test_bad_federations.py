"""Federations, data and modules that do not fit each other: refused at set-up, before any step, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, samples, silent_trainer
from ranks import run_ranks
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from lightning_fed import DFedSAMStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.topology import GraphFile


def refusal(
    strategy: Any, module: Any = None, data: Any = None, fit: dict[str, Any] | None = None, **trainer: Any
) -> str:
    """The message with which a fit is refused; no step may have been taken."""
    trainer_ = silent_trainer(strategy, **trainer)
    with pytest.raises(ValueError) as error:
        trainer_.fit(module or Classifier(), *(data or loaders(clients(4))), **(fit or {}))
    assert trainer_.global_step == 0
    return str(error.value)


def more_ranks_than_clients() -> str:
    return refusal(GossipStrategy(num_clients=1), devices=2)


def test_more_ranks_than_clients() -> None:
    for message in run_ranks(2, more_ranks_than_clients):
        assert "num_clients=1 is smaller than the 2 hosts" in message and "lower `devices`" in message


def replicas_that_do_not_divide() -> str:
    return refusal(GossipStrategy(ranks_per_client=2), devices=3)


def test_ranks_per_client_that_do_not_divide_the_ranks() -> None:
    for message in run_ranks(3, replicas_that_do_not_divide):
        assert "ranks_per_client=2 does not divide the 3 ranks" in message


def test_another_number_of_clients_than_the_data_has() -> None:
    message = refusal(GossipStrategy(num_clients=5))
    assert "num_clients=5, but the training data is partitioned for 4 clients: set num_clients=4" in message


def test_a_cohort_larger_than_the_federation() -> None:
    assert "size=9 is larger than num_clients=4" in refusal(FedAvgStrategy(num_clients=4, cohort_size=9))


def test_a_client_without_samples() -> None:
    dataset = clients(4)
    dataset.client_indices[2] = np.array([], dtype=np.int64)
    message = refusal(GossipStrategy(num_clients=4), data=loaders(dataset))
    assert "clients [2] have no training sample" in message and "min_samples" in message


def test_a_client_with_less_than_a_batch_when_the_last_batch_is_dropped() -> None:
    message = refusal(GossipStrategy(num_clients=4), data=(DataLoader(clients(4), 12, drop_last=True),))
    assert "clients [0] have fewer samples than one minibatch of 12" in message and "drop_last=False" in message


def test_a_disconnected_topology(tmp_path: Path) -> None:
    (tmp_path / "graph.edgelist").write_text("0 1\n2 3\n")
    message = refusal(GossipStrategy(GraphFile(tmp_path / "graph.edgelist"), num_clients=4))
    assert "connected" in message


def test_a_weight_file_that_is_not_doubly_stochastic(tmp_path: Path) -> None:
    (tmp_path / "graph.edgelist").write_text("0 1 0.9\n1 2 0.9\n2 3 0.1\n")
    message = refusal(GossipStrategy(GraphFile(tmp_path / "graph.edgelist", mixing="file"), num_clients=4))
    assert "doubly stochastic" in message or "negative" in message


def test_a_sampled_cohort_on_a_directed_topology() -> None:
    strategy = GossipStrategy("exponential", num_clients=4, participation=UniformSample(size=2))
    message = refusal(strategy)
    assert "directed topology" in message and "full participation" in message


class StepScheduler(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "step"}]


def test_a_scheduler_that_steps_with_every_batch() -> None:
    message = refusal(GossipStrategy(num_clients=4), StepScheduler())
    assert "StepLR has interval='step'" in message and "interval='epoch'" in message


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(samples(8))


def test_iterable_data() -> None:
    assert "iterable dataset (Stream)" in refusal(GossipStrategy(num_clients=4), data=(DataLoader(Stream(), 4),))


def test_a_sampler_of_the_users() -> None:
    loader = DataLoader(clients(4), 4, sampler=WeightedRandomSampler([1.0] * 10, 10))
    message = refusal(GossipStrategy(num_clients=4), data=(loader,), use_distributed_sampler=False)
    assert "sampler=WeightedRandomSampler" in message


def test_two_training_loaders() -> None:
    loader = loaders(clients(4))[0]
    assert "2 training loaders were given" in refusal(GossipStrategy(num_clients=4), data=([loader, loader],))


def test_a_module_without_trainable_parameters() -> None:
    assert "nothing to federate" in refusal(GossipStrategy(num_clients=4), Classifier().requires_grad_(False))


def test_parameters_of_several_dtypes() -> None:
    module = Classifier()
    module.net[0].double()
    assert "several dtypes" in refusal(GossipStrategy(num_clients=4), module)


def test_sync_batchnorm() -> None:
    assert "sync_batchnorm=True" in refusal(GossipStrategy(num_clients=4), sync_batchnorm=True)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_sam_with_manual_optimization() -> None:
    message = refusal(DFedSAMStrategy(num_clients=4), Manual())
    assert "SharpnessAware" in message and "automatic_optimization=False" in message


def test_accumulation_that_changes_during_the_fit() -> None:
    scheduler = pl.callbacks.GradientAccumulationScheduler({1: 2})
    trainer = silent_trainer(GossipStrategy(num_clients=4), callbacks=[scheduler])
    with pytest.raises(ValueError, match="accumulate_grad_batches changed from 1 to 2"):
        trainer.fit(Classifier(), *loaders(clients(4)))


class RunsClosure(Classifier):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        optimizer.step()


def test_an_optimizer_step_that_runs_the_closure_itself() -> None:
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(closure=closure\) for every batch"):
        silent_trainer(GossipStrategy(num_clients=4)).fit(RunsClosure(), *loaders(clients(4)))


class Thaw(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.requires_grad_(True)


def test_parameters_that_become_trainable_during_the_fit() -> None:
    module = Classifier()
    module.net[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"\['net.0.weight', 'net.0.bias'\] became trainable during the fit"):
        silent_trainer(GossipStrategy(num_clients=4), callbacks=[Thaw()]).fit(module, *loaders(clients(4)))


def test_evaluating_clients_that_do_not_exist() -> None:
    trainer = silent_trainer(GossipStrategy(num_clients=4, evaluate="clients"))
    with pytest.raises(ValueError, match="evaluate='clients' needs the clients' own models"):
        trainer.validate(Classifier(), loaders(clients(4))[1], verbose=False)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    trainer = silent_trainer(GossipStrategy(num_clients=4), max_epochs=1)
    trainer.fit(Classifier(), *loaders(clients(4)))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    return str(tmp_path / "saved.ckpt")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (DFedSAMStrategy(num_clients=4), "algorithm='GossipStrategy', but this run has 'DFedSAMStrategy'"),
        (GossipStrategy(num_clients=3), "num_clients=4, but this run has 3"),
    ],
)
def test_resuming_another_federation(strategy: FederatedStrategy, expected: str, saved: str) -> None:
    message = refusal(strategy, fit={"ckpt_path": saved})
    assert expected in message and "load_from_checkpoint" in message


def test_resuming_with_the_clients_directory_gone(saved: str) -> None:
    for directory in Path(saved).parent.glob("saved.federation-*"):
        directory.rename(directory.with_name("elsewhere"))
    assert "is missing: keep it beside the file" in refusal(GossipStrategy(num_clients=4), fit={"ckpt_path": saved})


def test_resuming_from_a_checkpoint_that_no_federation_saved(tmp_path: Path) -> None:
    trainer = silent_trainer("auto", max_epochs=1)
    trainer.fit(Classifier(), loaders(samples(16))[0])
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    message = refusal(GossipStrategy(num_clients=4), fit={"ckpt_path": str(tmp_path / "plain.ckpt")})
    assert "was not saved by a federated strategy" in message


class Exploding(Classifier):
    """Client 2's loss becomes infinite in round 1."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        strategy = self.trainer.strategy
        explodes = strategy.round == 1 and strategy.bank.bound == 2
        return super().training_step(batch, batch_idx) * (float("inf") if explodes else 1.0)


@pytest.mark.parametrize("strategy", [GossipStrategy, FedAvgStrategy])
def test_a_row_that_is_not_finite_is_named_and_nothing_is_mixed(strategy: Any) -> None:
    strategy = strategy(num_clients=4)
    with pytest.raises(RuntimeError, match=r"clients \[2\] are not finite at the end of round 1.*on_nonfinite='drop'"):
        silent_trainer(strategy).fit(Exploding(), *loaders(clients(4)))
    assert torch.isfinite(strategy.bank.rows.matrix[[0, 1, 3]]).all()


@pytest.mark.parametrize("strategy", [GossipStrategy, FedAvgStrategy])
def test_a_dropped_client_restarts_from_the_others(strategy: Any) -> None:
    strategy = strategy(num_clients=4, on_nonfinite="drop")
    trainer = silent_trainer(strategy)
    trainer.fit(Exploding(), *loaders(clients(4)))
    assert torch.isfinite(strategy.bank.rows.matrix).all()
    assert torch.isfinite(trainer.callback_metrics["val/loss"])

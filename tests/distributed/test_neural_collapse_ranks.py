"""Neural collapse on several ranks: sums over ranks are those of one, and no sample counts twice."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed
from elastic_ranks import ElasticRanks
from federations import CLASSES, Classifier, clients, loaders, samples, silent_trainer
from ranks import run_ranks
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from lightning_fed import FedAvgStrategy, GossipStrategy
from lightning_fed.callbacks import NeuralCollapseMonitor
from lightning_fed.metrics import ClassMoments, NearestCentreAgreement, NeuralCollapse

BATCHES = [1, 40, 300, 7, 64, 5, 95]


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features ``[512, 50]`` of 6 classes, and a classifier."""
    draw: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    labels = torch.arange(512) * 7 % 11 % 6
    means = torch.randn(6, 50, **draw) + 1
    features = means[labels] + 0.3 * torch.randn(512, 50, **draw)
    return features.float(), labels, torch.randn(6, 50, **draw), torch.randn(6, **draw)


def streamed(world_size: int) -> dict[str, float]:
    """Seven uneven batches dealt out to the ranks; with four of them, one has a single batch."""
    rank = 0
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        torch.distributed.all_gather = None  # type: ignore[assignment]  # world x d x d must not be stacked
    features, labels, weight, bias = problem()
    parts = torch.arange(512).split(BATCHES)[rank::world_size]
    metric = NeuralCollapse(6, 50)
    for part in parts:
        metric.update(features[part], labels[part])
    found = {name: float(value) for name, value in metric.compute(weight, bias).items()}
    # After the sum over ranks each goes on with what is its own.
    assert int(metric.counts.sum()) == sum(map(len, parts))
    assert {name: float(value) for name, value in metric.compute(weight, bias).items()} == found
    with metric.sync_context():
        moments = metric.moments()
    nearest = NearestCentreAgreement(moments.means, moments.classes)
    for part in parts:
        nearest.update(features[part], features[part].double() @ weight.T + bias)
    return {**found, "nc4": float(nearest.compute())}


def naive() -> dict[str, float]:
    """Some of the definitions, on all features in float64."""
    features, labels, weight, bias = problem()
    h = features.double()
    mu = torch.stack([h[labels == c].mean(0) for c in range(6)])
    m = mu - mu.mean(0)
    within = (h - mu[labels]).T @ (h - mu[labels]) / len(h)
    wrong = (h @ weight.T + bias).argmax(1) != torch.cdist(h, mu).argmin(1)
    return {
        "nc1": float((within @ torch.linalg.pinv(m.T @ m / 6, hermitian=True)).trace() / 6),
        "nc1_trace": float(within.trace() / (m.square().sum() / 6)),
        "nc3": float((weight / weight.norm() - m / m.norm()).norm()),
        "bias_residual": float((weight @ mu.mean(0) + bias).norm()),
        "nc4": float(wrong.double().mean()),
    }


def test_one_two_and_four_ranks_stream_what_the_definition_gives() -> None:
    alone = streamed(1)
    for name, value in naive().items():
        assert alone[name] == pytest.approx(value, rel=1e-10), name
    for world_size in (2, 4):
        for found in run_ranks(world_size, streamed, world_size):
            assert found == pytest.approx(alone, rel=1e-10)


def a_rank_without_a_sample() -> tuple[float, list[int]]:
    torch.distributed.init_process_group("gloo")
    features, labels, *_ = problem()
    metric = ClassMoments(6, 50)
    if torch.distributed.get_rank() == 0:
        metric.update(features, labels)
    return float(metric.compute().counts.sum()), metric.counts.nonzero()[:, 0].tolist()


def test_a_rank_may_have_no_sample() -> None:
    assert run_ranks(2, a_rank_without_a_sample) == [(512.0, [0, 1, 2, 3, 4, 5]), (512.0, [])]


class Tally(pl.Callback):
    """Remembers how often each sample was part of the monitor's pass."""

    def __init__(self, monitor: NeuralCollapseMonitor) -> None:
        self.monitor = monitor
        monitor.split_batch = self.split
        self.inputs: list[float] = []

    def split(self, batch: Any) -> Any:
        self.inputs += batch[0][:, 0].tolist()
        return batch[0], batch[1]


def trained(strategy: str, data: str, monitored: bool = True) -> dict[str, Any]:
    """Three epochs on 37 training and 37 validation samples, which divide by neither 2 nor the batches."""
    pl.seed_everything(0, verbose=False)
    federated = {"gossip": GossipStrategy, "fedavg": FedAvgStrategy}.get(strategy)
    given = loaders(clients(3)) if federated else loaders(samples(37), 8)
    if strategy == "subset":
        given = DataLoader(samples(60), 8, sampler=SubsetRandomSampler(range(37))), given[1]
    monitor = NeuralCollapseMonitor(data=data, plots=False, every_n_epochs=3)  # type: ignore[arg-type]
    tally = Tally(monitor)
    chosen: Any = federated(num_clients=3) if federated else "ddp"
    trainer = silent_trainer(chosen, 2, callbacks=[monitor] if monitored else [])
    module = Classifier()
    trainer.fit(module, *given)
    return {
        "weights": torch.cat([value.double().flatten() for value in module.state_dict().values()]).tolist(),
        "generator": torch.get_rng_state().tolist(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "inputs": tally.inputs,
    }


def alone(weights: list[float], dataset: TensorDataset) -> float:
    """NC1 of one process."""
    module = Classifier()
    flat, start = torch.tensor(weights, dtype=torch.float64), 0
    for value in module.state_dict().values():
        value.copy_(flat[start : start + value.numel()].reshape(value.shape))
        start += value.numel()
    inputs, labels = dataset.tensors
    with torch.no_grad():
        features = module.eval().net[:-1](inputs)
    metric = NeuralCollapse(CLASSES, 16)
    metric.update(features, labels)
    return float(metric.compute(module.net[-1].weight)["nc1"])


@pytest.mark.parametrize(
    ("strategy", "data"),
    [("ddp", "train"), ("ddp", "val"), ("subset", "train"), ("gossip", "train"), ("fedavg", "val")],
)
def test_two_ranks_count_each_sample_once(strategy: str, data: str) -> None:
    first, second = run_ranks(2, trained, strategy, data)
    size = 36 if strategy == "gossip" else 37
    dataset = samples(size, seed=int(data == "val"))
    if strategy == "subset":
        dataset = TensorDataset(*(tensor[:37] for tensor in samples(60).tensors))
    assert sorted(first["inputs"] + second["inputs"]) == sorted(2 * dataset.tensors[0][:, 0].tolist())  # two passes
    assert first["inputs"] and second["inputs"]
    mine = {name: value for name, value in first["metrics"].items() if name.startswith("nc/")}
    assert mine == {name: value for name, value in second["metrics"].items() if name.startswith("nc/")}
    assert mine["nc/nc1"] == pytest.approx(alone(first["weights"], dataset), rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "gossip"])
def test_training_on_two_ranks_does_not_notice(strategy: str) -> None:
    for plain, monitored in zip(
        run_ranks(2, trained, strategy, "train", False), run_ranks(2, trained, strategy, "train")
    ):
        assert monitored["weights"] == plain["weights"] and monitored["generator"] == plain["generator"]
        assert {n: v for n, v in monitored["metrics"].items() if not n.startswith("nc/")} == plain["metrics"]


class LostEarly(pl.Callback):
    """Rank 1 dies after the first round."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def elastic(monitored: bool) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    monitor = NeuralCollapseMonitor(plots=False)
    strategy = GossipStrategy(num_clients=4, on_peer_loss="drop", ping_timeout=0.5, timeout=30)
    trainer = silent_trainer(strategy, 2, max_epochs=4, callbacks=[LostEarly(), *([monitor] if monitored else [])])
    module = Classifier()
    trainer.fit(module, *loaders(clients(4)))
    weights = torch.cat([value.double().flatten() for value in module.state_dict().values()]).tolist()
    return {"weights": weights, "nc1": [value for _, value in monitor.curves.get("nc1", [])]}


def test_a_rank_may_die_and_the_other_measures_all_samples() -> None:
    found = []
    for monitored in (True, False):
        with ElasticRanks(2, elastic, monitored) as ranks:
            results = ranks.results()
        assert list(results) == [0]
        found.append(results[0])
    assert found[0]["weights"] == found[1]["weights"] and len(found[0]["nc1"]) == 4
    assert found[0]["nc1"][-1] == pytest.approx(alone(found[0]["weights"], clients(4).dataset), rel=1e-4)


def fewer_samples_than_ranks() -> float:
    pl.seed_everything(0, verbose=False)
    inputs = samples(2).tensors[0]
    few = DataLoader(TensorDataset(inputs[:1].repeat(2, 1), torch.tensor([0, 1])), 2)
    trainer = silent_trainer("ddp", 3, callbacks=[NeuralCollapseMonitor(data="val", plots=False)], max_epochs=1)
    trainer.fit(Classifier(), DataLoader(samples(36), 4), few)
    return float(trainer.callback_metrics["nc/nc1_trace"])


def test_more_ranks_than_samples() -> None:
    assert len(set(map(str, run_ranks(3, fewer_samples_than_ranks)))) == 1

"""Settings that only show to be wrong beside a module, data, files or other settings of the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from bad_input.bad_values import refusal
from federations import Classifier, clients, loaders, silent_trainer
from torch import Tensor

from lightning_fed import (
    AvailabilityTrace,
    EControlStrategy,
    FedAvgStrategy,
    GossipStrategy,
    MembershipSchedule,
    MoDeSTStrategy,
    VirtualClock,
)
from lightning_fed.callbacks import (
    DiffusionMonitor,
    FederationMonitor,
    GenerativeMetrics,
    GeometryReport,
    NeuralCollapseMonitor,
    RoundProgressBar,
    SampleGrid,
    SharpnessAware,
)
from lightning_fed.compression import LowRank, TopK
from lightning_fed.topology import ErdosRenyi, GraphFile, RandomRegular, Torus

SMALL: dict[str, Any] = {"sample_size": 2, "min_models": 1, "num_clients": 4}


class Untouched(Classifier):
    """Fails if it is trained."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("a step was taken")


def refused(strategy: Any, callback: pl.Callback | None = None) -> str:
    bar = {"enable_progress_bar": True} if isinstance(callback, RoundProgressBar) else {}
    trainer = silent_trainer(strategy, callbacks=[callback] if callback else [], **bar)
    return refusal(lambda: trainer.fit(Untouched(), *loaders(clients(4))))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: GossipStrategy(GraphFile("nowhere.edgelist"), num_clients=4), ["path='nowhere.edgelist'"]),
        (lambda: GossipStrategy(RandomRegular(4), num_clients=4), ["degree=4", "num_clients=4"]),
        (lambda: GossipStrategy(ErdosRenyi(0.01), num_clients=4), ["probability=0.01", "num_clients=4"]),
        (lambda: GossipStrategy(Torus(rows=3), num_clients=4), ["rows=3", "num_clients=4"]),
        (lambda: FedAvgStrategy(5, num_clients=4), ["size=5", "num_clients=4"]),
        (lambda: FedAvgStrategy(num_clients=4, clock=VirtualClock(devices_csv="nowhere.csv")), ["devices_csv='nowhe"]),
        (lambda: FedAvgStrategy(num_clients=4, clock=VirtualClock(latency_csv="nowhere.csv")), ["latency_csv='nowhe"]),
        (lambda: MoDeSTStrategy(5, num_clients=4), ["sample_size=5", "num_clients=4"]),
        (lambda: MoDeSTStrategy(availability=AvailabilityTrace("nowhere.csv"), **SMALL), ["path", "'nowhere.csv'"]),
        (lambda: MoDeSTStrategy(availability=MembershipSchedule({2: [7]}), **SMALL), ["joins", "[7]", "num_clients=4"]),
        (
            lambda: GossipStrategy("one-peer-exponential", method="choco", compressor=TopK(0.1), num_clients=4),
            ["topology=OnePeerExponential"],
        ),
        (
            lambda: GossipStrategy(method="choco", compressor=LowRank(50), num_clients=4),
            ["rank=50 of LowRank", "net.0.weight"],
        ),
        (lambda: EControlStrategy(LowRank(50), num_clients=4), ["rank=50 of LowRank", "net.0.weight"]),
    ],
)
def test_strategies(make: Callable[[], Any], names: list[str]) -> None:
    message = refused(make())
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("strategy", "make", "names"),
    [
        ("auto", FederationMonitor, ["FederationMonitor", "strategy"]),
        ("auto", RoundProgressBar, ["RoundProgressBar", "strategy"]),
        ("auto", GeometryReport, ["SharpnessMonitor"]),
        ("auto", DiffusionMonitor, ["DiffusionMonitor", "diffusion"]),
        ("auto", SampleGrid, ["SampleGrid", "diffusion"]),
        ("auto", GenerativeMetrics, ["GenerativeMetrics", "diffusion"]),
        ("auto", lambda: NeuralCollapseMonitor(head="nowhere"), ["head", "'nowhere'"]),
        ("auto", lambda: NeuralCollapseMonitor(layers=["nowhere"]), ["layer", "'nowhere'"]),
        ("auto", lambda: SharpnessAware(parameters=["nowhere.*"]), ["parameters=['nowhere.*']"]),
    ],
)
def test_callbacks(strategy: str, make: Callable[[], pl.Callback], names: list[str]) -> None:
    message = refused(strategy, make())
    assert all(name in message for name in names), message

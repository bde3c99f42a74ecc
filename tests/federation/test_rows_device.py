"""Rows in host memory: a client's row is elsewhere while it trains, and nobody sees a difference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, clients, loaders, outcome, silent_trainer
from torch import Tensor, nn

from lightning_fed import DFedSAMStrategy, EControlStrategy, FedAvgStrategy, GossipStrategy, MoDeSTStrategy
from lightning_fed.compression import TopK
from lightning_fed.federation.rows import Rows
from lightning_fed.federation.strategy import FederatedStrategy

N = 4


class Decaying(GossipStrategy):
    """Changes rows before the optimizers step."""

    def directions(self, gradients: Tensor, exchange: Any) -> Tensor | None:
        self.bank.rows.matrix.mul_(0.99)
        return super().directions(gradients, exchange)


Gathering = partial(GossipStrategy, local_steps=1, rounds_per_epoch=2, optimizer_state="keep")
STRATEGIES: dict[str, Callable[..., FederatedStrategy]] = {
    "fedavg": partial(FedAvgStrategy, cohort_size=3, mu=0.1),
    "fedavg-keep": partial(FedAvgStrategy, cohort_size=3, optimizer_state="keep", evaluate="both"),
    "fedadam": partial(FedAvgStrategy, server_optimizer=partial(torch.optim.Adam, lr=0.05)),
    "dpsgd": partial(GossipStrategy, optimizer_state="keep"),
    "local-buffers": partial(GossipStrategy, float_buffers="local", evaluate="clients"),
    "dfedsam": DFedSAMStrategy,
    "choco": partial(GossipStrategy, method="choco", compressor=TopK(0.2)),
    "tracking": partial(Gathering, method="tracking"),
    "decaying": partial(Decaying, local_steps=1, rounds_per_epoch=2, method="tracking"),
    "beer": partial(Gathering, method="beer", compressor=TopK(0.2)),
    "econtrol": partial(EControlStrategy, compressor=TopK(0.2), local_steps=1),
    "econtrol-rounds": partial(EControlStrategy, compressor=TopK(0.2), local_steps=3),
    "modest": partial(MoDeSTStrategy, sample_size=3, num_aggregators=1),
}


def fit(strategy: FederatedStrategy, resume: str | None = None, **settings: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    trainer = silent_trainer(strategy, **settings)
    module = Classifier(momentum=0.9)
    trainer.fit(module, *loaders(clients(N)), ckpt_path=resume)
    exported = torch.cat([value.flatten() for value in module.state_dict().values()]).numpy()
    return {**outcome(strategy, trainer), "exported": exported}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (name, settings)
        for name, make in STRATEGIES.items()
        for settings in ({}, {"val_check_interval": 2}, {"accumulate_grad_batches": 2})
        if not settings or not make(num_clients=N).gathers_gradients  # where a round is one step
    ],
    ids=str,
)
def test_rows_in_host_memory_are_the_same_to_the_bit(name: str, settings: dict[str, Any]) -> None:
    there, here = (fit(STRATEGIES[name](num_clients=N, rows_device=place), **settings) for place in ("cpu", "device"))
    for key in here:
        np.testing.assert_equal(there[key], here[key], err_msg=key)


class Watch(pl.Callback):
    """Sees where the module's parameters are while clients train."""

    def __init__(self) -> None:
        self.addresses: set[int] = set()
        self.clients: set[int | None] = set()

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.addresses.add(next(pl_module.parameters()).data_ptr())
        self.clients.add(trainer.strategy.bank.bound)


def test_all_clients_train_in_one_working_row() -> None:
    watch, strategy = Watch(), GossipStrategy(num_clients=N, rows_device="cpu")
    fit(strategy, callbacks=[watch])
    assert watch.clients == set(range(N)) and len(watch.addresses) == 1
    start, matrix = strategy.bank.rows.matrix.data_ptr(), strategy.bank.rows.matrix
    inside = range(start, start + matrix.untyped_storage().nbytes())
    assert not watch.addresses & set(inside)


@pytest.mark.parametrize("name", ["fedavg-keep", "dpsgd"])
def test_a_checkpoint_in_the_middle_of_a_round_has_what_the_working_row_has(name: str, tmp_path: Path) -> None:
    whole = fit(STRATEGIES[name](num_clients=N, rows_device="cpu"))
    strategy = STRATEGIES[name](num_clients=N, rows_device="cpu")

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            batch = _[2]
            if (batch.round, batch.index) == (1, 1):
                strategy.bank.bind_client(batch.parts[0].client)
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    fit(strategy, callbacks=[Save()])
    for place in ("cpu", "device"):  # the file does not tell where rows were
        resumed = fit(STRATEGIES[name](num_clients=N, rows_device=place), resume=str(tmp_path / "middle.ckpt"))
        np.testing.assert_array_equal(resumed["rows"], whole["rows"])
        np.testing.assert_array_equal(resumed["exported"], whole["exported"])


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows_device='gpu' is not one of \('device', 'cpu'\)"):
        GossipStrategy(rows_device="gpu")


# --------------------------------------------------------------------------------------------------------------- rows


def layer(width: int = 5) -> nn.Linear:
    return nn.Linear(width, 2, bias=False)


def test_the_matrix_knows_what_was_trained_in_the_working_row() -> None:
    module = layer()
    rows = Rows(list(module.parameters()), 3, in_host_memory=True)
    start = rows.gather()
    rows.bind_row(1)
    module.weight.data.add_(1)
    assert torch.equal(rows.matrix, torch.stack([start, start + 1, start]))
    rows.bind_row(2)
    assert torch.equal(module.weight.flatten(), start)
    rows.give_back()
    rows.matrix[2] = 7.0
    module.weight.data.fill_(9)  # which nobody trains any more
    assert torch.equal(rows.matrix[2], torch.full((10,), 7.0))


@pytest.mark.parametrize("in_host_memory", [False, True])
@pytest.mark.parametrize("slots", [[1, 2, 3], [0, 3], [3, 1], [4]], ids=str)
def test_taken_rows_come_back(slots: list[int], in_host_memory: bool) -> None:
    rows = Rows([torch.zeros(21)], 5, in_host_memory=in_host_memory)
    rows.matrix.copy_(torch.arange(5.0).unsqueeze(1))
    taken = rows.take(slots)
    assert torch.equal(taken[:, 0], torch.tensor(slots, dtype=torch.float32))
    is_view = not in_host_memory and slots in ([1, 2, 3], [4])
    assert (taken.untyped_storage().data_ptr() == rows.matrix.untyped_storage().data_ptr()) == is_view
    taken += 10
    expected = torch.arange(5.0).unsqueeze(1).repeat(1, 21)
    expected[slots] += 10
    assert torch.equal(rows.matrix, expected)
    rows.give_back()
    taken += 10
    expected[slots] += 10 * is_view
    assert torch.equal(rows.matrix, expected)


def test_other_rows_take_the_place_of_those_that_were_taken() -> None:
    rows = Rows([torch.zeros(3)], 6, in_host_memory=True)
    rows.take([0, 5]).fill_(1)
    rows.take([1, 2, 3]).fill_(2)
    assert rows.matrix[:, 0].tolist() == [1, 2, 2, 2, 0, 1]


def storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_a_client_costs_its_rows_and_those_of_its_algorithm(place: str) -> None:
    strategy = GossipStrategy(num_clients=40, method="choco", compressor=TopK(0.1), rows_device=place)
    pl.seed_everything(0, verbose=False)
    silent_trainer(strategy, max_epochs=1).fit(Classifier(norm=False), loaders(clients(40, step=0))[0])
    width = strategy.bank.rows.width
    states = strategy.client_matrices()
    assert {name: matrix.dtype for name, matrix in states.items()} == {
        "x public": torch.float32,
        "x pull": torch.float64,
    }
    kept = storage_bytes(strategy.bank.rows.matrix) + sum(map(storage_bytes, states.values()))
    assert kept <= 1.1 * 40 * 4 * width * (1 + 1 + 2)


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_gpu_trains_the_same_from_host_memory(name: str) -> None:
    there, here = (
        fit(STRATEGIES[name](num_clients=N, rows_device=place), accelerator="gpu") for place in ("cpu", "device")
    )
    np.testing.assert_allclose(there["rows"], here["rows"], rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_what_idle_clients_keep_is_in_page_locked_host_memory() -> None:
    strategy = GossipStrategy(num_clients=N, rows_device="cpu", optimizer_state="keep")
    places: list[set[str]] = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            states = [strategy.bank.optimizer_states(client)[0] for client in range(N)]
            kept = [value for state in states for of_one in state.values() for value in of_one.values()]
            places.append({value.device.type for value in kept if isinstance(value, Tensor)})
            assert strategy.bank.rows.matrix.is_pinned()

    fit(strategy, accelerator="gpu", callbacks=[Look()])
    assert places == [{"cpu"}] * 3

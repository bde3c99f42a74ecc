"""The same federations on a GPU."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, silent_trainer

from lightning_fed import DFedSAMStrategy, EControlStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.compression import Compressor, Identity, Layer, LowRank, Quantize, RandK, ScaledSign, TopK
from lightning_fed.federation.exchange import LoopbackExchange
from lightning_fed.federation.layout import Layout

pytestmark = pytest.mark.gpu


def fit(accelerator: str, strategy: Any, **settings: Any) -> np.ndarray:
    pl.seed_everything(5, verbose=False)
    trainer = silent_trainer(strategy, accelerator=accelerator, **settings)
    trainer.fit(Classifier(dropout=0.0, momentum=0.9), *loaders(clients(6)))
    return all_rows(strategy)


@pytest.mark.parametrize("make", [FedAvgStrategy, GossipStrategy, DFedSAMStrategy])
def test_a_gpu_trains_what_a_cpu_trains(make: Any) -> None:
    np.testing.assert_allclose(fit("gpu", make(num_clients=6)), fit("cpu", make(num_clients=6)), rtol=0, atol=1e-4)


class Noisy(pl.LightningModule):
    """Dropout draws from the GPU's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 0.05)])
@pytest.mark.parametrize("rows_device", ["device", "cpu"])
def test_waves_on_a_gpu_train_what_single_clients_train(precision: Any, tolerance: float, rows_device: Any) -> None:
    rows = []
    for clients_per_step in (1, 3):
        pl.seed_everything(5, verbose=False)
        strategy = GossipStrategy(num_clients=6, clients_per_step=clients_per_step, rows_device=rows_device)
        trainer = silent_trainer(strategy, accelerator="gpu", precision=precision)
        trainer.fit(Noisy(), loaders(clients(6))[0])
        rows.append(all_rows(strategy))
    np.testing.assert_allclose(rows[1], rows[0], rtol=0, atol=tolerance)


def compressed(num_clients: int) -> EControlStrategy:
    return EControlStrategy(TopK(0.2), h0="zero", num_clients=num_clients)


def tracking(num_clients: int) -> GossipStrategy:
    return GossipStrategy(method="tracking", local_steps=1, rounds_per_epoch="pass", num_clients=num_clients)


@pytest.mark.parametrize("make", [lambda num_clients: EControlStrategy(Identity(), num_clients=num_clients), tracking])
def test_gradients_meet_on_a_gpu_as_on_a_cpu(make: Any) -> None:
    np.testing.assert_allclose(fit("gpu", make(6)), fit("cpu", make(6)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("make", [Identity, TopK, RandK, ScaledSign, Quantize, LowRank])
def test_a_gpu_packs_what_a_cpu_unpacks(make: Any, scope: Any) -> None:
    arguments: dict[str, Any] = {} if make in (Identity, LowRank) else {"scope": scope}
    if make in (TopK, RandK):
        arguments["ratio"] = 0.1
    layers = [Layer("weight", torch.Size([40, 900])), Layer("bias", torch.Size([40]))]
    rows = torch.randn(3, 36_040, generator=torch.Generator().manual_seed(0))
    on_cpu: Compressor = make(**arguments).bind(layers, rows)
    on_gpu: Compressor = make(**arguments).bind(layers, rows.cuda())
    messages, seeds = on_gpu.pack(rows.cuda(), [1, 2, 3]), [1, 2, 3]
    for row, message, reference, seed in zip(torch.zeros_like(rows), messages, on_cpu.pack(rows, seeds), seeds):
        there, here = row.cuda(), row.clone()
        on_gpu.unpack(message, seed).add_to_(there)
        on_cpu.unpack(reference, seed).add_to_(here)
        # A norm that differs in its last bit may round one of many numbers to the other level.
        assert ((there.cpu() - here).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("make", [DFedSAMStrategy, compressed, tracking])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_reduced_precision(precision: Any, make: Any) -> None:
    strategy = make(num_clients=6)
    pl.seed_everything(5, verbose=False)
    trainer = silent_trainer(strategy, accelerator="gpu", precision=precision, max_epochs=8)
    trainer.fit(Classifier(), *loaders(clients(6, smallest=40)))
    assert strategy.bank.rows.matrix.isfinite().all()
    assert trainer.callback_metrics["val/acc"] > 0.5


def test_mixing_keeps_full_precision_when_training_may_use_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        exchange = LoopbackExchange(Layout(8))
        rows = torch.randn(8, 5000, device="cuda")
        weights = np.full((8, 8), 1 / 8)
        expected = weights @ rows.double().cpu().numpy()
        exchange.mix_(rows, weights)
        np.testing.assert_allclose(rows.cpu().numpy(), expected, rtol=0, atol=1e-6)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_dropout_is_a_function_of_round_and_client() -> None:
    def run() -> np.ndarray:
        strategy = GossipStrategy(num_clients=6)
        pl.seed_everything(5, verbose=False)
        silent_trainer(strategy, accelerator="gpu").fit(Classifier(dropout=0.5), *loaders(clients(6)))
        return all_rows(strategy)

    np.testing.assert_array_equal(run(), run())

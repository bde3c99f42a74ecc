"""A small problem for algorithms' trajectories: in NumPy by hand, and as a user would write it for this package.

What is above the rule knows neither torch nor this package. The order of the minibatches needs nothing but slicing
(``shuffle=False``).

Shapes: N = clients, P = numbers in a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.federation.strategy import FederatedStrategy

CLIENTS = 8
ROUNDS = 20
BATCH = 4
FEATURES, HIDDEN, CLASSES = 5, 7, 3
ETA = 0.3  # the clients' learning rate
SEED = 11
TOLERANCE = 1e-10


def heterogeneous_data() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Clients of 5 to 12 samples (two or three minibatches), each around a centre and with a label skew of its own."""
    draw = np.random.default_rng(3)
    inputs, labels, shards, start = [], [], [], 0
    for client, size in enumerate([5, 7, 8, 9, 10, 11, 12, 6]):
        inputs.append(draw.normal(draw.normal(size=FEATURES), 1.0, size=(size, FEATURES)))
        skew = np.roll([0.7, 0.2, 0.1], client)
        labels.append(draw.choice(CLASSES, size=size, p=skew))
        shards.append(np.arange(start, start + size))
        start += size
    return np.concatenate(inputs), np.concatenate(labels), shards


INPUTS, LABELS, SHARDS = heterogeneous_data()
SIZES = np.array([len(shard) for shard in SHARDS])
START_P = np.random.default_rng(5).normal(0, 0.5, HIDDEN * FEATURES + HIDDEN + CLASSES * HIDDEN + CLASSES)


def gradient(x_P: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of the mean cross-entropy of ``softmax(V tanh(U a + b) + c)``, by hand; ``[P]``."""
    U, b, V, c = np.split(x_P, np.cumsum([HIDDEN * FEATURES, HIDDEN, CLASSES * HIDDEN]))
    U, V = U.reshape(HIDDEN, FEATURES), V.reshape(CLASSES, HIDDEN)
    hidden = np.tanh(inputs @ U.T + b)
    logits = hidden @ V.T + c
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = (odds / odds.sum(axis=1, keepdims=True) - np.eye(CLASSES)[labels]) / len(labels)
    back = (error @ V) * (1 - hidden**2)
    return np.concatenate([(back.T @ inputs).ravel(), back.sum(0), (error.T @ hidden).ravel(), error.sum(0)])


def pass_over_shard(client: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The client's minibatches in the shard's own order, the last one perhaps smaller."""
    cuts = [SHARDS[client][start : start + BATCH] for start in range(0, SIZES[client], BATCH)]
    return [(INPUTS[cut], LABELS[cut]) for cut in cuts]


def local_sgd(x: np.ndarray, minibatches: list, theta: float = 0, rho: float = 0, mu: float = 0) -> np.ndarray:
    """A client's round from ``y = x``: SGD, or with DFedAvgM's heavy ball, DFedSAM's ascent, FedProx's term."""
    y = y_before = x
    for inputs, labels in minibatches:
        g = gradient(y, inputs, labels)
        if rho:
            g = gradient(y + rho * g / np.sqrt(np.sum(g**2)), inputs, labels)
        g = g + mu * (y - x)  # of F(y) + mu/2 ||y - x||^2
        y, y_before = y - ETA * g + theta * (y - y_before), y
    return y


# ------------------------------------------------------------------------------------------------------ the package


class TwoLayers(LightningModule):
    """The same network and loss, as a user would write it."""

    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__()
        self.momentum = momentum
        self.network = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
        nn.utils.vector_to_parameters(torch.tensor(START_P), self.parameters())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0].to(self.dtype)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=ETA, momentum=self.momentum)

    def vector(self) -> np.ndarray:
        return nn.utils.parameters_to_vector(self.parameters()).detach().numpy()


class RecordRows(Callback):
    """Keeps every epoch's rows."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append(trainer.strategy.bank.rows.matrix.numpy().copy())


def loader_of(shards: list[np.ndarray], shuffle: bool = False) -> DataLoader[Any]:
    dataset = TensorDataset(torch.from_numpy(INPUTS), torch.from_numpy(LABELS))
    dataset.client_indices = shards  # type: ignore[attr-defined]
    return DataLoader(dataset, batch_size=BATCH, shuffle=shuffle)


def quiet_trainer(epochs: int = ROUNDS, precision: Any = "64-true", **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def run(strategy: FederatedStrategy, momentum: float = 0.0, epochs: int = ROUNDS) -> tuple[np.ndarray, np.ndarray]:
    """Train; returns all clients' rows after each epoch ``[epochs, N, P]``, and the user's module at the end."""
    module, record = TwoLayers(momentum), RecordRows()
    quiet_trainer(epochs, strategy=strategy, callbacks=[record]).fit(module, loader_of(SHARDS))
    np.testing.assert_array_equal(strategy.bank.rows.matrix.numpy(), record.rows[-1])  # the rows stay after a fit
    return np.stack(record.rows), module.vector()

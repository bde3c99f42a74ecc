"""Clients that each know one digit train one generator of all ten; a client alone learns its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import all_rows, silent_trainer
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import DFedSAMStrategy, FedAvgStrategy
from lightning_fed.data import FederatedDataset
from lightning_fed.modules.diffusion import EDMDenoiser
from lightning_fed.modules.diffusion.consistency_training import ConsistencyTraining


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.change(features)


class DigitNetwork(nn.Module):
    """F(x, time) of 8 x 8 images: two residual blocks, ten times as fast as a U-Net of that size."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-4, -1, 16), persistent=False)
        self.layers = nn.Sequential(nn.Linear(64 + 32, width), Block(width), Block(width), nn.LayerNorm(width))
        self.out = nn.Linear(width, 64)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        phases = time[:, None] * self.frequencies
        features = torch.cat([x.flatten(1), phases.sin().to(x), phases.cos().to(x)], dim=1)
        return self.out(self.layers(features)).view_as(x)


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1, torch.from_numpy(data.target)


def clients_of_one_digit(images: Tensor, labels: Tensor, which: range) -> FederatedDataset:
    return FederatedDataset(TensorDataset(images), [np.flatnonzero(labels.numpy() == digit) for digit in which])


def frechet_distance(some: Tensor, others: Tensor) -> float:
    """``|m - n|^2 + tr(A + B - 2 (A B)^(1/2))`` of means m, n and covariances A, B of pixels."""
    one, two = (images.flatten(1).double().numpy() for images in (some, others))
    a, b = np.cov(one.T), np.cov(two.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root)


def shares(images: Tensor, classifier: LogisticRegression) -> np.ndarray:
    """Which share of the images the classifier takes for each digit, and more likely than not, ``[10]``."""
    probabilities = classifier.predict_proba(images.clamp(-1, 1).flatten(1).numpy())
    return np.bincount(probabilities.argmax(1)[probabilities.max(1) > 0.5], minlength=10) / len(images)


def train(dataset: FederatedDataset, num_clients: int, rounds: int, seed: int) -> ConsistencyTraining:
    torch.manual_seed(seed)
    pairs = {"name": "doubling", "smallest": 10, "largest": 40}
    module = ConsistencyTraining(DigitNetwork(), sigma_data=0.75, sigma_max=10.0, pairs=pairs, lr=2e-3, ema_decay=None)
    strategy = FedAvgStrategy(num_clients=num_clients, local_steps=2, optimizer_state="keep", seed=seed)
    silent_trainer(strategy, max_epochs=rounds).fit(module, DataLoader(dataset, 32, shuffle=True))
    return module


@pytest.mark.slow
def test_the_consensus_covers_all_digits_and_a_client_alone_its_own() -> None:
    images, labels = digits()
    classifier = LogisticRegression(max_iter=2000).fit(images.flatten(1).numpy(), labels.numpy())
    one = train(clients_of_one_digit(images, labels, range(3, 4)), 1, rounds=500, seed=0)
    ten = train(clients_of_one_digit(images, labels, range(10)), 10, rounds=500, seed=0)
    of_one, of_ten = (module.sample(1000, seed=1, shape=(1, 8, 8)) for module in (one, ten))
    assert np.flatnonzero(shares(of_one, classifier) >= 0.025).tolist() == [3]
    assert shares(of_one, classifier)[3] >= 0.9
    assert np.flatnonzero(shares(of_ten, classifier) >= 0.025).tolist() == list(range(10))
    # Noise has classes too, but is no digit.
    assert frechet_distance(of_ten, images) <= 5
    assert frechet_distance(of_one, images) >= 10


class KeepsLevels(ConsistencyTraining):
    """Keeps the levels N(k) that each minibatch of each client was trained with."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.levels: list[int] = []

    def _draw_pairs(self, images: Tensor, resolution: int) -> Any:
        self.levels.append(resolution)
        return super()._draw_pairs(images, resolution)


@pytest.mark.parametrize("algorithm", [FedAvgStrategy, DFedSAMStrategy])
def test_clients_share_the_schedule_and_send_no_teacher(algorithm: Any, tmp_path: Path) -> None:
    images, labels = digits()
    torch.manual_seed(0)
    network, teacher = DigitNetwork(8), EDMDenoiser(DigitNetwork(8), sigma_data=0.75)
    module = KeepsLevels(network, teacher, pairs={"name": "doubling", "smallest": 3, "largest": 24})
    strategy = algorithm(num_clients=3, local_steps=2, seed=0)
    trainer = silent_trainer(strategy, max_epochs=4)
    trainer.fit(module, DataLoader(clients_of_one_digit(images, labels, range(3)), 16, shuffle=True))
    passes = 2 if algorithm is DFedSAMStrategy else 1  # SAM looks at each minibatch twice
    assert module.levels == [n for n in (4, 4, 7, 7, 13, 13, 25, 25) for _ in range(3 * passes)]
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert all_rows(strategy).shape == (3, weights)
    assert module.generator is module.denoiser
    trainer.save_checkpoint(path := tmp_path / "consensus.ckpt")
    again = ConsistencyTraining.load_from_checkpoint(path, network=DigitNetwork(8))
    shape = (1, 8, 8)
    assert torch.equal(again.sample(2, seed=0, shape=shape), module.sample(2, seed=0, shape=shape))

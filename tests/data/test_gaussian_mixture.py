"""The points are those of the mixture, and any network of diffusers takes them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from federations import silent_trainer
from jsonargparse import ArgumentParser

from lightning_fed import FedAvgStrategy
from lightning_fed.data import GaussianMixtureDataModule
from lightning_fed.modules.diffusion import DiffusionTraining
from lightning_fed.partition import IID


@pytest.mark.parametrize(("layout", "modes"), [("ring", 8), ("ring", 3), ("grid", 25)])
def test_each_mode_has_its_share_its_mean_and_its_deviation(layout: Any, modes: int) -> None:
    data = GaussianMixtureDataModule(layout, modes, std=0.05, train_samples=1000 * modes + 1)
    points, labels = data.datasets.train.tensors
    assert points.shape == (1000 * modes + 1, 2, 1, 1) and points.dtype == torch.float32
    assert labels.dtype == torch.int64 and sorted(set(torch.bincount(labels).tolist())) == [1000, 1001]
    assert data.num_classes == modes and data.means.shape == (modes, 2) and data.means.dtype == torch.float32
    assert not torch.equal(labels, torch.arange(len(labels)) % modes) and (labels.diff() != 0).any()  # shuffled
    offsets = (points[:, :, 0, 0] - data.means[labels]).double() / 0.05
    for mode in range(modes):
        mine = offsets[labels == mode]
        assert mine.mean(0).abs().max() < 4 / 1000**0.5
        assert (torch.cov(mine.T) - torch.eye(2)).abs().max() < 4 * (2 / 1000) ** 0.5


def test_a_ring_and_a_grid() -> None:
    ring = GaussianMixtureDataModule("ring", 4, extent=0.5).means
    torch.testing.assert_close(ring, torch.tensor([[0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]]), atol=1e-7, rtol=0)
    grid = GaussianMixtureDataModule("grid", 9, extent=0.5).means
    assert sorted(map(tuple, grid.tolist())) == [(x, y) for x in (-0.5, 0, 0.5) for y in (-0.5, 0, 0.5)]
    assert GaussianMixtureDataModule("grid", 1).means.tolist() == [[0, 0]]


@pytest.mark.parametrize("settings", [{}, {"layout": "grid", "modes": 25}])
def test_by_default_it_fills_the_range_of_images(settings: dict[str, Any]) -> None:
    points = GaussianMixtureDataModule(**settings).datasets.train.tensors[0]
    assert points.abs().max() < 1
    torch.testing.assert_close(points.std(dim=0).flatten(), torch.full((2,), 0.5), atol=0.01, rtol=0)


def test_by_default_a_client_is_a_mode_and_others_can_be_asked_for() -> None:
    counts = GaussianMixtureDataModule(num_clients=8, train_samples=800).label_counts
    assert sorted(counts.tolist()) == sorted((100 * np.eye(8, dtype=int)).tolist())
    assert GaussianMixtureDataModule(num_clients=2, train_samples=800, partitioner=IID()).label_counts.min() > 10


def test_the_seed_draws_other_points_and_the_parts_differ() -> None:
    first, again, other = (GaussianMixtureDataModule(seed=seed).datasets for seed in (0, 0, 1))
    assert torch.equal(first.train.tensors[0], again.train.tensors[0])
    assert not torch.equal(first.train.tensors[0], other.train.tensors[0])
    assert not torch.equal(first.val.tensors[0], first.test.tensors[0])
    assert len(first.val) == len(first.test) == 2048


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "grid", "modes": 8}, "modes=8 .* square number"),
        ({"train_samples": 7}, "train_samples=7"),
        ({"eval_samples": 7}, "eval_samples=7"),
        ({"num_clients": 0}, "num_clients=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixtureDataModule(**settings)


def test_it_is_made_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GaussianMixtureDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": {"layout": "grid", "modes": 9, "std": 0.1}})).data
    assert len(data.means) == 9 and data.std == 0.1


@pytest.mark.parametrize("strategy", ["auto", FedAvgStrategy])
def test_a_network_of_diffusers_trains_on_it(strategy: Any) -> None:
    pl.seed_everything(0, verbose=False)
    network = UNet2DModel(
        sample_size=1, in_channels=2, out_channels=2, block_out_channels=(16,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, add_attention=False,
    )  # fmt: skip
    module = DiffusionTraining(network, ema_decay=None)
    federated = strategy if strategy == "auto" else strategy(num_clients=4)
    trainer = silent_trainer(federated, max_epochs=1, limit_train_batches=20)
    trainer.fit(module, datamodule=GaussianMixtureDataModule(modes=4, num_clients=4, batch_size=64, train_samples=512))
    assert 0 < float(trainer.callback_metrics["val/loss"]) < 1.0  # 1 is the loss of a network that gives zeros
    assert module.sample(5, seed=0).shape == (5, 2, 1, 1)

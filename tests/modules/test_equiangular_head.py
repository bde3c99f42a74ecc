"""The fixed simplex classifier: its geometry, what trains, and where it can stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from federations import CLASSES, FEATURES, Classifier, clients, loaders, samples, silent_trainer
from torch import Tensor, nn

from lightning_fed import GossipStrategy
from lightning_fed.callbacks import NeuralCollapseMonitor
from lightning_fed.metrics import NeuralCollapse
from lightning_fed.modules import EquiangularHead, ImageClassifier
from lightning_fed.modules.equiangular_head import simplex_etf


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_prototypes_are_a_simplex(num_classes: int) -> None:
    cosines = simplex_etf(num_classes) @ simplex_etf(num_classes).T
    expected = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-12)
    metric = NeuralCollapse(num_classes, num_classes)
    metric.update(simplex_etf(num_classes), torch.arange(num_classes))
    assert float(metric.compute()["nc2_etf"]) < 1e-12


def test_the_seed_decides_the_prototypes_and_nothing_else_does() -> None:
    first = EquiangularHead(7, 5, seed=3)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(simplex_etf(5, 3).float(), first.prototypes.weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(EquiangularHead(7, 5, seed=4).prototypes.weight, first.prototypes.weight)


def test_logits_are_scaled_cosines() -> None:
    head = EquiangularHead(7, 5, scale=4.0).double()
    features = torch.randn(3, 7, dtype=torch.float64)
    projected = features @ head.projection.weight.T
    expected = 4 * nn.functional.cosine_similarity(projected[:, None], head.prototypes.weight, dim=2)
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head(100 * features), expected)
    assert head(torch.zeros(2, 6, 7, dtype=torch.float64)).shape == (2, 6, 5)  # a zero feature gives no NaN
    assert not head(torch.zeros(1, 7, dtype=torch.float64)).isnan().any()


def test_projection_and_scale_train_and_the_prototypes_do_not() -> None:
    head = EquiangularHead(FEATURES, CLASSES)
    assert {name for name, _ in head.named_parameters()} == {"projection.weight", "prototypes.scale"}
    inputs, labels = samples(200).tensors
    before, optimizer = head.prototypes.weight.clone(), torch.optim.SGD(head.parameters(), lr=0.5)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(head(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(head.prototypes.weight, before) and losses[-1] < 0.6 * losses[0]
    assert float(head.prototypes.scale.detach()) > 1.5


def test_a_checkpoint_brings_its_own_prototypes(tmp_path: Path) -> None:
    saved, loaded = EquiangularHead(7, 5, seed=1), EquiangularHead(7, 5, seed=2)
    torch.save(saved.state_dict(), tmp_path / "head.pt")
    loaded.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    features = torch.randn(3, 7)
    assert torch.equal(saved(features), loaded(features))
    with pytest.raises(ValueError, match=r"prototypes have shape \[5, 5\], but num_classes=6"):
        EquiangularHead(7, 6).prototypes.set_extra_state(saved.prototypes.get_extra_state())


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("resnet10t", "fc"), ("mobilenetv3_small_050", "classifier"), ("vit_tiny_patch16_224", "head")],
)
def test_it_stands_where_a_timm_model_has_its_classifier(name: str, attribute: str) -> None:
    size: dict[str, Any] = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, num_classes=0, **size)
    width = getattr(model, "head_hidden_size", None) or model.num_features
    setattr(model, attribute, EquiangularHead(width, 10))
    assert model.get_classifier() is getattr(model, attribute)
    images = torch.randn(2, 3, 32, 32)
    logits = ImageClassifier(model).eval()(images)
    assert logits.shape == (2, 10) and logits.abs().max() <= 1
    logits.sum().backward()
    assert all(value.grad is not None for value in model.parameters())
    assert model.get_classifier().to(torch.bfloat16).prototypes.weight.dtype == torch.bfloat16


class Fixed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = EquiangularHead(16, CLASSES)


def test_clients_do_not_send_the_prototypes_and_keep_them_bit_by_bit(tmp_path: Path) -> None:
    strategy, module = GossipStrategy(num_clients=6), Fixed()
    before = module.net[-1].prototypes.weight.clone()
    monitor = NeuralCollapseMonitor(plots=False)
    trainer = silent_trainer(strategy, callbacks=[monitor], max_epochs=6)
    trainer.fit(module, *loaders(clients(6)))
    assert torch.equal(module.net[-1].prototypes.weight, before)
    trainable = sum(value.numel() for value in module.parameters())
    assert strategy.exchange.total_bytes == 6 * 6 * 2 * 4 * (trainable + 2 * 16)  # and BatchNorm's statistics
    # The monitor finds the prototypes by itself: they yield the logits.
    assert monitor.curves["nc2_weight_etf"][-1][1] < 1e-6 and 0 < monitor.curves["nc3"][-1][1] < 1.5
    trainer.save_checkpoint(tmp_path / "fixed.ckpt")
    loaded = Fixed.load_from_checkpoint(tmp_path / "fixed.ckpt")
    inputs: Tensor = samples(5).tensors[0]
    assert torch.equal(loaded.eval()(inputs), module.eval()(inputs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_features": 0}, "num_features=0 must be at least 1"),
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"scale": 0.0}, r"scale=0.0 must be in \(0, inf\)"),
    ],
)
def test_bad_sizes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EquiangularHead(**{"num_features": 7, "num_classes": 5, **settings})

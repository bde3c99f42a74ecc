"""Perp-grad against its equation, in a Trainer and for each client of a federation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, FEATURES, Classifier, clients, loaders, samples, silent_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import FedAvgStrategy
from lightning_fed.callbacks import Grokfast, OrthogonalGradient, SharpnessAware
from lightning_fed.callbacks.orthogonal_gradient import orthogonal_part

BATCH, BATCHES = 6, 10


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([1.5]))
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.temperature * self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)


class Looks(pl.Callback):
    """Weights and gradients before the callbacks after it."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])
        self.gradients.append([p.grad.clone() for p in pl_module.parameters()])

    @property
    def vectors(self) -> list[Tensor]:
        return [torch.cat([g.reshape(-1) for g in gradients]) for gradients in self.gradients]


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> None:
    pl.seed_everything(5, verbose=False)
    trainer = silent_trainer("auto", **{"max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, DataLoader(samples(BATCH * BATCHES), BATCH))


def equation(w: np.ndarray, g: np.ndarray, rescale: bool) -> np.ndarray:
    """The card: by tensor, g - <w, g> / <w, w> w, then the norm of g."""
    g_perp = g - (w * g).sum() / (w * w).sum() * w
    return g_perp * np.linalg.norm(g) / np.linalg.norm(g_perp) if rescale else g_perp


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_gradient_is_that_of_the_equation(rescale: bool, accumulate: int) -> None:
    before, after, module = Looks(), Looks(), Net()
    callbacks = [before, OrthogonalGradient(rescale), after]
    fit(module, *callbacks, precision="64-true", accumulate_grad_batches=accumulate)
    assert next(name for name, _ in module.named_parameters()) == "temperature"
    for ws, gs, found in zip(before.weights, before.gradients, after.gradients):
        assert torch.equal(found[0], gs[0]) and gs[0] != 0  # one number keeps its gradient
        for w, g, ours in zip(ws[1:], gs[1:], found[1:]):
            np.testing.assert_allclose(ours, equation(w.numpy(), g.numpy(), rescale), rtol=0, atol=1e-12)
            assert abs(float((w * ours).sum())) < 1e-12 < abs(float((w * g).sum()))


def test_where_there_is_no_direction() -> None:
    w = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for rescale in (False, True):
        assert torch.equal(orthogonal_part(torch.zeros_like(w), g, rescale), g)
        assert torch.equal(orthogonal_part(w, torch.zeros_like(w), rescale), torch.zeros_like(w))
    assert torch.equal(orthogonal_part(w, 3 * w), torch.zeros_like(w))  # what is left is rounding


def test_the_order_of_callbacks_and_clipping() -> None:
    class Clipped(Net):
        norms: list[float] = []

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **settings: Any) -> None:
            self.norms.append(float(torch.cat([p.grad.reshape(-1) for p in self.parameters()]).norm()))
            super().configure_gradient_clipping(optimizer, *args, **settings)

    sam, projected, filtered = Looks(), Looks(), Looks()
    callbacks = [SharpnessAware(0.2), sam, OrthogonalGradient(), projected, Grokfast(lamb=3.0), filtered]
    module = Clipped()
    fit(module, *callbacks, gradient_clip_val=0.1, precision="64-true")
    assert not torch.equal(sam.vectors[0], projected.vectors[0])
    torch.testing.assert_close(filtered.vectors[0], 4 * projected.vectors[0])
    assert module.norms == pytest.approx([float(g.norm()) for g in filtered.vectors])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [Grokfast(), OrthogonalGradient()],
            r"\[Grokfast, OrthogonalGradient\] .* be \[OrthogonalGradient, Grokfast\]",
        ),
        ([OrthogonalGradient(), SharpnessAware()], r"must be \[SharpnessAware, OrthogonalGradient\]"),
        ([OrthogonalGradient(), OrthogonalGradient(False)], "the Trainer has two OrthogonalGradient callbacks"),
    ],
)
def test_callbacks_that_do_not_fit_each_other(callbacks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Net(), *callbacks)


def test_an_overflow_is_left_to_the_scaler() -> None:
    class Overflows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            steep = sum(parameter.sum() for parameter in self.parameters())
            return loss + 1e37 * (steep - steep.detach()) if batch_idx == 2 else loss

    looks, module, scaler = Looks(), Overflows(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, OrthogonalGradient(), looks, max_epochs=1, plugins=[plugin])
    unmoved = [all(map(torch.equal, one, other)) for one, other in zip(looks.weights[2:], looks.weights[3:])]
    assert unmoved == [True] + [False] * 6 and scaler.get_scale() == 512


def test_a_federations_clients_are_projected_one_by_one() -> None:
    strategy, cosines = FedAvgStrategy(num_clients=4), {}

    class Check(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            w, g = pl_module.net[0].weight.detach(), pl_module.net[0].weight.grad
            cosines.setdefault(strategy.bank.bound, []).append(float((w * g).sum().abs() / (w.norm() * g.norm())))

    trainer = silent_trainer(strategy, callbacks=[OrthogonalGradient(), Check()], max_epochs=1)
    trainer.fit(Classifier(), *loaders(clients(4)))
    assert sorted(cosines) == [0, 1, 2, 3] and max(map(max, cosines.values())) < 1e-5

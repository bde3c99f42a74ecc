"""What SAM in a Trainer is compared with: the two papers' equations in a plain loop, and a network to run both on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from federations import CLASSES, FEATURES, samples, silent_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCH, BATCHES = 6, 10


class Net(pl.LightningModule):
    """A smooth network whose step is deterministic."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8, bias), nn.Tanh(), nn.Linear(8, CLASSES, bias))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9, weight_decay=0.01)


class Looks(pl.Callback):
    """What the optimizer is going to see, of callbacks before this one."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.reshape(-1) for p in pl_module.parameters()]).clone())
        self.weights.append(weights(pl_module))


def batches(dtype: torch.dtype = torch.float64) -> list[Any]:
    return [(features.to(dtype), labels) for features, labels in DataLoader(samples(BATCH * BATCHES), BATCH)]


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """Two epochs unless told otherwise."""
    pl.seed_everything(5, verbose=False)
    trainer = silent_trainer(**{"strategy": "auto", "max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, DataLoader(samples(BATCH * BATCHES), BATCH))
    return trainer


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().reshape(-1) for parameter in module.parameters()])


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two modules' weights."""
    return float((weights(one) - weights(other)).abs().max())


def twins(make: Callable[[], Any] = Net, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Two equal modules."""
    torch.manual_seed(0)
    one = make().to(dtype)
    torch.manual_seed(0)
    return one, make().to(dtype)


def windows(accumulate: int, dtype: torch.dtype = torch.float64) -> list[list[Any]]:
    """The minibatches of two epochs, by optimizer step; the last ones of an epoch may be fewer."""
    data = batches(dtype)
    return 2 * [data[start : start + accumulate] for start in range(0, len(data), accumulate)]


def plain_sam(
    module: Net,
    rho: float,
    adaptive: bool = False,
    accumulate: int = 1,
    clip: float | None = None,
    loss_scale: float | None = None,
) -> None:
    """The two papers' equations on the gradient as one vector; ASAM's T is 1 on biases. A loss scale means fp16."""
    optimizer, named = module.configure_optimizers(), list(module.named_parameters())
    parameters, scale = [parameter for _, parameter in named], loss_scale or 1.0

    def gradient(window: list[Any]) -> Tensor:
        total = torch.zeros(())
        for batch in window:
            with torch.autocast("cpu", torch.float16, enabled=loss_scale is not None):
                loss = module.loss(batch) / accumulate  # also if the window is not full
            total = total + flat(torch.autograd.grad(loss * scale, parameters))
        return total / scale

    for window in windows(accumulate, parameters[0].dtype):
        w = flat(parameters).clone()
        size = flat([p.abs() + 0.01 if "weight" in name else torch.ones_like(p) for name, p in named])
        t = size if adaptive else torch.ones_like(w)
        g = gradient(window)
        nn.utils.vector_to_parameters(w + rho * t**2 * g / (t * g).norm(), parameters)
        g_s = gradient(window)
        nn.utils.vector_to_parameters(w, parameters)
        if clip is not None:
            g_s = g_s * min(1.0, clip / (float(g_s.norm()) + 1e-6))
        for parameter, part in zip(parameters, g_s.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)
        optimizer.step()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

"""Grokfast against a NumPy transcription of the paper's code, in the Trainer; when it is on; refusals."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import samples, silent_trainer
from grokfast_problem import BATCH, BATCHES, Looks, Net, fit, net, weights
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import FedAvgStrategy
from lightning_fed.callbacks import Grokfast, SharpnessAware

Arrays = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------------------- the equations


def gradfilter_ema(g: Arrays, h: Arrays, alpha: float, lamb: float) -> None:
    """The card: h_0 is the first gradient; h <- alpha h + (1 - alpha) g, g <- g + lamb h."""
    if not h:
        h.update({name: g[name].copy() for name in g})
    for name in g:
        h[name] = h[name] * alpha + g[name] * (1 - alpha)
        g[name] = g[name] + h[name] * lamb


def gradfilter_ma(g: Arrays, queues: dict[str, Any], window: int, lamb: float, warmup: int) -> None:
    """The card: a queue of the last gradients; nothing until it is full (``warmup`` gradients), then their mean."""
    if not queues:
        queues.update({name: deque(maxlen=window) for name in g})
    for name in g:
        queues[name].append(g[name].copy())
        if len(queues[name]) >= min(warmup, window):
            g[name] = g[name] + sum(queues[name]) / len(queues[name]) * lamb


def numpy_loop(
    w: Arrays, filter: Callable[[Arrays, Any], None], accumulate: int, clip: float | None, epochs: int
) -> Arrays:
    """The whole training of :class:`Net` by hand: backpropagation, filter, clipping, SGD with momentum and L2."""
    data = [(x.double().numpy(), y.numpy()) for x, y in DataLoader(samples(BATCH * BATCHES), BATCH)]
    memory: Any = {}
    momentum = {name: np.zeros_like(value) for name, value in w.items()}
    for _ in range(epochs):
        for start in range(0, BATCHES, accumulate):
            g = {name: np.zeros_like(value) for name, value in w.items()}
            for x, y in data[start : start + accumulate]:
                hidden = np.tanh(x @ w["net.0.weight"].T + w["net.0.bias"])
                logits = hidden @ w["net.2.weight"].T + w["net.2.bias"]
                p = np.exp(logits - logits.max(axis=1, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
                p[np.arange(len(y)), y] -= 1
                p /= len(y) * accumulate  # also if the window is not full
                back = (p @ w["net.2.weight"]) * (1 - hidden**2)
                g["net.0.weight"] += back.T @ x
                g["net.0.bias"] += back.sum(axis=0)
                g["net.2.weight"] += p.T @ hidden
                g["net.2.bias"] += p.sum(axis=0)
            filter(g, memory)
            norm = np.sqrt(sum((value**2).sum() for value in g.values()))
            factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
            for name in w:
                momentum[name] = 0.9 * momentum[name] + factor * g[name] + 0.01 * w[name]
                w[name] = w[name] - 0.2 * momentum[name]
    return w


@pytest.mark.parametrize("accumulate", [1, 2, 3])  # ten batches: three leave the last window incomplete
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    ("settings", "filter"),
    [
        ({"alpha": 0.9, "lamb": 2.0}, lambda g, h: gradfilter_ema(g, h, 0.9, 2.0)),
        ({"filter": "ma", "window": 4, "lamb": 5.0}, lambda g, h: gradfilter_ma(g, h, 4, 5.0, 4)),
        ({"filter": "ma", "window": 4, "lamb": 5.0, "warmup": 0}, lambda g, h: gradfilter_ma(g, h, 4, 5.0, 0)),
    ],
    ids=["ema", "ma", "ma-at-once"],
)
def test_the_trajectory_is_that_of_the_card(settings: Any, filter: Any, clip: float | None, accumulate: int) -> None:
    ours, looks = net().double(), Looks()
    start = weights(ours)
    w = {name: value.detach().numpy().copy() for name, value in ours.named_parameters()}
    expected = numpy_loop(w, filter, accumulate, clip, epochs=2)
    trainer = fit(
        ours,
        Grokfast(**settings),
        looks,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    assert trainer.global_step == 2 * -(-BATCHES // accumulate)
    if clip is not None:  # what is clipped is the filtered gradient, and it is longer than that
        assert max(float(g.norm()) for g in looks.gradients) > clip
    error = np.abs(weights(ours).numpy() - np.concatenate([value.ravel() for value in expected.values()])).max()
    assert error <= 1e-12 and (weights(ours) - start).abs().max() > 0.1


def test_a_filter_without_memory_is_a_longer_gradient() -> None:
    before, after = Looks(), Looks()
    fit(net(), before, Grokfast(alpha=0.0, lamb=2.0), after, precision="64-true")
    torch.testing.assert_close(torch.stack(after.gradients), 3 * torch.stack(before.gradients), rtol=1e-15, atol=0)


@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_a_weight_of_zero_is_no_callback_at_all(filter: Any) -> None:
    ours, plain = net(), net()
    fit(ours, Grokfast(filter, lamb=0.0, window=3))
    fit(plain)
    assert torch.equal(weights(ours), weights(plain))


def test_the_running_sum_does_not_drift() -> None:
    callback, memory = Grokfast("ma", window=4, lamb=1.0), {}
    generator = torch.Generator().manual_seed(0)
    history = []
    for step in range(2001):
        g = torch.randn(50, generator=generator) * (1e4 if step < 1990 else 1)
        history.append(g.clone())
        part = callback._recall(memory, "w", g)
        callback._update([part], [g])
    exact = torch.stack(history[-4:]).double().mean(dim=0)
    assert (callback._slow(part) - exact).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------- when it is on


def changed(before: Looks, after: Looks) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(before.gradients, after.gradients)]


@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_warmup_and_the_end(filter: Any) -> None:
    before, after = Looks(), Looks()
    fit(net(), before, Grokfast(filter, warmup=4, stop_step=8), after)
    assert changed(before, after) == [False] * 3 + [True] * 5 + [False] * 12


def test_a_metric_switches_it_off_for_good() -> None:
    before, after, callback = Looks(), Looks(), Grokfast(stop_monitor="train/loss", stop_threshold=0.0)
    fit(net(), before, callback, after, max_epochs=3)
    assert changed(before, after) == [True] * BATCHES + [False] * 2 * BATCHES
    assert callback.state_dict() == {"is_stopped": True, "parts": {}}


def test_parameters_without_a_gradient_are_left_out() -> None:
    class Sometimes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx % 2:
                return super().training_step(batch, batch_idx)
            return self.net[-1](torch.zeros(1, 8)).sum()

    fit(Sometimes(), callback := Grokfast("ma", window=3))
    counts = {name: part["count"] for name, part in callback.state_dict()["parts"].items()}
    assert counts["net.0.weight"] == BATCHES and counts["net.2.weight"] == 2 * BATCHES


def test_modules_that_make_their_parameters_late() -> None:
    class Late(Net):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = net().net

    late, early = Late(), net()
    fit(late, Grokfast())
    fit(early, Grokfast())
    assert torch.equal(weights(late), weights(early))


def test_manual_optimization_with_several_optimizers() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(part.parameters(), 0.2, momentum=0.9, weight_decay=0.01)
                for part in (self.net[0], self.net[2])
            ]

    manual, automatic = net(Manual), net()
    fit(manual, Grokfast())
    fit(automatic, Grokfast())
    torch.testing.assert_close(weights(manual), weights(automatic))


def test_the_logged_ratio(tmp_path: Path) -> None:
    logger, before, after = CSVLogger(tmp_path), Looks(), Looks()
    fit(net(), before, Grokfast(lamb=3.0), after, logger=logger, log_every_n_steps=20, max_epochs=2)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        (logged,) = [float(row["grokfast/slow_ratio"]) for row in csv.DictReader(file) if row["grokfast/slow_ratio"]]
    g, filtered = before.gradients[19], after.gradients[19]
    assert logged == pytest.approx(float((filtered - g).norm() / g.norm()), rel=1e-5)


# --------------------------------------------------------------------------------------------------- mixed precision


class Overflows(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        steep = sum(parameter.sum() for parameter in self.parameters())
        return loss + 1e37 * (steep - steep.detach()) if batch_idx == 2 else loss


def fp16(scale: float) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def scaled_loop(module: Net, scale: float, clip: float) -> int:
    """Grokfast-EMA 0.9/2 in the loop of torch's documentation on gradient scaling; how many steps were skipped."""
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=scale), module.configure_optimizers()
    parameters, skipped = list(module.parameters()), 0
    h: list[Tensor] = []
    for _ in range(2):
        for index, (x, y) in enumerate(DataLoader(samples(BATCH * BATCHES), BATCH)):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(module.net(x), y)
                if index == 2:
                    steep = sum(parameter.sum() for parameter in parameters)
                    loss = loss + 1e37 * (steep - steep.detach())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            g = [parameter.grad for parameter in parameters]
            if all(torch.isfinite(value).all() for value in g):
                h = [torch.lerp(old, new, 1 - 0.9) for old, new in zip(h, g)] if h else [value.clone() for value in g]
                for value, slow in zip(g, h):
                    value.add_(slow, alpha=2)
            else:
                skipped += 1
            nn.utils.clip_grad_norm_(parameters, clip)
            scaler.step(optimizer)
            scaler.update()
    return skipped


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
def test_half_precision_is_that_of_the_plain_loop(scale: float) -> None:
    ours, plain, callback = net(Overflows), net(), Grokfast(alpha=0.9)
    fit(ours, callback, gradient_clip_val=0.5, **fp16(scale))
    assert scaled_loop(plain, scale, 0.5) == 2
    assert torch.equal(weights(ours), weights(plain))
    assert {part["count"] for part in callback.state_dict()["parts"].values()} == {2 * BATCHES - 2}


@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_a_skipped_step_leaves_the_state_as_it_was(filter: Any) -> None:
    states: list[dict[str, Any]] = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            parts = callback.state_dict()["parts"].items()
            states.append(
                {(name, key): torch.as_tensor(v).clone() for name, p in parts for key, v in p.items() if v is not None}
            )

    callback = Grokfast(filter, window=2)
    fit(net(Overflows), callback, Copies(), max_epochs=1, **fp16(1024.0))
    same = [all(torch.equal(one[key], other[key]) for key in one) for one, other in pairwise(states)]
    assert same == [False, True] + [False] * 7  # batch 2 is the one that overflows


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": "median"}, "filter='median' is not one of"),
        ({"alpha": 1.0}, r"alpha=1.0 must be in \[0, 1\)"),
        ({"lamb": -1.0}, "lamb=-1.0 must not be negative"),
        ({"lamb": float("nan")}, "lamb=nan must be a finite number"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"warmup": -1}, "warmup=-1 must be at least 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grokfast(**settings)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Grokfast(), Grokfast("ma")], "more than one stateful callback of type `Grokfast`"),  # Lightning's own
        ([Grokfast(), SharpnessAware()], r"callbacks=\[Grokfast, SharpnessAware\] .* be \[SharpnessAware, Grokfast\]"),
    ],
)
def test_callbacks_that_do_not_fit_each_other(callbacks: Any, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(net(), *callbacks)


def test_optimizers_that_evaluate_the_loss_themselves() -> None:
    class LBFGS(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match=r"Grokfast with LBFGS: .*Use a first-order optimizer"):
        fit(net(LBFGS), Grokfast())


def test_ranks_that_do_not_validate_cannot_watch_a_metric() -> None:
    trainer = silent_trainer(FedAvgStrategy(num_clients=4, on_peer_loss="drop"), 2)
    Grokfast().setup(trainer, net(), "fit")
    with pytest.raises(ValueError, match=r"stop_monitor='val/acc'.*Use stop_step"):
        Grokfast(stop_monitor="val/acc").setup(trainer, net(), "fit")

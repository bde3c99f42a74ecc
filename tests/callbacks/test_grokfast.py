"""Grokfast against a NumPy transcription of the paper's code, in the Trainer and for each client; state, refusals."""

from __future__ import annotations

import csv
from collections import defaultdict, deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, FEATURES, Classifier, all_rows, clients, loaders, samples, silent_trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import EControlStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.callbacks import Grokfast, SharpnessAware
from lightning_fed.compression import Identity

BATCH, BATCHES = 6, 10
Arrays = dict[str, np.ndarray]


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9, weight_decay=0.01)


class Looks(pl.Callback):
    """The gradients before the callbacks after it, for each client of a federation."""

    def __init__(self) -> None:
        self.of: dict[Any, list[Tensor]] = defaultdict(list)

    @property
    def gradients(self) -> list[Tensor]:
        return self.of[None]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        client = trainer.strategy.bank.bound if hasattr(trainer.strategy, "bank") else None
        self.of[client].append(torch.cat([p.grad.reshape(-1) for p in pl_module.parameters()]).clone())


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    pl.seed_everything(5, verbose=False)
    fitting = {key: settings.pop(key) for key in ("ckpt_path", "weights_only") if key in settings}
    trainer = silent_trainer("auto", **{"max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, DataLoader(samples(BATCH * BATCHES), BATCH), **fitting)
    return trainer


def net(make: Callable[[], Any] = Net) -> Any:
    torch.manual_seed(0)
    return make()


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


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


# ------------------------------------------------------------------------------------------------------- checkpoints


class AdamNet(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.02)


@pytest.mark.parametrize("filter", ["ema", "ma"])
@pytest.mark.parametrize("make", [Net, AdamNet])
def test_a_resumed_run_goes_on_to_the_bit(filter: Any, make: Any, tmp_path: Path) -> None:
    """After ten steps a ring of seven is in its middle."""

    def run(**settings: Any) -> tuple[pl.Trainer, Net]:
        module = net(make)
        return fit(module, Grokfast(filter, window=7), **settings), module

    trainer, _ = run(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = run(ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)[1]
    assert torch.equal(weights(resumed), weights(run()[1]))


@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_a_state_that_is_read_before_the_module_has_its_dtype(filter: Any) -> None:
    fit(net(), first := Grokfast(filter, window=3), max_epochs=1)
    parts = {
        name: {key: value.double() if isinstance(value, Tensor) else value for key, value in part.items()}
        for name, part in first.state_dict()["parts"].items()
    }
    results = []
    for state in (first.state_dict()["parts"], parts):
        module, callback = net(), Grokfast(filter, window=3)
        copies = {
            name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in p.items()} for name, p in state.items()
        }
        callback.load_state_dict({"is_stopped": False, "parts": copies})
        fit(module, callback)
        results.append(weights(module))
    fit(fresh := net(), Grokfast(filter, window=3))
    assert torch.equal(*results) and not torch.equal(results[0], weights(fresh))


@pytest.mark.gpu
@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_a_state_that_is_read_before_the_module_moves(filter: Any, tmp_path: Path) -> None:
    def run(**settings: Any) -> tuple[pl.Trainer, Net]:
        module = net()
        return fit(module, Grokfast(filter, window=7), accelerator="gpu", **settings), module

    run(max_epochs=1)[0].save_checkpoint(tmp_path / "one.ckpt")
    resumed = run(ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)[1]
    torch.testing.assert_close(weights(resumed), weights(run()[1]))


def test_another_filter_or_window_begins_anew() -> None:
    fit(net(), first := Grokfast("ma", window=3), max_epochs=1)
    for other in (Grokfast(), Grokfast("ma", window=5)):
        fresh = Grokfast(other.filter, window=other.window)
        modules = net(), net()
        other.load_state_dict(first.state_dict())
        for module, callback in zip(modules, (other, fresh)):
            fit(module, callback)
        assert torch.equal(*map(weights, modules))


# -------------------------------------------------------------------------------------------------------- federations


def federated(strategy: Any, *callbacks: pl.Callback, **settings: Any) -> np.ndarray:
    pl.seed_everything(5, verbose=False)
    trainer = silent_trainer(strategy, callbacks=list(callbacks), **settings)
    trainer.fit(Classifier(norm=False, dropout=0.0), *loaders(clients(3)))
    return all_rows(strategy)


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
def test_each_client_filters_its_own_gradients(optimizer_state: Any) -> None:
    before, after = Looks(), Looks()
    strategy = FedAvgStrategy(num_clients=3, local_steps=4, optimizer_state=optimizer_state)
    federated(strategy, before, Grokfast(alpha=0.9, lamb=2.0), after, max_epochs=3)
    assert sorted(before.of) == [0, 1, 2]
    for client, seen in before.of.items():
        for step in range(12):
            first = 0 if optimizer_state == "keep" else step - step % 4
            h = seen[first]
            for g in seen[first : step + 1]:
                h = 0.9 * h + 0.1 * g
            torch.testing.assert_close(after.of[client][step], seen[step] + 2 * h)


def test_a_weight_of_zero_changes_no_federation() -> None:
    plain, ours = (GossipStrategy(num_clients=3, optimizer_state="keep") for _ in range(2))
    assert np.array_equal(federated(plain), federated(ours, Grokfast(lamb=0.0)))


@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_a_resumed_federation_goes_on_to_the_bit(filter: Any, tmp_path: Path) -> None:
    def run(max_epochs: int, **resume: Any) -> tuple[pl.Trainer, np.ndarray]:
        pl.seed_everything(5, verbose=False)
        strategy = GossipStrategy(num_clients=3, optimizer_state="keep")
        callback = Grokfast(filter, window=5, warmup=0)
        trainer = silent_trainer(strategy, callbacks=[callback], max_epochs=max_epochs)
        trainer.fit(Classifier(momentum=0.9), *loaders(clients(3)), **resume)
        return trainer, all_rows(strategy)

    trainer, early = run(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, whole = run(4, ckpt_path=str(tmp_path / "two.ckpt"))[1], run(4)[1]
    assert np.array_equal(resumed, whole) and not np.array_equal(early, whole)


def test_an_algorithms_common_gradient_is_filtered_once() -> None:
    before, after = Looks(), Looks()
    federated(EControlStrategy(Identity(), num_clients=3), before, Grokfast(alpha=0.5, lamb=1.0), after, max_epochs=1)
    (seen,), (filtered,) = before.of.values(), after.of.values()
    h = seen[0]
    for g, ours in zip(seen, filtered):
        h = 0.5 * h + 0.5 * g
        torch.testing.assert_close(ours, g + h)


def test_when_it_ends_clients_forget() -> None:
    strategy = FedAvgStrategy(num_clients=3, optimizer_state="keep")
    federated(strategy, Grokfast(stop_step=2), max_epochs=2)
    memories = [strategy.bank.optimizer_states(client)[0]["grokfast"] for client in range(3)]  # type: ignore[index]
    assert memories == [{}, {}, {}]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": "median"}, "filter='median' must be"),
        ({"alpha": 1.0}, r"alpha=1.0 must be in \[0, 1\)"),
        ({"lamb": -1.0}, "lamb=-1.0 must not be negative"),
        ({"lamb": float("nan")}, "lamb=nan must not be negative"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"warmup": -1}, "warmup=-1 must not be negative"),
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

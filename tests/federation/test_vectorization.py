"""What cannot be trained as a wave is refused by name before it does harm, or trained one by one with "auto"."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, FEATURES, Classifier, all_rows, clients, loaders, silent_trainer
from torch import Tensor, nn

from lightning_fed import GossipStrategy
from lightning_fed.federation.clients_per_step import CANDIDATES, ClientsPerStep
from lightning_fed.federation.local_rules import LocalRule
from lightning_fed.federation.vectorization import CannotVectorize, check_optimizer


class Plain(pl.LightningModule):
    """Two layers, and whatever a test puts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden.relu()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        return nn.functional.cross_entropy(self.second(self.between(self.first(features))), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Branches(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden.relu() if hidden.mean() > 0 else hidden.tanh()


class Items(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden * hidden.abs().max().item()


class Masks(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden * hidden[hidden > 0].mean()


class Keeps(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        self.last_hidden = hidden.detach()
        return hidden.relu()


class Adds(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(8), persistent=False)

    def between(self, hidden: Tensor) -> Tensor:
        self.total += hidden.detach().mean(0)
        return hidden.relu()


class DrawsInPython(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden * random.random()


class DrawsInNumPy(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden * np.random.rand()


class FillsAnEmptyTensor(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        return hidden + torch.empty(8).normal_()


class Appends(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def between(self, hidden: Tensor) -> Tensor:
        self.kept.append(hidden.detach().mean())
        return hidden.relu()


class AppendsNumbers(Appends):
    def between(self, hidden: Tensor) -> Tensor:
        self.kept.append(torch.tensor(1.0))
        return hidden.relu()


class Counts(Plain):
    calls = 0

    def between(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden.relu()


class CountsInBuffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def between(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden.relu()


class ReplacesShared(CountsInBuffer):
    def between(self, hidden: Tensor) -> Tensor:
        self.calls = self.calls + hidden.detach().mean()
        return hidden.relu()


class Checkpoints(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(torch.tanh, hidden, use_reentrant=False)


class LogsWithTensor(Plain):
    def between(self, hidden: Tensor) -> Tensor:
        self.log("mean", hidden.mean(), on_epoch=True, batch_size=(hidden > 0).sum())  # type: ignore[arg-type]
        return hidden.relu()


class MixesClients(Plain):
    """Leaves vmap by the back door, and takes the mean over clients."""

    share = 0.5

    def between(self, hidden: Tensor) -> Tensor:
        functorch: Any = torch._C._functorch
        if not functorch.is_batchedtensor(hidden):
            return hidden
        return hidden - functorch.get_unwrapped(hidden).mean() * self.share


def fit(module: Any, clients_per_step: Any = 3, rounds: int = 2, **settings: Any) -> GossipStrategy:
    pl.seed_everything(1, verbose=False)
    trainer = settings.pop("trainer", {})
    strategy = GossipStrategy(num_clients=6, clients_per_step=clients_per_step, **settings)
    silent_trainer(strategy, max_epochs=rounds, **trainer).fit(module(), loaders(clients(6))[0])
    return strategy


STEPS = {
    Branches: r"test_vectorization.py:\d+ \(`return hidden.relu\(\) if hidden.mean\(\) > 0 .*`\): .*data-dependent",
    Items: r"test_vectorization.py:\d+ \(`return hidden \* hidden.abs\(\).max\(\).item\(\)`\): .*\.item\(\)",
    Masks: r"`return hidden \* hidden\[hidden > 0\].mean\(\)`\): .*",
    Keeps: r"Keeps.training_step keeps a tensor in `Keeps.last_hidden`",
    Adds: r"`self.total \+= hidden.detach\(\).mean\(0\)`\): output with shape",
    DrawsInPython: "draws from Python's `random`",
    DrawsInNumPy: "draws from `numpy.random`",
    FillsAnEmptyTensor: r"normal_ fills a tensor that was made inside the step",
    Appends: r"Appends.training_step keeps a tensor in `Appends.kept`",
    AppendsNumbers: "changes `kept`, which clients share",
    Counts: "changes `calls`, which clients share",
    CountsInBuffer: "changes `calls`, which clients share",
    ReplacesShared: "keeps a tensor in `ReplacesShared._buffers`",
    Checkpoints: "Checkpoints.training_step fails for several clients at once",
    LogsWithTensor: "batch_size=...\\) is given a tensor",
    MixesClients: r"the gradient of client 0 differs by .*%.* works across the clients",
    Classifier: "Accuracy",
}


@pytest.mark.parametrize("module", STEPS)
def test_a_step_that_cannot_be_vectorized_is_named_and_nothing_is_lost(module: type[pl.LightningModule]) -> None:
    pl.seed_everything(1, verbose=False)
    broken = module()
    before = {name: value.clone() for name, value in broken.state_dict().items()}
    strategy = GossipStrategy(num_clients=6, clients_per_step=3)
    with pytest.raises(RuntimeError, match=rf"^clients_per_step=3: .*(?:{STEPS[module]})(?s:.*)set clients_per_step=1"):
        silent_trainer(strategy).fit(broken, loaders(clients(6))[0])
    rows = strategy.bank.rows.matrix
    assert torch.equal(rows, rows[:1].expand_as(rows)) and not rows.isnan().any()
    for name, value in broken.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("module", STEPS)
def test_auto_falls_back_on_single_clients(module: type[pl.LightningModule], caplog: pytest.LogCaptureFixture) -> None:
    alone = fit(module, 1)
    with caplog.at_level("INFO"):
        fallen = fit(module, "auto")
    np.testing.assert_array_equal(all_rows(fallen), all_rows(alone))
    assert 'clients_per_step="auto" trains clients one by one:' in caplog.text


def test_what_a_step_has_kept_is_what_single_clients_keep() -> None:
    kept = []
    for clients_per_step in (1, "auto"):
        module = Appends()
        fit(lambda module=module: module, clients_per_step)
        kept.append(torch.stack(module.kept))
    torch.testing.assert_close(*kept, rtol=0, atol=0)


def test_double_precision_is_compared_as_such() -> None:
    class MixesLittle(MixesClients):
        share = 0.001

    with pytest.raises(RuntimeError, match="works across the clients"):
        fit(MixesLittle, trainer={"precision": "64-true"})


def test_the_first_wave_that_tells_something_is_compared() -> None:
    class MixesLater(MixesClients):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if self.current_epoch else None

    with pytest.raises(RuntimeError, match="works across the clients"):
        fit(MixesLater)


class NormsAndKeeps(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def between(self, hidden: Tensor) -> Tensor:
        self.kept = self.norm(hidden).relu()
        return self.kept


def test_rows_that_were_copied_are_restored_too() -> None:
    module = NormsAndKeeps()
    strategy = GossipStrategy(num_clients=6, clients_per_step=3, rows_device="cpu")
    with pytest.raises(RuntimeError, match="keeps a tensor"):
        silent_trainer(strategy).fit(module, loaders(clients(6))[0])
    buffers = strategy.bank.buffers.matrix
    assert torch.equal(buffers, buffers[:1].expand_as(buffers)) and not strategy.bank.counters.matrix.any()


def test_objects_that_cannot_be_compared_are_named() -> None:
    class Named(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["pair"], batch_idx)

    def collate(samples: Any) -> dict[str, Any]:
        return {"pair": torch.utils.data.default_collate(samples), "weights": np.ones(3)}

    loader = torch.utils.data.DataLoader(clients(6), 4, collate_fn=collate)
    with pytest.raises(RuntimeError, match="the minibatches hold ndarray objects"):
        silent_trainer(GossipStrategy(num_clients=6, clients_per_step=3)).fit(Named(), loader)


class Watches(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass


class ByHand(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Rule(LocalRule):
    pass


class Momentless(torch.optim.SGD):
    """Divides a gradient by its norm, as LARS does."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.div_(parameter.grad.norm())
        return super().step(closure)


class CountsInGroups(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__([{"params": list(parameters), "steps": 0}], lr=0.1)

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["steps"] += 1
        return super().step(closure)


def hooked(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


class WithOptimizer(Plain):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


SETTINGS: list[tuple[Any, dict[str, Any], str]] = [
    (ByHand, {}, "ByHand has automatic_optimization=False"),
    (Plain, {"trainer": {"callbacks": [Watches()]}}, "Watches.on_after_backward looks into the local step"),
    (Plain, {"local_rule": Rule()}, "Rule is a local rule for single clients"),
    (
        lambda: WithOptimizer(lambda p: Momentless(p, lr=0.1)),
        {},
        "the optimizer Momentless does not work entry by entry",
    ),
    (lambda: WithOptimizer(torch.optim.LBFGS), {}, "the optimizer LBFGS does not step stacked clients"),
    (lambda: WithOptimizer(torch.optim.Adafactor), {}, "the optimizer Adafactor does not work entry by entry"),
    (lambda: WithOptimizer(lambda p: torch.optim.Adam(p, fused=True)), {}, "the optimizer Adam does not work entry by"),
    (lambda: WithOptimizer(CountsInGroups), {}, "the optimizer CountsInGroups changes 'steps' in its param_groups"),
    (lambda: WithOptimizer(hooked), {}, "the optimizer SGD has hooks"),
    (lambda: torch.compile(Plain(), backend="eager"), {}, "is compiled"),
]


@pytest.mark.parametrize(("module", "settings", "message"), SETTINGS)
def test_settings_are_refused_before_the_first_step(module: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"clients_per_step=3: .*{message}.*set clients_per_step=1"):
        fit(module, **settings)
    fit(module, "auto", rounds=1, **settings)


@pytest.mark.parametrize("value", [0, -2])
def test_a_number_below_one_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"clients_per_step={value} must be at least 1"):
        GossipStrategy(clients_per_step=value)


ELEMENTWISE = ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_optimizers_that_work_entry_by_entry_pass(name: str) -> None:
    module = Plain()
    optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.01)
    before = [parameter.clone() for parameter in module.parameters()]
    check_optimizer(optimizer)
    assert all(map(torch.equal, before, module.parameters()))
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())


def test_an_optimizer_is_tried_whatever_its_rate_is_at_the_start() -> None:
    optimizer = Momentless(Plain().parameters(), lr=0.0)
    torch.optim.lr_scheduler.LinearLR(optimizer)
    with pytest.raises(CannotVectorize, match="entry by entry"):
        check_optimizer(optimizer)


def test_auto_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = ClientsPerStep("auto", torch.device("cpu"))
    seconds = {1: 1.0, 8: 0.25, 32: 0.5}
    now = [0.0]
    monkeypatch.setattr(choice, "_now", lambda: now[0])
    tried = []
    while not choice.is_decided:
        tried.append(number := choice.begin(20))
        now[0] += seconds[number] * (10 if len(tried) < 4 else 1)  # the first steps warm up
        choice.end(20)
    assert set(tried) == {1, 8, 32} and CANDIDATES[:3] == (1, 8, 32)  # 128 would be one wave, as 32 is
    assert choice.begin(20) == 8


def test_auto_trains_what_single_clients_train(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        strategy = fit(Plain, "auto", rounds=6, trainer={"precision": "64-true"})
    alone = fit(Plain, 1, rounds=6, trainer={"precision": "64-true"})
    np.testing.assert_allclose(all_rows(strategy), all_rows(alone), rtol=0, atol=1e-10)
    assert 'clients_per_step="auto" goes on with' in caplog.text

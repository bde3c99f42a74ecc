"""Waves of clients under vmap train what single clients train: the same rows, logs and states."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, FEATURES, all_rows, clients, loaders, silent_trainer, small_network
from torch import Tensor, nn

from lightning_fed import DFedSAMStrategy, EControlStrategy, FedAvgStrategy, GossipStrategy, MoDeSTStrategy
from lightning_fed.compression import TopK
from lightning_fed.federation.local_rules import LocalRule, SharpnessAwareRule
from lightning_fed.federation.participation import UniformSample
from lightning_fed.federation.strategy import FederatedStrategy
from lightning_fed.federation.vectorized_step import VectorizedStep

STRATEGIES: dict[str, Any] = {
    "fedavg": lambda **s: FedAvgStrategy(**s),
    "fedavg cohort": lambda **s: FedAvgStrategy(cohort_size=5, **s),
    "fedprox": lambda **s: FedAvgStrategy(mu=0.1, **s),
    "fedadam": lambda **s: FedAvgStrategy(server_optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **s),
    "gossip": lambda **s: GossipStrategy(**s),
    "gossip cohort": lambda **s: GossipStrategy(participation=UniformSample(size=5), **s),
    "choco": lambda **s: GossipStrategy(method="choco", compressor=TopK(0.3), gamma=0.4, **s),
    "tracking": lambda **s: GossipStrategy(method="tracking", local_steps=1, **s),
    "beer": lambda **s: GossipStrategy(method="beer", compressor=TopK(0.3), local_steps=1, **s),
    "dfedsam": lambda **s: DFedSAMStrategy(rho=0.05, gossip_steps=2, **s),
    "econtrol": lambda **s: EControlStrategy(TopK(0.3), **s),
    "econtrol rounds": lambda **s: EControlStrategy(TopK(0.3), local_steps=3, **s),
    "modest": lambda **s: MoDeSTStrategy(sample_size=4, num_aggregators=2, **s),
}


class Logging(pl.LightningModule):
    """BatchNorm, dropout, noise, a buffer that is replaced, an extra output, and logs of every kind."""

    def __init__(self, norm: bool = True, dropout: float = 0.2, optimizer: Any = None) -> None:
        super().__init__()
        self.net = small_network(norm, dropout)
        self.register_buffer("center", torch.zeros(CLASSES))
        self.optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        features, labels = batch
        logits = self.net(features + 0.05 * torch.randn_like(features))
        self.center = 0.9 * self.center + 0.1 * logits.detach().mean(0)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).to(loss.dtype).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"acc": accuracy, "constant": 2.0}, on_step=False, on_epoch=True)
        self.log("most", accuracy, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("shaped", accuracy.reshape(1), on_step=True)
        self.log("samples", float(len(labels)), on_step=False, on_epoch=True, reduce_fx="sum")
        return {"loss": loss, "logits": {"mean": logits.detach().mean(), "count": len(labels)}}

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def train(
    make: Any, clients_per_step: Any, rounds: int = 5, num_clients: int = 10, module: Any = None, **settings: Any
) -> tuple[FederatedStrategy, pl.Trainer]:
    pl.seed_everything(3, verbose=False)
    strategy = make(num_clients=num_clients, clients_per_step=clients_per_step)
    dataset = settings.pop("dataset", None) or clients(num_clients)
    trainer = silent_trainer(strategy, **{"max_epochs": rounds, "precision": "64-true", **settings})
    trainer.fit(module() if module else Logging(), loaders(dataset)[0])
    return strategy, trainer


def rows_of(strategy: FederatedStrategy) -> np.ndarray:
    if strategy.bank.keeps_rows:
        return all_rows(strategy)
    return torch.cat(strategy.bank.consensus[:2]).numpy()


def assert_equal(make: Any, clients_per_step: int, tolerance: float = 1e-10, **settings: Any) -> None:
    alone, trainer_alone = train(make, 1, **settings)
    together, trainer = train(make, clients_per_step, **settings)
    assert together.local_step._vectorized is not None and together.local_step._vectorized._is_tried
    np.testing.assert_allclose(rows_of(together), rows_of(alone), rtol=0, atol=tolerance)
    logged, logged_alone = trainer.callback_metrics, trainer_alone.callback_metrics
    assert set(logged) == set(logged_alone) and "loss_epoch" in logged
    for name, value in logged_alone.items():
        assert float(logged[name]) == pytest.approx(float(value), abs=max(tolerance, 1e-6)), name
    assert trainer.global_step == trainer_alone.global_step
    for client in alone.bank.clients[:3]:
        assert torch.equal(together.bank.counters_of(client), alone.bank.counters_of(client))


def module_for(name: str) -> Any:
    # Adam divides a gradient by its size, also one that is zero but for rounding, as a bias before BatchNorm has.
    return (lambda: Logging(norm=False)) if name == "fedadam" else None


@pytest.mark.parametrize("name", STRATEGIES)
def test_rows_are_those_of_single_clients(name: str) -> None:
    assert_equal(STRATEGIES[name], 4, module=module_for(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-10), ("32-true", 1e-5)])
def test_rows_stay_those_of_single_clients_for_twenty_rounds(name: str, precision: Any, tolerance: float) -> None:
    # Without BatchNorm, whose division by the spread of a few samples magnifies rounding from round to round.
    def module() -> pl.LightningModule:
        return Logging(norm=False, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))

    assert_equal(STRATEGIES[name], 4, tolerance, rounds=20, precision=precision, module=module)


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep", [False, True])
def test_each_client_has_its_own_optimizer_state(optimizer: str, keep: bool) -> None:
    def make(**settings: Any) -> FederatedStrategy:
        # Shards are of unequal sizes, so clients that keep their state drift apart in steps taken.
        return GossipStrategy(
            optimizer_state="keep" if keep else "reset", participation=UniformSample(size=7), **settings
        )

    def module() -> pl.LightningModule:
        return Logging(norm=False, optimizer=OPTIMIZERS[optimizer])

    assert_equal(make, 3, module=module)
    if keep:
        alone, together = train(make, 1, module=module)[0], train(make, 3, module=module)[0]
        for client in range(10):
            for one, other in zip(
                *(strategy.bank.state_of(client)["optimizers"] for strategy in (alone, together)), strict=True
            ):
                assert one.keys() == other.keys()
                for index, state in one.items():
                    for key, value in state.items():
                        torch.testing.assert_close(other[index][key], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.3},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3},
    ],
)
@pytest.mark.parametrize("name", ["gossip", "dfedsam", "tracking", "econtrol"])
def test_clipping_and_accumulation_are_each_clients_own(name: str, settings: dict[str, Any]) -> None:
    # Not the largest entries only: two that are equal but for rounding may change places among them.
    make = STRATEGIES[name] if name != "econtrol" else lambda **s: EControlStrategy(TopK(1.0), **s)
    assert_equal(make, 4, **settings)


def test_bf16_is_as_close_as_bf16_can_be() -> None:
    assert_equal(STRATEGIES["gossip"], 4, tolerance=0.05, precision="bf16-mixed")


@pytest.mark.parametrize("name", ["gossip", "gossip cohort", "fedavg cohort", "dfedsam"])
def test_rows_in_host_memory(name: str) -> None:
    alone, _ = train(STRATEGIES[name], 1)
    together, _ = train(lambda **s: STRATEGIES[name](rows_device="cpu", **s), 4)
    np.testing.assert_allclose(rows_of(together), rows_of(alone), rtol=0, atol=1e-10)


def test_waves_are_as_large_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = VectorizedStep.run

    def spy(self: Any, joint: Any, numbers: Any, *args: Any) -> Any:
        sizes.append(len(numbers))
        return run(self, joint, numbers, *args)

    monkeypatch.setattr(VectorizedStep, "run", spy)
    train(STRATEGIES["gossip"], 4, rounds=1, dataset=clients(10, 8, 0))
    assert sizes == [4, 4, 2, 4, 4, 2]  # eight samples are two minibatches


def test_a_run_resumes_to_the_bit(tmp_path: Any) -> None:
    def make(**settings: Any) -> FederatedStrategy:
        return GossipStrategy(optimizer_state="keep", **settings)

    def module() -> pl.LightningModule:
        return Logging(optimizer=OPTIMIZERS["momentum"])

    whole, _ = train(make, 4, rounds=4, module=module)
    _, trainer = train(make, 4, rounds=2, module=module, enable_checkpointing=True, default_root_dir=tmp_path)
    strategy = make(num_clients=10, clients_per_step=4)
    resumed = silent_trainer(strategy, max_epochs=4, precision="64-true")
    resumed.fit(module(), loaders(clients(10))[0], ckpt_path=trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    np.testing.assert_array_equal(all_rows(strategy), all_rows(whole))


@pytest.mark.parametrize("clients_per_step", [1, 4])
def test_each_clients_values_are_logged_where_asked(clients_per_step: int) -> None:
    def make(**settings: Any) -> FederatedStrategy:
        return FedAvgStrategy(log_clients=True, **settings)

    _, trainer = train(make, clients_per_step, rounds=1, dataset=clients(10, 8, 0))  # equally large shards
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    losses = [logged[f"loss/client_{client}"] for client in range(10)]
    assert len(set(losses)) == 10 and np.mean(losses) == pytest.approx(logged["loss_epoch"], rel=1e-6)
    assert max(logged[f"most/client_{client}"] for client in range(10)) == logged["most"]
    assert logged["samples/client_3"] == 8 and logged["samples"] == 80 and logged["constant/client_9"] == 2


def test_clients_log_the_same_one_by_one_and_together() -> None:
    def make(**settings: Any) -> FederatedStrategy:
        return GossipStrategy(log_clients=True, **settings)

    assert_equal(make, 4)


class Scale(nn.Module):
    """A parameter that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.factor * hidden


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.signs = nn.Parameter(torch.randn(6, 16))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.embedding((hidden > 0).long(), self.signs, padding_idx=-5).mean(1)


class LinearOfNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.linspace(-1, 1, 16)), nn.Parameter(torch.tensor(0.5))
        self.matrix = nn.Parameter(torch.eye(16))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = nn.functional.linear(hidden, self.matrix, self.bias)
        return hidden * nn.functional.linear(hidden, self.weight).unsqueeze(1)


class Shrinks(nn.Linear):
    """Changes its own weight at every step."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(hidden)


def with_layer(layer: Any, optimizer: Any = None) -> Any:
    def module() -> Logging:
        built = Logging(norm=False, optimizer=optimizer)
        built.net.insert(1, layer())
        return built

    return module


@pytest.mark.parametrize("layer", [Scale, Padded, LinearOfNumbers, lambda: Shrinks(16, 16)])
def test_unusual_layers_stay_each_clients_own(layer: Any) -> None:
    assert_equal(STRATEGIES["dfedsam"], 4, rounds=3, module=with_layer(layer), gradient_clip_val=0.3)


class CountsInGroups(torch.optim.SGD):
    """Counts its steps where it has added a number to its parameter groups."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= group["steps"]
        super().step()
        return loss


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "counts in groups"])
def test_counts_of_optimizers_stay_each_clients_own(name: str) -> None:
    def make(**settings: Any) -> FederatedStrategy:
        return GossipStrategy(optimizer_state="keep", participation=UniformSample(size=4), **settings)

    kind: Any = CountsInGroups if name == "counts in groups" else getattr(torch.optim, name)
    assert_equal(make, 3, num_clients=6, module=with_layer(Scale, lambda p: kind(p, lr=0.003)))


class Decay(LocalRule):
    works_on_waves = True

    @torch.no_grad()
    def before_optimizer_step(self, clients: Any, parameters: Any) -> None:
        for parameter, _ in parameters:
            if parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=0.3)


@pytest.mark.parametrize("rule", [Decay(), SharpnessAwareRule(0.05)])
@pytest.mark.parametrize(
    "make",
    [
        lambda **s: GossipStrategy(method="tracking", local_steps=1, **s),
        lambda **s: EControlStrategy(TopK(1.0), local_steps=2, **s),
    ],
)
def test_local_rules_see_the_gradients_that_meet(make: Any, rule: LocalRule) -> None:
    assert_equal(lambda **settings: make(local_rule=rule, **settings), 4, rounds=3)


class Skips(Logging):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)


def test_a_step_may_leave_minibatches_out() -> None:
    assert_equal(STRATEGIES["gossip"], 4, rounds=2, module=Skips)


class Outputs(pl.Callback):
    def __init__(self) -> None:
        self.means: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.means.append(float(outputs["logits"]["mean"]))
        assert outputs["logits"]["count"] == 4 and pl_module.net[0].weight.shape == (16, FEATURES)  # of one client


def test_outputs_are_the_last_clients() -> None:
    alone, together = Outputs(), Outputs()
    for clients_per_step, callback in ((1, alone), (4, together)):
        train(STRATEGIES["gossip"], clients_per_step, rounds=2, dataset=clients(10, 8, 0), callbacks=[callback])
    assert len(alone.means) == 4 and together.means == pytest.approx(alone.means, abs=1e-10)

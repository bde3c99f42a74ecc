"""What Lightning offers works for clients one by one: optimization modes, precision, compile, hooks, evaluation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import CLASSES, FEATURES, Classifier, all_rows, clients, loaders, samples, silent_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from lightning_fed import DFedSAMStrategy, FedAvgStrategy, GossipStrategy
from lightning_fed.federation.strategy import FederatedStrategy


def fit(strategy: FederatedStrategy, module: pl.LightningModule, data: Any = None, **trainer: Any) -> np.ndarray:
    pl.seed_everything(5, verbose=False)
    silent_trainer(strategy, **trainer).fit(module, *(data or loaders(clients(4))))
    return all_rows(strategy)


class NoHook(pl.Callback):
    """Looks at a local step, so that Lightning's own closure and hooks run; changes nothing."""

    calls = 0

    def on_after_backward(self, *args: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("strategy", [GossipStrategy, DFedSAMStrategy])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}])
def test_the_short_path_without_hooks_equals_lightnings(strategy: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    state = Classifier(momentum=0.9).state_dict()

    def run(*callbacks: pl.Callback) -> np.ndarray:
        module = Classifier(momentum=0.9)
        module.load_state_dict(state)
        return fit(strategy(num_clients=4), module, callbacks=list(callbacks), **settings)

    watched = NoHook()
    np.testing.assert_array_equal(run(), run(watched))
    assert watched.calls > 0


class Manual(Classifier):
    """The same classifier by manual optimization, with one optimizer a layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        first, last = self.net[:-1].parameters(), self.net[-1].parameters()
        return [torch.optim.SGD(first, 0.1, momentum=0.9), torch.optim.SGD(last, 0.1, momentum=0.9)]


@pytest.mark.parametrize("strategy", [GossipStrategy, lambda **n: FedAvgStrategy(**n, cohort_size=2, mu=0.3)])
def test_manual_optimization_with_two_optimizers_equals_automatic(strategy: Any) -> None:
    torch.manual_seed(0)
    state = Classifier().state_dict()
    outcomes = []
    for module in (Classifier(momentum=0.9), Manual()):
        module.load_state_dict(state)
        outcomes.append((fit(strategy(num_clients=4), module), module.trainer.callback_metrics["train/loss"]))
    np.testing.assert_allclose(outcomes[0][0], outcomes[1][0], rtol=0, atol=1e-7)
    assert outcomes[0][1] == outcomes[1][1]


def test_global_step_advances_once_for_all_clients() -> None:
    automatic = silent_trainer(GossipStrategy(num_clients=4), max_epochs=2)
    automatic.fit(Classifier(), *loaders(clients(4, smallest=8, step=0)))
    assert automatic.global_step == 4
    manual = silent_trainer(GossipStrategy(num_clients=4), max_epochs=2)
    manual.fit(Manual(), *loaders(clients(4, smallest=8, step=0)))
    assert manual.global_step == 4 * 2  # Lightning counts every optimizer's steps


def test_accumulation_equals_larger_batches_client_by_client() -> None:
    data = clients(4, smallest=9, step=8)  # unequal numbers of minibatches, the last one of each client smaller

    def run(batch_size: int, **settings: Any) -> np.ndarray:
        module = Classifier(norm=False, dropout=0.0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(0.1)
        return fit(GossipStrategy(num_clients=4), module, (DataLoader(data, batch_size, drop_last=True),), **settings)

    np.testing.assert_allclose(run(4, accumulate_grad_batches=2), run(8), rtol=0, atol=1e-6)


def test_clipping_is_per_client() -> None:
    """A client whose gradient is huge must not change how its neighbour's is clipped."""
    dataset = clients(2, smallest=4, step=0)
    dataset.dataset.tensors[0][:4] *= 1e4
    strategy = GossipStrategy(num_clients=2, local_steps=1)

    class Unmixed(pl.Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            self.before = strategy.bank.rows.matrix.clone()

    module = Classifier(norm=False, dropout=0.0, lr=1.0)
    start = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    strategy.mix = lambda rows, exchange: None  # type: ignore[method-assign]
    fit(strategy, module, (DataLoader(dataset, 4),), max_epochs=1, gradient_clip_val=0.01)
    moved = (strategy.bank.rows.matrix - start).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((2,), 0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_precisions(precision: Any) -> None:
    module = Classifier()
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # the Trainer turns it into bf16 on a CPU, unless it is given as a plugin
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    rows = fit_precision(module, **settings)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert next(module.parameters()).dtype == dtype
    assert torch.isfinite(rows).all() and module.trainer.callback_metrics["val/acc"] > 0.5


def fit_precision(module: Classifier, **settings: Any) -> torch.Tensor:
    pl.seed_everything(5, verbose=False)
    strategy = DFedSAMStrategy(num_clients=3)
    silent_trainer(strategy, max_epochs=8, **settings).fit(module, *loaders(clients(3, smallest=40)))
    return strategy.bank.rows.matrix


def test_the_loss_scale_is_each_clients_own() -> None:
    """One client overflows at every step; the scale of the others must not sink with it."""
    dataset = clients(2, smallest=8, step=0)
    dataset.dataset.tensors[0][:8] = 1e30
    strategy = GossipStrategy(num_clients=2, on_nonfinite="drop")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit(strategy, Classifier(norm=False), (DataLoader(dataset, 4),), plugins=[plugin])
    scales = [float(strategy.bank.state_of(client)["scaler"][0]) for client in range(2)]
    assert scales[0] < scales[1]


class WithoutMetrics(Classifier):
    """torchmetrics objects count their updates, for which Dynamo compiles anew under any strategy."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.slow
def test_compiled_modules_are_not_recompiled_for_each_client() -> None:
    def run(num_clients: int) -> tuple[np.ndarray, int]:
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        counter = CompileCounterWithBackend("aot_eager")
        module: Any = torch.compile(WithoutMetrics(dropout=0.0), backend=counter)
        rows = fit(GossipStrategy(num_clients=num_clients), module, loaders(clients(num_clients, 8, 0)))
        return rows, counter.frame_count

    pl.seed_everything(0, verbose=False)
    reference = fit(GossipStrategy(num_clients=8), WithoutMetrics(dropout=0.0), loaders(clients(8, 8, 0)))
    (_, few), (rows, many) = run(2), run(8)
    assert few == many
    np.testing.assert_allclose(rows, reference, rtol=0, atol=1e-5)


def test_memory_grows_by_one_row_a_client_and_nothing_else() -> None:
    def held(num_clients: int) -> int:
        strategy = GossipStrategy(num_clients=num_clients)
        fit(strategy, Classifier(norm=False), loaders(clients(num_clients)), max_epochs=1)
        tensors = [value for value in vars(strategy.bank).values() if isinstance(value, torch.Tensor)]
        matrices = [rows.matrix for rows in strategy.bank.matrices]
        states = [tensor for client in range(num_clients) for tensor in tensors_in(strategy.bank.state_of(client))]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *matrices, *states))

    width = sum(parameter.numel() for parameter in Classifier(norm=False).parameters())
    assert (held(40) - held(20)) / 20 == pytest.approx(4 * width, abs=64)  # rows start on 64-byte boundaries


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in inside for tensor in tensors_in(part)]


def test_optimizer_state_is_reset_or_kept() -> None:
    for policy, kept in (("reset", 0), ("keep", 4)):
        strategy = GossipStrategy(num_clients=4, optimizer_state=policy)
        fit(strategy, Classifier(momentum=0.9, norm=False))
        states = [tensors_in(strategy.bank.state_of(client)) for client in range(4)]
        assert [len(state) for state in states] == [kept] * 4
    assert not torch.equal(states[0][0], states[1][0])


class Centered(Classifier):
    """Replaces a buffer by a new tensor at every step, as teachers and centers do."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.register_buffer("center", torch.zeros(FEATURES))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.center = 0.5 * self.center + 0.5 * batch[0].mean(dim=0)
        return super().training_step(batch, batch_idx)


def test_buffers_that_the_module_replaces_stay_with_their_client() -> None:
    strategy = GossipStrategy(num_clients=3, float_buffers="local")
    fit(strategy, Centered(), loaders(clients(3)))
    centers = strategy.bank.buffers.matrix
    assert centers.shape == (3, FEATURES) and not torch.equal(centers[0], centers[1])
    assert (centers != 0).all()


def test_the_exported_module_is_the_consensus_model_in_storage_of_its_own() -> None:
    strategy, module = GossipStrategy(num_clients=4), Classifier(norm=False)
    fit(strategy, module)
    exported = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    torch.testing.assert_close(exported, strategy.bank.rows.matrix.mean(dim=0))
    strategy.bank.rows.matrix.zero_()
    assert all((parameter != 0).any() for parameter in module.parameters())


def test_a_fit_that_ends_within_a_round_exports_the_mean_of_the_rows_as_they_are() -> None:
    strategy, module = GossipStrategy(num_clients=4), Classifier(norm=False)
    fit(strategy, module, max_steps=5, max_epochs=-1)  # a round has four joint steps
    assert (strategy.round, strategy.joint_index) == (1, 1)
    exported = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    torch.testing.assert_close(exported, strategy.bank.rows.matrix.mean(dim=0))


def test_predict_test_and_validate_use_the_consensus_model() -> None:
    strategy, module = FedAvgStrategy(num_clients=4, cohort_size=2), Classifier()
    train, val = loaders(clients(4))
    fit(strategy, module, (train, val))
    trainer = module.trainer
    during = float(trainer.callback_metrics["val/loss"])
    assert trainer.validate(module, val, verbose=False)[0]["val/loss"] == pytest.approx(during, abs=1e-6)
    assert trainer.test(module, val, verbose=False)[0]["test/loss"] == pytest.approx(during, abs=1e-6)
    assert sum(len(part) for part in trainer.predict(module, val)) == len(val.dataset)


def test_clients_are_evaluated_on_the_common_set_and_on_their_own_split() -> None:
    strategy, module = GossipStrategy(num_clients=4, evaluate="both"), Classifier(norm=False, dropout=0.0)
    dataset = clients(4)
    dataset.client_eval_indices = [indices[:4] for indices in dataset.client_indices]
    train, val = loaders(dataset)
    fit(strategy, module, (train, val))
    metrics = module.trainer.callback_metrics
    features, labels = val.dataset.tensors

    def accuracy(client: int, features: torch.Tensor, labels: torch.Tensor) -> float:
        strategy.bank.rows.bind(strategy.bank.rows.matrix[client])
        return float((module.eval()(features).argmax(dim=1) == labels).float().mean())

    common = [accuracy(client, features, labels) for client in range(4)]
    own = [
        accuracy(client, *(tensor[dataset.client_indices[client][:4]] for tensor in dataset.dataset.tensors))
        for client in range(4)
    ]
    for ending, values in (("clients", common), ("own_split", own)):
        assert float(metrics[f"val/acc/{ending}_mean"]) == pytest.approx(np.mean(values), abs=1e-6)
        assert float(metrics[f"val/acc/{ending}_min"]) == pytest.approx(min(values), abs=1e-6)
        assert float(metrics[f"val/acc/{ending}_max"]) == pytest.approx(max(values), abs=1e-6)


def test_evaluating_clients_reports_their_mean_under_the_users_name() -> None:
    module = Classifier()
    fit(GossipStrategy(num_clients=4, evaluate="clients"), module)
    metrics = module.trainer.callback_metrics
    assert metrics["val/acc/clients_min"] <= metrics["val/acc"] <= metrics["val/acc/clients_max"]


def test_transfer_hooks_see_the_users_own_batches() -> None:
    class Transferring(Classifier):
        seen: list[type] = []

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.seen.append(type(batch))
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 0, batch[1]]

    module = Transferring(norm=False)
    fit(GossipStrategy(num_clients=2), module, (DataLoader(samples(16), 4),), max_epochs=1)
    assert set(module.seen) == {list}
    assert float(module.net[0].weight.detach().abs().sum()) > 0


class Augmented(torch.utils.data.Dataset[Any]):
    """Random augmentation in ``__getitem__``, from all three generators that people use."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        import random

        noise = torch.randn(FEATURES) + random.random() + float(np.random.rand())
        return noise + index, index % CLASSES


def test_augmentation_does_not_depend_on_workers() -> None:
    state = Classifier(norm=False).state_dict()

    def run(num_workers: int) -> np.ndarray:
        module = Classifier(norm=False)
        module.load_state_dict(state)
        loader = DataLoader(Augmented(), 4, num_workers=num_workers)
        return fit(GossipStrategy(num_clients=3), module, (loader,), max_epochs=1)

    np.testing.assert_array_equal(run(0), run(2))

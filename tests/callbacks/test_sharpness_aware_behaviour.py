"""SAM's second pass leaves no trace, steps that go wrong do no harm, and what it cannot train it refuses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from federations import Classifier, all_rows, clients, loaders, silent_trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins.precision import MixedPrecision
from sharpness_loop import BATCHES, Looks, Net, batches, distance, fit, plain_sam, twins, weights
from torch import Tensor, nn

from lightning_fed import DFedSAMStrategy, FedAvgStrategy, second_pass
from lightning_fed.callbacks import Grokfast, OrthogonalGradient, SharpnessAware
from lightning_fed.callbacks import sharpness_aware as module_under_test
from lightning_fed.second_pass import untraced
from lightning_fed.sharpness import RhoSteps, perturbed

# ------------------------------------------------------------------------------------------------------- what moves


@pytest.mark.parametrize("chosen", ["normalization", ["net.1.*"], lambda name, parameter: ".1." in name])
def test_only_chosen_parameters_move(chosen: Any) -> None:
    where: list[dict[str, Tensor]] = []

    class Watched(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            where.append({name: parameter.detach().clone() for name, parameter in self.named_parameters()})
            return super().training_step(batch, batch_idx)

    fit(Watched(), SharpnessAware(0.1, parameters=chosen), max_steps=1)
    at_w, at_worst = where
    assert {name for name in at_w if not torch.equal(at_w[name], at_worst[name])} == {"net.1.weight", "net.1.bias"}


def test_parameters_may_be_made_after_set_up() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            self.net = ours.net

    ours, plain = twins()
    fit(Late(), SharpnessAware(0.1), precision="64-true")
    plain_sam(plain, 0.1)
    assert distance(ours, plain) <= 1e-10


class ThawsLater(BaseFinetuning):
    """Freezes the first layer for an epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, initial_denom_lr=1)


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_parameters_may_be_unfrozen_later(every_n_steps: int) -> None:
    where: list[Tensor] = []

    class Watched(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            where.append(self.net[0].weight.detach().clone())
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.2)

    fit(Watched(), ThawsLater(), SharpnessAware(0.1, every_n_steps=every_n_steps))
    first_epoch = BATCHES + -(-BATCHES // every_n_steps)
    assert all(torch.equal(weight, where[0]) for weight in where[:first_epoch])
    pairs = zip(where[first_epoch:], where[first_epoch + 1 :])
    assert any(float((worst - w).norm()) > 0.01 for w, worst in pairs)


# ------------------------------------------------------------------------------------------------------- no trace


class Draws(Classifier):
    """Remembers its dropout masks, and what it draws from NumPy and Python."""

    def __init__(self) -> None:
        super().__init__(momentum=0.9)
        self.masks: list[Tensor] = []
        self.net[3].register_forward_hook(lambda layer, inputs, output: self.masks.append(output == 0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.masks.append(torch.tensor(np.random.rand()))
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        torch.rand(1)  # gradient noise, say: between the two passes


def traces(*callbacks: pl.Callback, **settings: Any) -> dict[str, Any]:
    module: Any = twins(Draws, torch.float32)[0]
    first: dict[str, Any] = {}

    class AfterOneStep(pl.Callback):
        """By then the weights of both runs are still the same, so everything must be."""

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 1 and not first:
                metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "sam" not in name}
                buffers = {name: value.clone() for name, value in pl_module.net.named_buffers()}
                counts = {"metric": int(pl_module.train_accuracy._update_count), "random": torch.rand(1)}
                state = {"correct": pl_module.train_accuracy.tp.clone(), "masks": list(pl_module.masks)}
                first.update(metrics=metrics, buffers=buffers, **counts, **state)

    fit(module, *callbacks, AfterOneStep(), **settings)
    first["logged"] = set(module.trainer.logged_metrics)
    first["updates"] = int(module.net[1].num_batches_tracked)
    return first


GUARDS = ("log", "metric", "buffers", "random", "mask")


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Which guards must have failed."""
    failed = set()
    if one["metrics"] != other["metrics"]:
        failed.add("log")
    if one["metric"] != other["metric"] or not torch.equal(one["correct"], other["correct"]):
        failed.add("metric")
    same_buffers = all(torch.equal(one["buffers"][name], other["buffers"][name]) for name in one["buffers"])
    if not same_buffers or one["updates"] != other["updates"]:
        failed.add("buffers")
    half = len(other["masks"]) // 2
    for first, second in zip(other["masks"][:half], other["masks"][half:]):
        if not torch.equal(first, second):
            failed.add("mask")
    if not torch.equal(one["random"], other["random"]):
        failed.add("random")
    return failed


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_second_pass_leaves_no_trace(accumulate: int) -> None:
    settings = {"accumulate_grad_batches": accumulate}
    plain, ours = traces(**settings), traces(SharpnessAware(0.5), **settings)
    assert differences(plain, ours) == set()
    assert ours["logged"] - plain["logged"] == {"sam/rho", "sam/sharpness", "sam/fallbacks"}
    assert len(ours["masks"]) == 2 * len(plain["masks"])


@pytest.mark.parametrize("guard", GUARDS)
def test_each_guard_is_needed(guard: str, monkeypatch: Any) -> None:
    """Taking out any one of them shows, so the test above can fail."""
    no_guard = lambda *args, **kwargs: nullcontext()  # noqa: E731
    names = {"log": "unlogged", "metric": "frozen", "buffers": "restored_buffers", "random": "isolate_rng"}
    if guard == "mask":
        monkeypatch.setattr(module_under_test, "restore_random_state", lambda state: None)
    else:
        monkeypatch.setattr(second_pass, names[guard], no_guard)
    assert differences(traces(), traces(SharpnessAware(0.5))) == {guard}


# --------------------------------------------------------------------------------------------- steps that go wrong


class Cliff(Net):
    """The loss is NaN, or overflows, at the evaluations named."""

    def __init__(self, bad: set[int], value: float = torch.nan) -> None:
        super().__init__()
        self.bad, self.value, self.evaluations = bad, value, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.evaluations += 1
        return loss * self.value if self.evaluations - 1 in self.bad else loss


def test_a_nan_at_the_worst_point_takes_the_plain_gradient() -> None:
    ours, plain = Cliff({3}), Net()
    plain.load_state_dict(ours.state_dict())
    callback, looks = SharpnessAware(0.1), Looks()
    with pytest.warns(UserWarning, match=r"step 1: the loss .* not finite .* plain gradient.* Lower rho=0.1"):
        trainer = fit(ours, callback, looks, max_epochs=1)
    nn.utils.vector_to_parameters(looks.weights[1].float(), plain.parameters())
    batch = batches(dtype=torch.float32)[1]
    g = torch.autograd.grad(plain.loss(batch), list(plain.parameters()))
    torch.testing.assert_close(looks.gradients[1], torch.cat([part.reshape(-1) for part in g]))
    assert callback.fallbacks == 1 == trainer.callback_metrics["sam/fallbacks"]
    assert torch.isfinite(weights(ours)).all() and trainer.global_step == BATCHES
    assert torch.isfinite(trainer.callback_metrics["sam/sharpness"])


def test_a_loss_that_is_left_out_at_the_worst_point_counts_as_nan() -> None:
    class LeavesOut(Cliff):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if torch.isfinite(loss) else None

    callback = SharpnessAware(0.1)
    fit(LeavesOut({3}), callback)
    assert callback.fallbacks == 1


def test_a_minibatch_that_is_left_out_of_the_first_pass_is_left_out_of_both() -> None:
    class LeavesOut(Net):
        seen = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module = LeavesOut()
    fit(module, SharpnessAware(0.1), max_epochs=1, accumulate_grad_batches=2)
    assert module.seen == BATCHES + BATCHES // 2 and torch.isfinite(weights(module)).all()


def test_a_minibatch_whose_gradient_is_cleared_is_not_evaluated_again() -> None:
    class StepsEverySecondTime(Net):
        seen = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            return super().training_step(batch, batch_idx)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    module = StepsEverySecondTime()
    fit(module, SharpnessAware(0.1), max_epochs=1)
    assert module.seen == BATCHES + BATCHES // 2


@pytest.mark.parametrize("evaluation", [2, 3])  # of step 1: the first pass, and the second one
def test_an_overflow_of_either_pass_skips_the_step_and_lowers_the_scale(evaluation: int) -> None:
    class Overflows(Cliff):
        """A finite loss whose scaled gradient is not."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = Net.training_step(self, batch, batch_idx)
            self.evaluations += 1
            steep = sum(parameter.sum() for parameter in self.parameters())
            return loss + 1e36 * (steep - steep.detach()) if self.evaluations - 1 in self.bad else loss

    module, callback, looks = Overflows({evaluation}), SharpnessAware(0.1), Looks()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = fit(module, callback, looks, max_steps=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert torch.equal(looks.weights[1], looks.weights[2]) and not torch.equal(looks.weights[2], looks.weights[3])
    assert (callback.overflows, callback.fallbacks, scaler.get_scale()) == (1, 0, 512.0)
    assert trainer.callback_metrics["sam/overflows"] == 1 and torch.isfinite(weights(module)).all()


@pytest.mark.filterwarnings("ignore:.*exception")
def test_an_error_at_the_worst_point_leaves_the_weights_where_they_were() -> None:
    class Fails(Net):
        evaluations = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.evaluations += 1
            if self.evaluations == 2:
                raise RuntimeError("out of memory, say")
            return super().training_step(batch, batch_idx)

    module = Fails()
    start = weights(module)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, SharpnessAware(0.1))
    assert torch.equal(weights(module), start)
    assert "training_step" not in vars(module.trainer.strategy) and "log" not in vars(module)


def test_a_client_whose_worst_point_is_not_finite_takes_its_plain_gradient() -> None:
    class CliffOfClients(Classifier):
        evaluations = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.evaluations += 1
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if self.evaluations == 4 else loss  # the second client's second pass

    callback, strategy = SharpnessAware(0.2), FedAvgStrategy(num_clients=4)
    trainer = silent_trainer(strategy, callbacks=[callback], max_epochs=1)
    trainer.fit(CliffOfClients(), *loaders(clients(4)))
    assert callback.fallbacks == 1 and np.isfinite(all_rows(strategy)).all()
    assert trainer.callback_metrics["sam/fallbacks"] == 1


# -------------------------------------------------------------------------------------- manual optimization, refusals


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with perturbed(self.named_parameters(), rho=0.1), untraced(self):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
        optimizer.step()


def test_the_functional_core_is_the_way_out_of_manual_optimization() -> None:
    ours, plain = twins()
    manual = Manual().double()
    manual.load_state_dict(ours.state_dict())
    trainer = fit(manual, precision="64-true")
    plain_sam(plain, 0.1)
    assert distance(manual, plain) <= 1e-10 and trainer.global_step == 2 * BATCHES
    with pytest.raises(ValueError, match=r"automatic_optimization=False .* lightning_fed\.sharpness\.perturbed"):
        fit(Manual(), SharpnessAware())


def test_the_core_moves_nothing_without_a_direction() -> None:
    layer = nn.Linear(3, 2)
    start = weights(layer)
    with perturbed(layer.named_parameters(), rho=0.1):
        assert torch.equal(weights(layer), start)
    layer.weight.grad = torch.full_like(layer.weight, torch.inf)
    with perturbed(layer.named_parameters(), rho=0.1):
        assert torch.equal(weights(layer), start)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho=-0.1 must not be negative"),
        ({"rho": float("nan")}, "rho=nan must be a number"),
        ({"p": 1.0}, "p=1.0 must be more than 1"),
        ({"eta": -1.0}, "eta=-1.0 must not be negative"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"parameters": "norm"}, "parameters='norm' must be"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessAware(**settings)


def test_schedules_out_of_range() -> None:
    with pytest.raises(ValueError, match="2 values and 2 milestones"):
        RhoSteps([0.1, 0.2], [1, 2])
    with pytest.raises(ValueError, match=r"milestones=\[3, 2\] must grow"):
        RhoSteps([0.1, 0.2, 0.3], [3, 2])
    with pytest.raises(ValueError, match="rho=-1 must not be negative"):
        fit(Net(), SharpnessAware(rho_schedule=lambda step: -1))


class Mine(SharpnessAware):
    """A user's own."""


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([SharpnessAware(), SharpnessAware(0.1)], "more than one .* `SharpnessAware`"),  # says Lightning
        ([SharpnessAware(), Mine(0.1)], "two SharpnessAware callbacks"),
        ([Grokfast(), SharpnessAware()], r"\[Grokfast, SharpnessAware\] .* must be \[SharpnessAware, Grokfast\]"),
        ([OrthogonalGradient(), SharpnessAware()], r"must be \[SharpnessAware, OrthogonalGradient\]"),
        ([SharpnessAware(parameters=["head.*"])], r"parameters=\['head.\*'\] selects none .*net.0.weight"),
    ],
)
def test_refused_callbacks(callbacks: list[pl.Callback], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(Net(), *callbacks)


def test_refused_strategies_and_optimizers() -> None:
    class Quasi(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    class Fused(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), fused=True)

    with pytest.raises(ValueError, match="SharpnessAware with LBFGS"):
        fit(Quasi(), SharpnessAware())
    with pytest.raises(ValueError, match=r"Adam\(fused=True\) under 16-mixed"):
        fit(Fused(), SharpnessAware(), plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    with pytest.raises(ValueError, match="DFedSAMStrategy has a local rule of its own, SharpnessAwareRule"):
        fit(Net(), SharpnessAware(), strategy=DFedSAMStrategy(num_clients=4))
    with pytest.raises(ValueError, match="every_n_steps=2, m_sharpness=True: under FedAvgStrategy each client"):
        fit(Net(), SharpnessAware(every_n_steps=2), strategy=FedAvgStrategy(num_clients=4))


def test_weights_of_half_precision_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="use precision='bf16-mixed'"):
        fit(Net(), SharpnessAware(), precision="bf16-true", max_steps=1)

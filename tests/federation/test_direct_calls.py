"""The short ways to a gradient and to an optimizer's step do what the long ways do, to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_fed.federation.direct_calls import backpropagate, direct_step, is_plain_sgd


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (3,), (4,), ())
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def closure_of(values: list[nn.Parameter], step: int) -> Callable[[], Tensor]:
    """Gradients for all parameters but the third, which is not used."""

    def closure() -> Tensor:
        for value in values:
            value.grad = None
        loss = torch.stack([(value * (1 + step)).sin().sum() for i, value in enumerate(values) if i != 2]).sum()
        loss.backward()
        return loss

    return closure


def groups(values: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": values[:2], "lr": 0.3}, {"params": values[2:], "weight_decay": 0.1}]


PLAIN: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda values: SGD(values, lr=0.1),
    "decay": lambda values: SGD(values, lr=0.1, weight_decay=0.3),
    "groups": lambda values: SGD(groups(values), lr=0.1),
    "nothing to step": lambda values: SGD([values[2]], lr=0.1),
}


class OwnSGD(SGD):
    """An optimizer of the user's."""


OTHERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "momentum": lambda values: SGD(values, lr=0.1, momentum=0.9),
    "momentum of a group": lambda values: SGD(
        [{"params": values[:2], "momentum": 0.9}, {"params": values[2:]}], lr=0.1
    ),
    "maximize": lambda values: SGD(values, lr=0.1, maximize=True),
    "tensor": lambda values: SGD(values, lr=torch.tensor(0.1)),
    "one by one": lambda values: SGD(values, lr=0.1, foreach=False),
    "fused": lambda values: SGD(values, lr=0.1, fused=True),
    "own": lambda values: OwnSGD(values, lr=0.1),
    "adam": lambda values: Adam(values, lr=0.1),
}


@pytest.mark.parametrize("make", [*PLAIN.values(), *OTHERS.values()], ids=[*PLAIN, *OTHERS])
def test_a_direct_step_is_the_optimizers_step(make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    ours, theirs = parameters(), parameters()
    mine, reference = make(ours), make(theirs)
    for step in range(4):
        loss = direct_step(mine)(closure=closure_of(ours, step))
        assert torch.equal(loss, reference.step(closure=closure_of(theirs, step)))  # type: ignore[arg-type]
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)
    assert torch.equal(ours[2], parameters()[2])
    assert len(mine.state) == len(reference.state)
    assert torch.is_grad_enabled()


def test_only_the_plainest_sgd_is_written_out() -> None:
    for make in PLAIN.values():
        assert is_plain_sgd(make(parameters()))
    for make in OTHERS.values():
        assert not is_plain_sgd(make(parameters()))


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("make", [PLAIN["sgd"], OTHERS["adam"]])
def test_hooks_are_called_while_they_are_registered(
    make: Callable[[list[nn.Parameter]], Optimizer], kind: str, everywhere: bool
) -> None:
    values, calls = parameters(), []
    optimizer = make(values)
    registers = {
        ("pre", False): optimizer.register_step_pre_hook,
        ("post", False): optimizer.register_step_post_hook,
        ("pre", True): register_optimizer_step_pre_hook,
        ("post", True): register_optimizer_step_post_hook,
    }
    handle = registers[kind, everywhere](lambda *arguments: calls.append(arguments[0]))
    direct_step(optimizer)(closure=closure_of(values, 0))
    handle.remove()
    direct_step(optimizer)(closure=closure_of(values, 1))
    assert calls == [optimizer]


def test_a_profiler_sees_the_step() -> None:
    values = parameters()
    optimizer = SGD(values, lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        direct_step(optimizer)(closure=closure_of(values, 0))
    assert "Optimizer.step#SGD.step" in {event.key for event in profiler.key_averages()}


def test_a_scheduler_notices_the_steps_and_the_next_step_has_its_rate() -> None:
    ours, theirs = parameters(), parameters()
    mine, reference = SGD(ours, lr=0.1), SGD(theirs, lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (mine, reference)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that steps before its optimizer
        for step in range(3):
            direct_step(mine)(closure=closure_of(ours, step))
            reference.step(closure=closure_of(theirs, step))  # type: ignore[arg-type]
            for scheduler in schedulers:
                scheduler.step()
    assert direct_step(mine) is not mine.step
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)


def test_a_step_that_the_user_has_replaced_is_called() -> None:
    optimizer = SGD(parameters(), lr=0.1)
    optimizer.step = lambda closure: "the user's"  # type: ignore[method-assign, assignment]
    assert direct_step(optimizer)(closure=None) == "the user's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_gradients_are_those_of_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = [torch.linspace(-1, 1, 6, dtype=dtype).requires_grad_() for _ in range(2)]
    for value, backward in zip(values, (backpropagate, Tensor.backward)):
        backward(value.sin().sum().reshape(shape))
    assert values[0].grad is not None and torch.equal(values[0].grad, values[1].grad)  # type: ignore[arg-type]


def test_gradients_accumulate_and_a_hook_may_change_them() -> None:
    value = nn.Parameter(torch.ones(()))
    for _ in range(2):
        loss = value * 3
        loss.register_hook(lambda gradient: gradient.mul_(2))
        backpropagate(loss)
    assert value.grad is not None and float(value.grad) == 12
    backpropagate(value)  # a loss that is a parameter: its gradient is nobody else's memory
    value.grad.zero_()
    other = nn.Parameter(torch.ones(()))
    backpropagate(other)
    assert other.grad is not None and float(other.grad) == 1


def test_what_cannot_be_backpropagated_is_refused_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        backpropagate(torch.zeros(()))
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        backpropagate(torch.zeros(2, requires_grad=True))

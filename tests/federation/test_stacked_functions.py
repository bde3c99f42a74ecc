"""Functions that are treated below vmap give each client what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fed.federation.stacked_functions import ClientGenerators, StackedFunctions, for_each_client

SEEDS = [11, 22, 33]


def assert_each_gets_its_own(function: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Values, and gradients of the first tensor, of three clients in one step and one by one."""
    with StackedFunctions(3, ClientGenerators(lambda: SEEDS, torch.device("cpu"))):
        (together,) = for_each_client(lambda *own: [function(*own)], tensors)
    alone = []
    for seed, own in zip(SEEDS, zip(*tensors, strict=True), strict=True):
        torch.manual_seed(seed)
        alone.append(function(*own))
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-12)
    if tensors[0].requires_grad:
        gradients = [torch.autograd.grad(values.sum(), tensors[0])[0] for values in (together, torch.stack(alone))]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


LABELS = torch.tensor([[0, 1, 2, 3, 0], [2, 2, 1, 0, 3], [-100, 1, 3, 3, 2]])


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"ignore_index": 2}, {"reduction": "sum"}])
def test_cross_entropy(settings: dict[str, Any]) -> None:
    labels = LABELS.clamp(min=0) if "ignore_index" in settings else LABELS
    assert_each_gets_its_own(partial(F.cross_entropy, **settings), numbers(3, 5, 4), labels)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_layers(shape: tuple[int, ...], has_bias: bool) -> None:
    biases = [numbers(3, 4)] if has_bias else []
    assert_each_gets_its_own(F.linear, numbers(3, *shape), numbers(3, 4, 7), *biases)
    assert_each_gets_its_own(lambda w, x: F.linear(x, w), numbers(3, 4, 7), numbers(3, *shape))


def test_batch_norm_updates_the_statistics_of_each_client() -> None:
    x, mean, variance = numbers(3, 6, 4, 2), torch.zeros(3, 4).double(), torch.ones(3, 4).double()
    own = [mean.clone(), variance.clone()]
    assert_each_gets_its_own(lambda x: F.batch_norm(x, None, None, training=True), x)
    with StackedFunctions(3, ClientGenerators(lambda: SEEDS, torch.device("cpu"))):
        for_each_client(lambda x, m, v: [F.batch_norm(x, m, v, training=True)], [x, mean, variance])
    for number in range(3):
        F.batch_norm(x[number], own[0][number], own[1][number], training=True)
    torch.testing.assert_close([mean, variance], own, rtol=0, atol=1e-12)


ATTENTION = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).double()
RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4) + F.dropout(x, 0.4),
    "dropout in place": lambda x: F.dropout(x * 1.0, 0.4, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "new tensors": lambda x: x + torch.randn(8).double() + torch.rand_like(x) + torch.randint(0, 9, (2, 8)),
    "filled in place": lambda x: x + x.detach().clone().normal_() + torch.zeros_like(x).uniform_(),
    "bernoulli": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "gumbel": lambda x: F.gumbel_softmax(x, tau=0.5),
    "attention": lambda x: ATTENTION(x[None], x[None], x[None])[0],
    "scaled attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.3),
}


@pytest.mark.parametrize("name", RANDOM)
def test_clients_draw_what_they_would_draw_alone(name: str) -> None:
    assert_each_gets_its_own(RANDOM[name], numbers(3, 2, 8))


def test_drawing_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with StackedFunctions(3, ClientGenerators(lambda: SEEDS, torch.device("cpu"))):
        for_each_client(lambda x: [F.dropout(x)], [torch.ones(3, 4)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_function_of_another_kind_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="random"), StackedFunctions(3, ClientGenerators(list, torch.device("cpu"))):
        for_each_client(lambda x: [torch.ops.aten.rand_like(x)], [torch.ones(3, 4)])

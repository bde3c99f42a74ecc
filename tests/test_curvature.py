"""Eigenvalues and traces against matrices that are known, or small enough to be formed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fed.curvature import Hessian, loss_along, stability_threshold, top_eigenvalue, trace


def matrix_with(eigenvalues: list[float]) -> Tensor:
    """A symmetric float64 matrix in no special basis."""
    random = torch.randn(len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(1)).double()
    basis = torch.linalg.qr(random)[0]
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def quadratic(matrix: Tensor, parts: list[int] | None = None) -> Hessian:
    """Of ``w' A w / 2``, with w in one or several parameters."""
    w = [nn.Parameter(torch.ones(size).to(matrix)) for size in parts or [len(matrix)]]
    return Hessian([lambda: torch.cat(w) @ matrix @ torch.cat(w) / 2], w)


class Network(nn.Module):
    """Parameters of each kind: in the loss, linear in it, not in it, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.linear_in_loss, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.layers(inputs) * self.frozen.sum()
        return nn.functional.cross_entropy(logits, labels) + self.linear_in_loss.sum()


def network(batches: int = 1) -> tuple[Network, list[Callable[[], Tensor]], Tensor]:
    """A network in float64, its losses, and the Hessian of their mean."""
    torch.manual_seed(0)
    module = Network().double()
    data = [(torch.randn(16, 4).double(), torch.randint(3, (16,))) for _ in range(batches)]
    names, values = zip(*((name, p.detach()) for name, p in module.named_parameters() if p.requires_grad))

    def mean_loss(flat: Tensor) -> Tensor:
        parts = [part.view_as(value) for part, value in zip(flat.split([v.numel() for v in values]), values)]
        inputs = dict(zip(names, parts))
        return torch.stack(
            [torch.func.functional_call(Wrapped(module), prefixed(inputs), pair) for pair in data]
        ).mean()

    full = torch.func.hessian(mean_loss)(torch.cat([value.reshape(-1) for value in values]))
    return module, [lambda pair=pair: module.loss(*pair) for pair in data], full


class Wrapped(nn.Module):
    """The loss as a forward pass."""

    def __init__(self, module: Network) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.module.loss(inputs, labels)


def prefixed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in inputs.items()}


# ---------------------------------------------------------------------------------------------------------- quadratics


@pytest.mark.parametrize("parts", [None, [1, 2, 3]])
def test_the_top_eigenvalue_of_a_known_matrix(parts: Any) -> None:
    found = top_eigenvalue(quadratic(matrix_with([5, 4, 1, 0.5, 0, -2]), parts), 1000, 1e-7)
    assert found.value == pytest.approx(5, rel=1e-9) and found.converged
    assert found.vector.norm() == pytest.approx(1) and found.residual <= 1e-7 * 5


def test_the_largest_number_is_not_the_largest_magnitude() -> None:
    hessian = quadratic(matrix_with([3, 1, 0.5, -2, -7]))
    assert top_eigenvalue(hessian, 1000, 1e-7, which="magnitude").value == pytest.approx(-7, rel=1e-9)
    assert top_eigenvalue(hessian, 1000, 1e-7).value == pytest.approx(3, rel=1e-9)
    assert top_eigenvalue(quadratic(matrix_with([-1, -2, -5])), 1000, 1e-7).value == pytest.approx(-1, rel=1e-9)


def test_two_eigenvalues_of_opposite_signs_are_not_mixed_up() -> None:
    hessian = quadratic(matrix_with([4, 1, 0, -4]))
    mixed = [top_eigenvalue(hessian, 200, 1e-7, which="magnitude", seed=seed) for seed in range(6)]
    # Where the quotient stands still, on either side of zero.
    assert not any(found.converged for found in mixed) and min(f.value for f in mixed) < 0 < max(f.value for f in mixed)
    for seed in range(6):
        found = top_eigenvalue(hessian, 200, 1e-7, seed=seed)
        assert found.converged and found.value == pytest.approx(4, rel=1e-9)


def test_no_curvature_and_no_number() -> None:
    flat = nn.Parameter(torch.ones(3))
    found = top_eigenvalue(Hessian([lambda: flat.sum()], [flat]))
    assert found.value == 0 and found.converged and found.products == 1
    infinite = nn.Parameter(torch.zeros(3))
    assert math.isnan(top_eigenvalue(Hessian([lambda: infinite.sqrt().prod()], [infinite])).value)


def test_the_tolerance_bounds_the_residual_and_spares_products() -> None:
    hessian = quadratic(matrix_with([5, 4.5, 3, 1]))
    rough, fine = top_eigenvalue(hessian, tolerance=0.1), top_eigenvalue(hessian, 1000, tolerance=1e-4)
    assert rough.residual <= 0.1 * rough.value and fine.residual <= 1e-4 * fine.value
    assert rough.products < fine.products
    few = top_eigenvalue(hessian, iterations=3, tolerance=1e-9, which="magnitude")
    assert few.products == 3 and not few.converged


def test_the_trace_of_a_diagonal_matrix_is_exact() -> None:
    found = trace(quadratic(torch.diag(torch.tensor([5.0, -3.0, 0.25, 100.0], dtype=torch.float64))), samples=2)
    assert found.value == pytest.approx(102.25, rel=1e-14) and found.error == 0


def test_the_trace_lies_within_its_error_and_the_error_is_hutchinsons() -> None:
    matrix = matrix_with([5, 4, 1, 0.5, 0, -2, 7, 3])
    found = trace(quadratic(matrix), samples=400)
    assert abs(found.value - 18.5) < 3 * found.error
    off_diagonal = matrix.square().sum() - matrix.diag().square().sum()
    assert found.error == pytest.approx(math.sqrt(2 * off_diagonal / 400), rel=0.15)


def test_seeds_decide() -> None:
    hessian = quadratic(matrix_with([5, 4, 1, -2]))
    for measure in (top_eigenvalue, trace):
        assert measure(hessian, seed=3)[0] == measure(hessian, seed=3)[0] != measure(hessian, seed=4)[0]


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("batches", [1, 3])
def test_a_networks_eigenvalue_trace_and_gradient(batches: int) -> None:
    module, losses, full = network(batches)
    hessian = Hessian(losses, module.parameters())
    assert hessian.size == len(full) == 4 * 5 + 5 + 5 * 3 + 3 + 2 + 3
    columns = torch.stack([hessian @ unit for unit in torch.eye(len(full)).double()])
    torch.testing.assert_close(columns, full, rtol=0, atol=1e-14)
    exact = torch.linalg.eigvalsh(full)
    assert top_eigenvalue(hessian, 5000, 1e-7).value == pytest.approx(float(exact[-1]), rel=1e-10)
    found = trace(hessian, samples=100)
    assert abs(found.value - float(full.trace())) < 3 * found.error
    torch.stack([loss() for loss in losses]).mean().backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    for gradient, parameter in zip(hessian.gradient(), trained):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def test_gradients_and_weights_are_left_alone() -> None:
    module, losses, _ = network()
    module.unused.grad = torch.full((3,), 7.0).double()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hessian = Hessian(losses, module.parameters())
    top_eigenvalue(hessian), trace(hessian)
    loss_along(losses, hessian.parameters, hessian.gradient(), [0.5, 1e6])
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"unused"}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("batches", [1, 2])
def test_a_kept_graph_saves_evaluations(batches: int) -> None:
    module, losses, _ = network(batches)
    calls = []
    counted = [lambda loss=loss: (calls.append(1), loss())[1] for loss in losses]
    hessian = Hessian(counted, module.parameters())
    for _ in range(5):
        hessian @ torch.ones(hessian.size).double()
    assert len(calls) == (1 if batches == 1 else 5 * batches)


def test_sixteen_bit_weights_are_measured_with_vectors_of_thirty_two() -> None:
    module = network()[0].bfloat16()
    inputs, labels = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(16) % 3
    hessian = Hessian([lambda: module.loss(inputs, labels)], module.parameters())
    half = top_eigenvalue(hessian)
    assert half.vector.dtype == torch.float32
    module.float()
    whole = Hessian([lambda: module.loss(inputs.float(), labels)], module.parameters())
    assert half.value == pytest.approx(top_eigenvalue(whole).value, rel=0.03)


def test_attention_has_a_second_derivative() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    found = top_eigenvalue(
        Hessian([lambda: attention(x, x, x, need_weights=False)[0].square().mean()], attention.parameters())
    )
    assert found.value > 0 and found.converged


def test_the_loss_along_a_line() -> None:
    matrix = matrix_with([5, 4, -2])
    hessian = quadratic(matrix, [1, 2])
    direction = [torch.tensor([1.0]).double(), torch.tensor([0.0, 2.0]).double()]
    w, e = torch.ones(3).double(), torch.cat(direction)
    expected = [float((w + r * e) @ matrix @ (w + r * e) / 2) for r in (0.0, 0.1, -3.0)]
    assert loss_along(hessian.losses, hessian.parameters, direction, [0.0, 0.1, -3.0]) == pytest.approx(expected)
    assert all(torch.equal(p, torch.ones_like(p)) for p in hessian.parameters)


def test_weights_come_back_when_a_loss_fails() -> None:
    w = nn.Parameter(torch.tensor([0.1]))

    def loss() -> Tensor:
        assert w < 1, "too far"
        return w.sum()

    with pytest.raises(AssertionError, match="too far"):
        loss_along([loss], [w], [torch.ones(1)], [0.5, 2.0])
    assert w.item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("given", [([], [nn.Parameter(torch.ones(1))]), ([lambda: torch.ones(())], [])])
def test_a_hessian_needs_losses_and_parameters(given: Any) -> None:
    with pytest.raises(ValueError, match="a Hessian needs losses"):
        Hessian(*given)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_descent_diverges_above_the_threshold_and_not_below(settings: dict[str, Any]) -> None:
    ends = []
    for factor in (0.98, 1.02):
        curvature = factor * stability_threshold(0.1, **settings)
        w = nn.Parameter(torch.ones(1).double())
        optimizer = torch.optim.SGD([w], lr=0.1, **settings)
        for _ in range(2000):
            w.grad = curvature * w.detach()
            optimizer.step()
        ends.append(abs(w.item()))
    assert ends[0] < 1e-6 and ends[1] > 1e6

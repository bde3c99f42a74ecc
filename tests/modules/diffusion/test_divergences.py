"""Weights of divergences by automatic differentiation, and what is known of their values and variances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from line_distributions import Mixture, Normal
from torch import Tensor

from lightning_fed.modules.diffusion.divergences import Divergence, ForwardKL

NAMES = [
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "jeffreys",
    "forward_kl",
    "pearson_chi2",
    "neyman_chi2",
]
RATIOS = torch.logspace(-3, 3, 61, dtype=torch.float64)


def derivatives(function: Any, r: Tensor, order: int) -> Tensor:
    for _ in range(order):
        function = torch.func.vmap(torch.func.grad(lambda x, f=function: f(x[None])[0]))
    return function(r)


def test_all_are_there() -> None:
    assert sorted(Divergence.members()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_derivatives(name: str) -> None:
    divergence, r = Divergence.of(name, "divergence"), RATIOS
    h = derivatives(divergence.f, r, 2) * r**2
    expected = {
        "h": h,
        "h_slope": derivatives(divergence.h, r, 1),
        "h_curvature": derivatives(divergence.h, r, 2),
        "fgm_weight": h - r * derivatives(divergence.h, r, 1),
        "di_weight": r**2 * derivatives(divergence.h, r, 2),
    }
    for method, value in expected.items():
        torch.testing.assert_close(getattr(divergence, method)(r), value, rtol=1e-6, atol=1e-9, msg=f"{name}.{method}")
    assert divergence.f(torch.ones(1)) == 0 and divergence.h(r).shape == r.shape
    assert divergence.is_unweighted == bool((h - h[0]).abs().max() < 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_textbooks(name: str) -> None:
    """Both densities normal: N(0.3, 0.8^2) from N(0, 1), in the direction that is finite."""
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    one, other = Normal(torch.tensor(0.3), torch.tensor(0.8)), Normal(torch.tensor(0.0), torch.tensor(1.0))
    p, q = (other, one) if name == "neyman_chi2" else (one, other)
    log_p, log_q = p.log_density(x), q.log_density(x)

    def kl(log_u: Tensor, log_v: Tensor) -> Tensor:
        return torch.trapezoid(log_u.exp() * (log_u - log_v), x)

    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    squares = (log_p.exp() - log_q.exp()) ** 2
    expected = {
        "reverse_kl": kl(log_q, log_p),
        "softened_reverse_kl": 2 * kl(log_m, log_p),
        "jensen_shannon": kl(log_p, log_m) + kl(log_q, log_m),
        "squared_hellinger": 1 - torch.trapezoid(((log_p + log_q) / 2).exp(), x),
        "jeffreys": kl(log_p, log_q) + kl(log_q, log_p),
        "forward_kl": kl(log_p, log_q),
        "pearson_chi2": torch.trapezoid(squares / log_q.exp(), x),
        "neyman_chi2": torch.trapezoid(squares / log_p.exp(), x),
    }[name]
    divergence = Divergence.of(name, "divergence")
    value = torch.trapezoid(log_q.exp() * divergence.f((log_p - log_q).exp()), x)
    assert float(value) == pytest.approx(float(expected), rel=1e-6) and value > 0.01


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("reverse_kl", ("0", "0", "0")),
        ("softened_reverse_kl", ("0.11", "0.10", "0.05")),
        ("jensen_shannon", ("0.26", "1.2", "4.1")),
        ("squared_hellinger", ("0.28", "1.7", "8.5")),
        ("forward_kl", ("1.7", "54", "8102")),
        ("jeffreys", ("0.43", "13", "2026")),
        ("neyman_chi2", ("1.7", "54", "8102")),
    ],
)
def test_the_variance_of_weights(name: str, printed: tuple[str, ...]) -> None:
    """``Var h / (E h)^2`` under the student, two unit normals at distances 1, 2 and 3."""
    x = torch.linspace(-40, 40, 80001, dtype=torch.float64)
    divergence = Divergence.of(name, "divergence")
    for distance, digits in zip((1, 2, 3), printed):
        log_q = Normal(torch.tensor(0.0), torch.tensor(1.0)).log_density(x)
        r = (x * distance - distance**2 / 2).exp()
        first, second = (torch.trapezoid(log_q.exp() * divergence.h(r) ** k, x) for k in (1, 2))
        found = float(second / first**2 - 1)
        half_a_digit = 0.5 * 10.0 ** -(len(digits.partition(".")[2]))
        assert abs(found - float(digits)) <= half_a_digit * 1.001, (distance, found)
        if name == "forward_kl":
            assert found == pytest.approx(math.exp(distance**2) - 1, rel=1e-6)


def test_pearson_has_the_largest_variance() -> None:
    x = torch.linspace(-40, 40, 80001, dtype=torch.float64)
    q, h = Normal(torch.tensor(0.0), torch.tensor(1.0)).log_density(x).exp(), 2 * (2 * x - 1).exp()
    torch.testing.assert_close(Divergence.of("pearson_chi2", "divergence").h((x - 0.5).exp()), h, rtol=1e-9, atol=0)
    found = torch.trapezoid(q * h**2, x) / torch.trapezoid(q * h, x) ** 2 - 1
    assert float(found) == pytest.approx(math.exp(4) - 1, rel=1e-6)


def test_a_divergence_is_chosen_by_name() -> None:
    for choice in ("forward_kl", {"name": "forward_kl"}, ForwardKL()):
        assert Divergence.of(choice, "divergence") == ForwardKL()
    with pytest.raises(ValueError, match=r"divergence='foward_kl' is unknown: did you mean 'forward_kl'"):
        Divergence.of("foward_kl", "divergence")


def test_the_mixture_of_these_tests_is_one() -> None:
    """Its score is the slope of its density, which is the convolution of the clean one."""
    mixture, x = Mixture(), torch.linspace(-30, 30, 6001, dtype=torch.float64)
    slope = torch.func.vmap(torch.func.grad(lambda v: mixture.log_density(v[None], 0.7)[0]))(x)
    torch.testing.assert_close(mixture.score(x, 0.7), slope)
    noise = Normal(torch.tensor(0.0), torch.tensor(0.7)).log_density(x - 1.3).exp()
    density = torch.trapezoid(mixture.log_density(x).exp() * noise, x)
    found = mixture.log_density(torch.tensor([1.3], dtype=torch.float64), 0.7).exp()
    assert float(found) == pytest.approx(float(density), rel=1e-6)

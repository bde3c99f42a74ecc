"""StableMax cross-entropy against its definition, and where softmax has no gradient left."""

from __future__ import annotations

import pytest
import torch

from lightning_fed.modules import StableMaxCrossEntropy


def definition(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """p_i = s(x_i) / sum_j s(x_j), element by element; the mean of -log p_y."""
    losses = []
    for x, y in zip(logits.double(), labels):
        s = torch.stack([value + 1 if value >= 0 else 1 / (1 - value) for value in x])
        losses.append(-(s[y] / s.sum()).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_the_loss_and_its_gradient_are_those_of_the_definition(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(7, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(5, (7,), generator=generator)
    ours, plain = StableMaxCrossEntropy()(logits, labels), definition(logits, labels)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


def test_the_gradient_survives_where_softmaxs_is_rounded_to_zero() -> None:
    logits, labels = torch.tensor([[120.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    (softmax,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), logits)
    (stable,) = torch.autograd.grad(StableMaxCrossEntropy()(logits, labels), logits)
    assert (softmax == 0).all() and (stable.abs() > 1e-5).all()


def test_reductions_and_dtypes() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float16), torch.arange(6) % 4
    each = StableMaxCrossEntropy("none")(logits, labels)
    assert each.shape == (6,) and each.dtype == torch.float64
    torch.testing.assert_close(StableMaxCrossEntropy("sum")(logits, labels), each.sum())
    torch.testing.assert_close(StableMaxCrossEntropy()(logits, labels), each.mean())
    assert StableMaxCrossEntropy(dtype="float32")(logits, labels).dtype == torch.float32


def test_refusals() -> None:
    with pytest.raises(ValueError, match="reduction='max' is not one of"):
        StableMaxCrossEntropy("max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype='float16' is not one of"):
        StableMaxCrossEntropy(dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logits \[2, 3, 4\] and labels \[2, 3\] .* flatten tokens"):
        StableMaxCrossEntropy()(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))


def test_a_logit_of_one_where_the_other_side_divides_by_zero() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0]], requires_grad=True)
    StableMaxCrossEntropy()(logits, torch.tensor([0])).backward()
    # s = 2, 3, 1/2 of sum 11/2; ds = 1, 1, 1/4
    expected = torch.tensor([[-1 / 2 + 2 / 11, 2 / 11, 2 / 44]])
    torch.testing.assert_close(logits.grad, expected)

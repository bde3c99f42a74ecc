"""Cross-entropy over a softmax without exponentials (Prieto, Barsbey, Mediano, Birdal 2025, arXiv 2501.04697)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_fed.checks import check_choice


class StableMaxCrossEntropy(nn.Module):
    """``-log p_y`` with ``p_i = s(x_i) / sum_j s(x_j)``, ``s(x) = x + 1`` for x >= 0 and ``1 / (1 - x)`` below.

    Softmax rounds the probability of the right class to one when its logit leads by 17 in float32, and the gradient to
    zero; s grows linearly, so that this takes a lead of 10^7. The loss is ``log(1 + sum_{j != y} s_j / s_y)``, which is
    exact also near zero, and is computed in float64 as in the authors' code.

    Args:
        reduction: over samples: ``"mean"``, ``"sum"`` or ``"none"``.
        dtype: of the computation. ``"float32"`` is for devices without float64 (MPS).

    Shapes:
        logits ``[B, C]`` float, labels ``[B]`` integer; loss: a scalar, or ``[B]`` without reduction, in ``dtype``.

    Raises:
        ValueError: if ``reduction`` or ``dtype`` is none of these, or logits and labels do not fit each other.
    """

    def __init__(
        self,
        reduction: Literal["mean", "sum", "none"] = "mean",
        dtype: Literal["float64", "float32"] = "float64",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, "mean", "sum", "none")
        check_choice("dtype", dtype, "float64", "float32")
        self.reduction, self.dtype = reduction, getattr(torch, dtype)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"logits {list(logits.shape)} and labels {list(labels.shape)} must be [B, C] and [B]: flatten tokens."
            )
        s = stable_max_scores(logits.to(self.dtype))
        right = s.gather(1, labels.unsqueeze(1)).squeeze(1)
        wrong = s.scatter(1, labels.unsqueeze(1), 0.0).sum(dim=1)
        loss = torch.log1p(wrong / right)
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()


def stable_max_scores(logits: Tensor) -> Tensor:
    """``s(x)``: positive, increasing, with ``s(0) = 1`` and a continuous slope."""
    is_negative = logits < 0
    # The fraction sees only its own side, so that it divides by zero nowhere, nor in the backward pass.
    return torch.where(is_negative, 1 / (1 - torch.where(is_negative, logits, 0.0)), logits + 1)

"""Gradients without their part along the weights (Prieto, Barsbey, Mediano, Birdal 2025, arXiv 2501.04697)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fed.callbacks.gradient_order import GradientCallback, gradients
from lightning_fed.checks import check_flags


class OrthogonalGradient(GradientCallback):
    """Removes from each parameter's gradient its part along the parameter, before clipping and the optimizer's step.

    Perp-grad of the paper, which keeps a network from growing its logits for ever: ``g_perp = g - <w, g> / <w, w> w``,
    by tensor; as in the authors' code it is then as long as g was. With Adam the *step* is not orthogonal to w, only
    the gradient is. Left alone: parameters of one number (a temperature), whose g_perp is rounding, and zero weights.

    It keeps no state, and works for each client of a federated strategy.

    Args:
        rescale: give ``g_perp`` the norm of g.
    """

    place = 1

    def __init__(self, rescale: bool = True) -> None:
        check_flags(rescale=rescale)
        self.rescale = rescale

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_optimizers(trainer)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for w, g in gradients(optimizer):
            if g.numel() > 1:
                g.copy_(orthogonal_part(w, g, self.rescale))


def orthogonal_part(w: Tensor, g: Tensor, rescale: bool = True) -> Tensor:
    """``g - <w, g> / <w, w> w``, with the norm of g if ``rescale``; g where w is zero, 0 where g is along w."""
    square = w.square().sum()
    g_perp = g - torch.where(square > 0, (w * g).sum() / square, 0.0) * w
    if rescale:
        norm, norm_perp = g.norm(), g_perp.norm()
        is_rounding = norm_perp <= 10 * torch.finfo(g.dtype).eps * norm
        g_perp = torch.where(is_rounding, 0.0, g_perp * (norm / norm_perp))
    return g_perp

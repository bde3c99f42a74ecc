"""A small network that learns arithmetic modulo p, and groks it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_fed.checks import check_choice, check_counts, check_flags, check_numbers
from lightning_fed.modules.stable_max import StableMaxCrossEntropy

Batch = tuple[Tensor, Tensor]


class ModularClassifier(LightningModule):
    """An embedding that both operands share, one hidden layer, p classes: 25,536 parameters for p = 47.

    The embedding is initialized by Xavier's rule. With torch's larger N(0, 1) it is another experiment
    (``docs/grokking.md``).

    Logged: ``train/loss``, ``train/acc`` once an epoch; ``val/loss``, ``val/acc``.

    Args:
        p: the modulus of the data.
        embedding_size: numbers for each operand.
        hidden_size: units of the hidden layer.
        lr: learning rate of Adam, whose second beta is 0.98 (Power et al. 2022).
        weight_decay: an L2 penalty in the gradient, or decoupled (AdamW) if ``decoupled``.
        decoupled: which of the two.
        loss: ``"cross_entropy"`` or ``"stable_max"`` (:class:`~lightning_fed.modules.StableMaxCrossEntropy`).

    Shapes:
        pairs ``[B, 2]`` integer, results ``[B]`` integer, logits ``[B, p]``.

    Raises:
        ValueError: if ``loss`` is none of these.
    """

    def __init__(
        self,
        p: int = 97,
        embedding_size: int = 64,
        hidden_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        loss: Literal["cross_entropy", "stable_max"] = "cross_entropy",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_counts(2, p=p)
        check_counts(embedding_size=embedding_size, hidden_size=hidden_size)
        check_numbers("[0, inf)", lr=lr, weight_decay=weight_decay)
        check_flags(decoupled=decoupled)
        check_choice("loss", loss, "cross_entropy", "stable_max")
        self.lr, self.weight_decay, self.decoupled = lr, weight_decay, decoupled
        embedding = nn.Embedding(p, embedding_size)
        self.layers = nn.Sequential(
            embedding,
            nn.Flatten(),
            nn.Linear(2 * embedding_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, p, bias=False),
        )
        nn.init.xavier_normal_(embedding.weight)
        self.loss: nn.Module = nn.CrossEntropyLoss() if loss == "cross_entropy" else StableMaxCrossEntropy()

    def forward(self, pairs: Tensor) -> Tensor:
        return self.layers(pairs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate("train", batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def _evaluate(self, split: str, batch: Batch) -> Tensor:
        pairs, results = batch
        logits = self(pairs)
        loss: Tensor = self.loss(logits, results)
        accuracy = (logits.argmax(dim=1) == results).float().mean()
        where: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "batch_size": len(results),
            "sync_dist": split == "val",
        }
        self.log(f"{split}/loss", loss.detach().float(), **where)
        self.log(f"{split}/acc", accuracy, prog_bar=True, **where)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        return optimizer(self.parameters(), lr=self.lr, betas=(0.9, 0.98), weight_decay=self.weight_decay)

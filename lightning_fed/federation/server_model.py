"""The model of a (virtual) server, which may step along pseudo-gradients with an optimizer of its own.

Shapes: P = numbers in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn


class ServerModel:
    """The server's model x (Reddi et al. 2021, Algorithm 2).

    Args:
        initial_P: the model at the start.
        optimizer: makes the server's optimizer from its parameters. None: ``x <- x - d``.
    """

    def __init__(self, initial_P: Tensor, optimizer: OptimizerCallable | None) -> None:
        self._parameter = nn.Parameter(initial_P.clone())
        self._optimizer = optimizer([self._parameter]) if optimizer is not None else None

    @property
    def row(self) -> Tensor:
        """x, ``[P]``."""
        return self._parameter.data

    @property
    def has_optimizer(self) -> bool:
        return self._optimizer is not None

    def step(self, pseudo_gradient_P: Tensor) -> None:
        """Step along d, the pseudo-gradient ``x - (the clients' models)``."""
        pseudo_gradient_P = pseudo_gradient_P.to(self.row.device)
        if self._optimizer is None:
            self._parameter.data = (self.row - pseudo_gradient_P).to(self.row.dtype)
            return
        self._parameter.grad = pseudo_gradient_P.to(self.row)
        with torch.enable_grad():
            self._optimizer.step()

    def become(self, model_P: Tensor) -> None:
        """Take a model as it is."""
        self._parameter.data = model_P.to(self.row.device)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain values."""
        return {"row": self.row, "optimizer": self._optimizer.state_dict() if self._optimizer else None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self._parameter.data = state["row"].to(self.row)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])

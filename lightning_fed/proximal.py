"""Proximal operators of regularizers that have no gradient everywhere.

Shapes: C = clients on this rank, P = numbers in a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_fed.checks import check_numbers


class ProximalOperator(ABC):
    """``prox_{eta r}(x) = argmin_z r(z) + ||z - x||^2 / (2 eta)`` of a regularizer r."""

    @abstractmethod
    def apply_(self, rows_CP: Tensor, step_size: float) -> None:
        """Apply it to every row, in place; ``step_size`` is eta."""


class L1Norm(ProximalOperator):
    """``r(x) = weight ||x||_1``: entries move towards 0 by ``eta weight``, and stop there.

    Args:
        weight: Yan et al. (ICML 2023) use 1e-4 for Fashion-MNIST and 5e-5 for CIFAR-10.

    Raises:
        ValueError: if it is negative.
    """

    def __init__(self, weight: float) -> None:
        check_numbers("[0, inf)", weight=weight)
        self.weight = weight

    def apply_(self, rows_CP: Tensor, step_size: float) -> None:
        rows_CP.copy_(nn.functional.softshrink(rows_CP, step_size * self.weight))

    def __repr__(self) -> str:
        return f"L1Norm(weight={self.weight!r})"

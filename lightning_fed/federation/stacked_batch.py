"""The minibatches of a wave as one batch, whose tensors have the clients as their first dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_fed.federation.sampler import JointBatch
from lightning_fed.federation.vectorization import CannotVectorize

TENSOR = object()


@dataclass
class StackedBatch:
    """Minibatches of one structure and one size.

    Attributes:
        leaves: the tensors, each ``[M, ...]``.
        structure: how a minibatch is made of its leaves; None if it is the list of them.
        shared: for each leaf of a minibatch the value that all clients have there, or ``TENSOR``.
    """

    leaves: list[Tensor]
    structure: TreeSpec | None
    shared: list[Any]

    @classmethod
    def of(cls, joint: JointBatch, numbers: Sequence[int]) -> StackedBatch:
        """Stack some parts of a joint step.

        Raises:
            CannotVectorize: if they hold something else than tensors that differs between them.
        """
        if joint.stacked is not None:
            first, last = numbers[0], numbers[-1]
            chosen = slice(first, last + 1) if last - first == len(numbers) - 1 else list(numbers)
            return cls([tensor[chosen] for tensor in joint.stacked], None, [])
        flat = [tree_flatten(joint.parts[number].batch) for number in numbers]
        stacked, shared = [], []
        for values in zip(*(leaves for leaves, _ in flat)):
            if isinstance(values[0], Tensor):
                stacked.append(torch.stack(values))
                shared.append(TENSOR)
            elif are_equal(values):
                shared.append(values[0])
            else:
                raise CannotVectorize(
                    f"the minibatches hold {type(values[0]).__name__} objects, which differ between clients and are no "
                    "tensors"
                )
        return cls(stacked, flat[0][1], shared)

    @staticmethod
    def kind_of(batch: Any) -> Any:
        """What must be equal in minibatches that are stacked."""
        leaves, structure = tree_flatten(batch)
        return structure, tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves)

    def of_one(self, leaves: Sequence[Tensor]) -> Any:
        """A minibatch, made of one client's leaves."""
        if self.structure is None:
            return list(leaves)
        mine = iter(leaves)
        return tree_unflatten([next(mine) if value is TENSOR else value for value in self.shared], self.structure)

    def first(self) -> Any:
        """The first client's minibatch."""
        return self.of_one([leaf[0] for leaf in self.leaves])


def are_equal(values: Sequence[Any]) -> bool:
    """Whether values are known to be equal; arrays, and objects that hold tensors, cannot tell."""
    try:
        return all(type(value) is type(values[0]) and bool(value == values[0]) for value in values)
    except (RuntimeError, ValueError):
        return False

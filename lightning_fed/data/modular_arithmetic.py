"""Modular arithmetic: the small algorithmic data on which networks grok (Power et al. 2022, arXiv 2201.02177)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_fed.checks import check_choice, check_counts, check_numbers, given

Operation = Literal["add", "subtract", "multiply", "divide"]


class ModularArithmeticDataModule(LightningDataModule):
    """All pairs (a, b) with the result of ``a o b mod p``, split into training and validation once and for all.

    Pairs are int64 ``[B, 2]``, results int64 ``[B]`` in ``0 .. p - 1``. Division leaves out b = 0, so it has
    ``p (p - 1)`` pairs; the other operations have ``p^2``.

    Args:
        p: the modulus; a prime for ``"divide"``.
        operation: ``"add"``, ``"subtract"``, ``"multiply"`` or ``"divide"``.
        train_fraction: share of the pairs to train on.
        batch_size: pairs in a minibatch, drawn anew each epoch; None for the full batch.
        steps_per_epoch: how often an epoch repeats the full batch, so that Lightning's work at the end of an epoch does
            not outweigh the steps. Only without ``batch_size``.
        seed: of the split.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        p: int = 97,
        operation: Operation = "add",
        train_fraction: float = 0.5,
        batch_size: int | None = None,
        steps_per_epoch: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(2, p=p)
        check_choice("operation", operation, "add", "subtract", "multiply", "divide")
        check_counts(steps_per_epoch=steps_per_epoch, **given(batch_size=batch_size))
        check_counts(0, seed=seed)
        check_numbers(train_fraction=train_fraction)
        if operation == "divide" and any(p % divisor == 0 for divisor in range(2, int(p**0.5) + 1)):
            raise ValueError(
                f"p={p} is no prime, so not every number has an inverse: divide modulo a prime such as 97."
            )
        if not 0 < train_fraction < 1:
            raise ValueError(f"train_fraction={train_fraction} must be in (0, 1): the rest is for validation.")
        if batch_size is not None and steps_per_epoch > 1:
            raise ValueError(
                f"batch_size={batch_size}, steps_per_epoch={steps_per_epoch}: only the full batch (batch_size=None) "
                "can be repeated."
            )
        self.p, self.operation, self.train_fraction = p, operation, train_fraction
        self.batch_size, self.steps_per_epoch, self.seed = batch_size, steps_per_epoch, seed
        pairs, results = table(p, operation)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
        size = round(train_fraction * len(pairs))
        self.train = Pairs(pairs[order[:size]], results[order[:size]], steps_per_epoch)
        self.val = Pairs(pairs[order[size:]], results[order[size:]])

    def train_dataloader(self) -> DataLoader[Any]:
        size = self.batch_size or len(self.train.pairs)
        return DataLoader(self.train, size, shuffle=self.batch_size is not None, collate_fn=as_it_is)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, len(self.val), collate_fn=as_it_is)


class Pairs(Dataset[Any]):
    """Pairs and results, looked up a whole minibatch at once.

    Args:
        pairs: ``[S, 2]``.
        results: ``[S]``.
        repeats: how often the data set contains all of them.
    """

    def __init__(self, pairs: Tensor, results: Tensor, repeats: int = 1) -> None:
        self.pairs, self.results, self.repeats = pairs, results, repeats

    def __len__(self) -> int:
        return len(self.pairs) * self.repeats

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs[index % len(self.pairs)], self.results[index % len(self.pairs)]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices) % len(self.pairs)
        return self.pairs[chosen], self.results[chosen]


def as_it_is(batch: Any) -> Any:
    """The collate function of minibatches that are complete."""
    return batch


def table(p: int, operation: Operation) -> tuple[Tensor, Tensor]:
    """All pairs ``[S, 2]`` in order, and their results ``[S]``."""
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    if operation == "divide":  # c = a / b where b c = a, so that (b c, b) has the result c
        c, b = a[:, 1:].reshape(-1), b[:, 1:].reshape(-1)
        pairs = torch.stack([b * c % p, b], dim=1)
        order = (pairs[:, 0] * p + pairs[:, 1]).argsort()
        return pairs[order], c[order]
    a, b = a.reshape(-1), b.reshape(-1)
    result = a + b if operation == "add" else a - b if operation == "subtract" else a * b
    return torch.stack([a, b], dim=1), result % p

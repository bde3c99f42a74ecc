"""A data set that knows which of its samples belong to which client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_fed.checks import check_kinds, given


class FederatedDataset(Dataset[Any]):
    """A map-style data set and the sample numbers of each client; samples pass through unchanged.

    A strategy trains client i on ``client_indices[i]``. Clients may share samples, and some may belong to nobody.

    Args:
        dataset: any map-style data set, of S samples.
        client_indices: for each of N clients, the numbers of its training samples, in ``0 .. S-1``.
        client_eval_indices: for each client, samples of the same data set on which its own model is evaluated; None if
            clients hold out nothing.
        eval_dataset: the same samples in the same order without random augmentation; held-out samples are read from it.
            None: from ``dataset``.

    Attributes:
        client_indices: list of N int64 arrays.
        client_eval_indices: list of N int64 arrays, or None.

    Raises:
        ValueError: if an index is out of range or not an integer, the numbers of clients differ, or the two data sets
            differ in length.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        client_indices: Sequence[np.ndarray],
        client_eval_indices: Sequence[np.ndarray] | None = None,
        eval_dataset: Dataset[Any] | None = None,
    ) -> None:
        check_samples(dataset=dataset, **given(eval_dataset=eval_dataset))
        self.dataset = dataset
        self.client_indices = checked_indices("client_indices", client_indices, len(self))
        self.client_eval_indices: list[np.ndarray] | None = None
        self._eval_dataset: Dataset[Any] | None = None
        if client_eval_indices is None:
            return
        self.client_eval_indices = checked_indices("client_eval_indices", client_eval_indices, len(self))
        if len(self.client_eval_indices) != len(self.client_indices):
            raise ValueError(
                f"client_eval_indices are for {len(self.client_eval_indices)} clients, but client_indices for "
                f"{len(self.client_indices)}: give every client an array, empty if it holds out nothing."
            )
        if eval_dataset is not None:
            if (size := len(eval_dataset)) != len(self):  # type: ignore[arg-type]
                raise ValueError(f"eval_dataset has {size} samples, but dataset {len(self)}: they must correspond.")
            self._eval_dataset = eval_dataset
            self._held_out = np.zeros(len(self), dtype=bool)
            self._held_out[np.concatenate(self.client_eval_indices)] = True

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        if self._eval_dataset is not None and self._held_out[index]:
            return self._eval_dataset[index]
        return self.dataset[index]


def check_samples(**datasets: Any) -> None:
    """Refuse what is no data set whose samples have numbers.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, dataset in datasets.items():
        if isinstance(dataset, str) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ValueError(f"{name}={dataset!r} must be a data set that has a length and numbers its samples.")


def checked_indices(name: str, indices: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Copies of each client's sample numbers as int64 arrays; refuses numbers outside ``0 .. size-1``."""
    checked = []
    check_kinds((list, tuple, np.ndarray), **{name: indices})
    for client, samples in enumerate(indices):
        if np.ndim(samples) == 0:
            raise ValueError(f"{name}[{client}]={samples!r} must list sample numbers.")
        array = np.asarray(samples)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                f"{name}[{client}] has shape {array.shape} and type {array.dtype}, but must list sample numbers."
            )
        if array.size and not (array.min() >= 0 and array.max() < size):
            raise ValueError(
                f"{name}[{client}] holds sample numbers {array.min()} .. {array.max()}, but the data set has {size} "
                f"samples (0 .. {size - 1}): partition the labels of this data set."
            )
        checked.append(array.astype(np.int64))
    return checked

"""Clients that train on wrong labels: an attack on the data, or a broken annotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_fed.checks import check_counts, check_kinds
from lightning_fed.data.federated_dataset import check_samples


class LabelFlip(Dataset[Any]):
    """A data set in which some clients see the label ``num_classes - 1 - y`` where others see y.

    These clients train and mix like all others. Samples that they share with honest clients are flipped for them alone:
    sample numbers from S on are their flipped copies, made when they are read.

    Args:
        source: a data set of S samples that knows its clients, for example ``DigitsDataModule().train_dataset``. A
            sample is a tuple or list whose last element is the label, or a mapping with a ``"label"`` or ``"labels"``.
        clients: whose labels are flipped.
        num_classes: K; labels are 0 .. K - 1.

    Attributes:
        client_indices: list of N int64 arrays.
        client_eval_indices: those of ``source``, whose labels stay as they are; None if clients hold out nothing.

    Raises:
        ValueError: if ``source`` knows no clients, or has not those that are named.
    """

    def __init__(self, source: Dataset[Any], clients: Sequence[int], num_classes: int) -> None:
        check_counts(2, num_classes=num_classes)
        check_samples(source=source)
        check_kinds((list, tuple, range, np.ndarray), clients=clients)
        indices = getattr(source, "client_indices", None)
        if indices is None:
            raise ValueError(
                f"source={type(source).__name__} does not know its clients (no client_indices): wrap it in a "
                "FederatedDataset first."
            )
        known = range(len(indices))
        if not len(clients) or len(set(clients)) < len(clients) or any(client not in known for client in clients):
            raise ValueError(
                f"clients={clients!r} must be some of the {len(known)} clients 0 .. {len(known) - 1}, each once."
            )
        self.source = source
        self.num_classes = num_classes
        self.client_indices = [np.asarray(shard, dtype=np.int64) for shard in indices]
        self.client_eval_indices = getattr(source, "client_eval_indices", None)
        self._originals = np.concatenate([self.client_indices[client] for client in clients])
        start = self._size = len(source)  # type: ignore[arg-type]
        for client in clients:
            stop = start + len(self.client_indices[client])
            self.client_indices[client] = np.arange(start, stop)
            start = stop

    def __len__(self) -> int:
        return self._size + len(self._originals)

    def __getitem__(self, index: int) -> Any:
        if index < self._size:
            return self.source[index]
        return self._flipped(self.source[int(self._originals[index - self._size])])

    def _flipped(self, sample: Any) -> Any:
        if isinstance(sample, Mapping):
            name = "label" if "label" in sample else "labels"
            return {**sample, name: self.num_classes - 1 - sample[name]}
        *inputs, label = sample
        return (*inputs, self.num_classes - 1 - label)

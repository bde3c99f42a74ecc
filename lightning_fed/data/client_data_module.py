"""From plain data sets to loaders whose training samples belong to clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_fed.checks import check_counts, check_flags, check_kinds, check_numbers, given
from lightning_fed.data.federated_dataset import FederatedDataset, check_samples
from lightning_fed.partition import IID, Partitioner, label_counts


class Splits(NamedTuple):
    """The map-style data sets of an experiment.

    Attributes:
        train: what the clients share out among themselves.
        val: the common validation set; None for no validation.
        test: the common test set; None for none.
        train_for_evaluation: ``train`` without random augmentation, the same samples in the same order, for the parts
            that clients hold out; None if ``train`` has no augmentation.
    """

    train: Dataset[Any]
    val: Dataset[Any] | None = None
    test: Dataset[Any] | None = None
    train_for_evaluation: Dataset[Any] | None = None


class ClientDataModule(LightningDataModule):
    """Federates any map-style data set: a partitioner decides which client trains on which samples.

    Validation and test sets are common to all clients. For data that are downloaded or built, override
    :meth:`splits` (and ``prepare_data``) instead of passing data sets.

    Args:
        train: the training set.
        val: the validation set, if any.
        test: the test set, if any.
        num_clients: N; must equal the strategy's.
        partitioner: who gets what; None means IID.
        labels: the integer class of each training sample, ``[S]``. None: found by :func:`labels_of`, if the partitioner
            needs them.
        batch_size: samples in a client's minibatch.
        eval_batch_size: samples in a minibatch of validation, test and prediction.
        num_workers: worker processes of each loader.
        client_eval_split: share of each client's samples, in [0, 1), held out to evaluate its own model on; at least
            one sample stays for training.
        drop_last: leave out the last, smaller minibatch of a client's pass.
        seed: of the partition and of the held-out samples.

    Raises:
        ValueError: if a setting is out of range; when the data are first used, if they cannot be partitioned.
    """

    def __init__(
        self,
        train: Dataset[Any] | None = None,
        val: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        *,
        num_clients: int,
        partitioner: Partitioner | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 20,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        client_eval_split: float = 0.0,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(num_clients=num_clients, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_counts(0, num_workers=num_workers, seed=seed)
        check_numbers("[0, 1)", client_eval_split=client_eval_split)
        check_flags(drop_last=drop_last)
        check_kinds(Partitioner, **given(partitioner=partitioner))
        check_kinds((list, tuple, np.ndarray, torch.Tensor), **given(labels=labels))
        check_samples(**given(train=train, val=val, test=test))
        self.num_clients = num_clients
        self.partitioner = partitioner if partitioner is not None else IID()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.client_eval_split = client_eval_split
        self.drop_last = drop_last
        self.seed = seed
        self._given = train, val, test
        self._given_labels = labels

    def splits(self) -> Splits:
        """The data sets; called once, in every process, after ``prepare_data``. Override it for data of your own."""
        train, val, test = self._given
        if train is None:
            raise ValueError(f"{type(self).__name__} has no training data: pass train=..., or override `splits`.")
        return Splits(train, val, test)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            _ = self.train_dataset  # refuses a bad partition now, not at the first step

    @cached_property
    def datasets(self) -> Splits:
        """What :meth:`splits` returned."""
        return self.splits()

    @cached_property
    def train_dataset(self) -> FederatedDataset:
        """The training set with ``client_indices`` and, if clients hold samples out, ``client_eval_indices``."""
        train = self.datasets.train
        labels = self.labels if self.partitioner.needs_labels else np.zeros(len(train), dtype=np.int64)  # type: ignore[arg-type]
        shards = self.partitioner(labels, self.num_clients, self.seed)
        if self.client_eval_split == 0:
            return FederatedDataset(train, shards)
        parts = [self._hold_out(shard, client) for client, shard in enumerate(shards)]
        kept, held_out = [part[0] for part in parts], [part[1] for part in parts]
        return FederatedDataset(train, kept, held_out, self.datasets.train_for_evaluation)

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of each training sample, int64 ``[S]``."""
        train = self.datasets.train
        if self._given_labels is None:
            return labels_of(train)
        labels = as_labels(self._given_labels, "labels")
        if len(labels) != (size := len(train)):  # type: ignore[arg-type]
            raise ValueError(f"labels are {len(labels)}, but there are {size} training samples: give one for each.")
        return labels

    @property
    def num_classes(self) -> int:
        """K, the largest training label plus one."""
        return int(self.labels.max()) + 1

    @property
    def label_counts(self) -> np.ndarray:
        """Training samples of each client and class, int64 ``[N, K]``, without what the clients hold out."""
        return label_counts(self.train_dataset.client_indices, self.labels, self.num_classes)

    def train_dataloader(self) -> DataLoader[Any]:
        """Over all training samples; a federated strategy reads ``dataset.client_indices`` and samples per client."""
        return DataLoader(
            self.train_dataset,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=self.drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Over the validation set; no loader if there is none, and then Lightning does not validate."""
        return [] if self.datasets.val is None else self._evaluation_loader(self.datasets.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Over the test set."""
        if self.datasets.test is None:
            raise ValueError(f"{type(self).__name__} has no test data: pass test=..., or do not call test or predict.")
        return self._evaluation_loader(self.datasets.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Over the test set."""
        return self.test_dataloader()

    def _evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=self.eval_batch_size, num_workers=self.num_workers)

    def _hold_out(self, shard: np.ndarray, client: int) -> tuple[np.ndarray, np.ndarray]:
        """One client's samples, divided at random into those to train on and those to evaluate on."""
        order = np.random.default_rng([self.seed, client]).permutation(shard)
        held_out = max(min(round(self.client_eval_split * len(shard)), len(shard) - 1), 0)
        return np.sort(order[held_out:]), np.sort(order[:held_out])


def labels_of(dataset: Dataset[Any]) -> np.ndarray:
    """The class of each sample of a data set.

    Looks for ``dataset.targets`` or ``dataset.labels``, the last tensor of a ``TensorDataset``, the labels behind a
    ``Subset``; else reads every sample and takes its last element, or its ``"label"`` or ``"labels"``.

    Returns:
        int64 ``[S]``.

    Raises:
        ValueError: if they are not one integer per sample.
    """
    name = type(dataset).__name__
    if isinstance(dataset, Subset):
        labels: np.ndarray = labels_of(dataset.dataset)[np.asarray(dataset.indices)]
        return labels
    if isinstance(dataset, TensorDataset):
        return as_labels(dataset.tensors[-1], f"the last tensor of {name}")
    for attribute in ("targets", "labels"):
        if hasattr(dataset, attribute):
            return as_labels(getattr(dataset, attribute), f"{name}.{attribute}")
    samples = range(len(dataset))  # type: ignore[arg-type]
    return as_labels([label_of(dataset[sample]) for sample in samples], f"the labels read from {name}")


def label_of(sample: Any) -> Any:
    """The label in one sample: a mapping's ``"label"`` or ``"labels"``, or the last element of a tuple."""
    if isinstance(sample, Mapping):
        return sample.get("label", sample.get("labels"))
    return sample[-1] if isinstance(sample, (tuple, list)) else None


def as_labels(labels: Any, source: str) -> np.ndarray:
    """An int64 array ``[S]``; refuses anything else, naming its source."""
    array = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(
            f"{source}: shape {array.shape} of type {array.dtype}, but a partition by label needs one integer per "
            "sample. Pass labels=..., or use a partitioner that needs none (IID, QuantitySkew, ByAttribute)."
        )
    return np.asarray(array, dtype=np.int64)

"""Clients that see wrong labels, and no one else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from federations import CLASSES, Classifier, samples, silent_trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fed import FedAvgStrategy
from lightning_fed.data import FederatedDataset, LabelFlip

SHARED = [np.arange(0, 12), np.arange(8, 20), np.arange(20, 30)]  # 8 .. 11 belong to two clients


def seen(dataset: LabelFlip, client: int) -> tuple[torch.Tensor, list[int]]:
    """A client's inputs and labels."""
    read = [dataset[int(index)] for index in dataset.client_indices[client]]
    return torch.stack([sample[0] for sample in read]), [int(sample[1]) for sample in read]


def test_the_attackers_labels_are_turned_around_and_nothing_else() -> None:
    plain = FederatedDataset(samples(30), SHARED)
    flipped = LabelFlip(plain, clients=[1], num_classes=CLASSES)
    inputs, labels = samples(30).tensors
    for client, shard in enumerate(SHARED):
        theirs, numbers = seen(flipped, client)
        assert torch.equal(theirs, inputs[shard])
        expected = labels[shard] if client != 1 else CLASSES - 1 - labels[shard]
        assert numbers == expected.tolist()
    assert len(flipped) == 42 and len(plain.client_indices[1]) == 12 and plain.client_indices[1][0] == 8


def test_samples_may_be_mappings_and_held_out_ones_stay() -> None:
    class Mappings(Dataset[Any]):
        client_indices = [np.arange(2), np.arange(2, 4)]
        client_eval_indices = [np.arange(4, 5), np.arange(5, 6)]

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return {"image": torch.tensor(index), "label": index % 3}

    flipped = LabelFlip(Mappings(), clients=[0], num_classes=3)
    assert [flipped[int(i)]["label"] for i in flipped.client_indices[0]] == [2, 1]
    assert [int(flipped[int(i)]["image"]) for i in flipped.client_indices[0]] == [0, 1]
    assert [flipped[int(i)]["label"] for i in flipped.client_indices[1]] == [2, 0]
    assert flipped.client_eval_indices is not None and flipped[5]["label"] == 2


def test_a_federation_trains_on_what_each_client_sees() -> None:
    """It ends where one does whose labels were flipped by hand."""
    shards = [np.arange(start, start + 10) for start in (0, 10, 20)]
    inputs, labels = samples(30).tensors
    by_hand = labels.clone()
    by_hand[10:20] = CLASSES - 1 - by_hand[10:20]
    models = []
    for dataset in (
        LabelFlip(FederatedDataset(samples(30), shards), [1], CLASSES),
        FederatedDataset(TensorDataset(inputs, by_hand), shards),
    ):
        torch.manual_seed(0)
        strategy = FedAvgStrategy(num_clients=3, seed=1)
        silent_trainer(strategy, max_epochs=2).fit(Classifier(dropout=0.0), DataLoader(dataset, 5, shuffle=False))
        models.append(strategy.server_row().clone())
    torch.testing.assert_close(*models, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelFlip(samples(9), [0], 4), "source=TensorDataset does not know its clients"),
        (
            lambda: LabelFlip(FederatedDataset(samples(30), SHARED), [3], 4),
            r"clients=\[3\] must be some of the 3 clients",
        ),
        (lambda: LabelFlip(FederatedDataset(samples(30), SHARED), [], 4), r"clients=\[\] must be some of"),
        (lambda: LabelFlip(FederatedDataset(samples(30), SHARED), [1, 1], 4), r"clients=\[1, 1\] must be .* each once"),
        (lambda: LabelFlip(FederatedDataset(samples(30), SHARED), [1], 1), "num_classes=1 must be at least 2"),
    ],
)
def test_what_cannot_be_flipped_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

from __future__ import annotations

import importlib
import pickle
import shutil
import struct
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_fed.data import (
    ClientDataModule,
    DigitsDataModule,
    FederatedDataset,
    Splits,
    VisionDataModule,
    labels_of,
)
from lightning_fed.data.client_data_module import as_labels
from lightning_fed.partition import IID, Dirichlet, QuantitySkew, Shards

# ---- FederatedDataset ----


def ten_samples() -> TensorDataset:
    return TensorDataset(torch.arange(10.0), torch.arange(10) % 3)


def test_federated_dataset_passes_samples_through():
    inner = ten_samples()
    dataset = FederatedDataset(inner, [np.array([0, 1]), np.array([], dtype=int), [7, 1]])
    assert dataset.dataset is inner and len(dataset) == 10
    assert dataset[7] == inner[7]
    assert [shard.tolist() for shard in dataset.client_indices] == [[0, 1], [], [7, 1]]
    assert all(shard.dtype == np.int64 for shard in dataset.client_indices)
    assert dataset.client_eval_indices is None


def test_held_out_samples_are_read_without_augmentation():
    plain, augmented = ten_samples(), TensorDataset(torch.full((10,), -1.0), torch.arange(10) % 3)
    dataset = FederatedDataset(augmented, [np.array([0, 1])], [np.array([2])], eval_dataset=plain)
    assert [dataset[index][0].item() for index in range(4)] == [-1, -1, 2, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([np.array([0]), np.array([3, 10])],), r"client_indices\[1\] holds sample numbers 3 .. 10, .* has 10 samples"),
        (([np.array([-1])],), r"client_indices\[0\] holds sample numbers -1"),
        (([np.array([0.5])],), r"client_indices\[0\] has shape \(1,\) and type float64"),
        (([np.array([0])], [np.array([10])]), r"client_eval_indices\[0\]"),
        (([np.array([0])], []), "client_eval_indices are for 0 clients, but client_indices for 1"),
        (([np.array([0])], [np.array([1])], Subset(ten_samples(), [0])), "eval_dataset has 1 samples, but dataset 10"),
    ],
)
def test_bad_client_indices(arguments, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset(ten_samples(), *arguments)


# ---- labels ----


class Items(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


def with_attribute(name: str, labels) -> Items:
    dataset = Items([(0, 9)] * len(labels))
    setattr(dataset, name, labels)
    return dataset


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(3), torch.zeros(3), torch.tensor([2, 0, 1])),
        with_attribute("targets", [2, 0, 1]),
        with_attribute("targets", torch.tensor([2, 0, 1])),
        with_attribute("labels", np.array([2, 0, 1], dtype=np.uint8)),
        Items([(0.5, 2), (0.5, 0), (0.5, 1)]),
        Items([(0.5, torch.tensor(2)), (0.5, torch.tensor(0)), (0.5, torch.tensor(1))]),
        Items([{"image": 0.5, "label": 2}, {"image": 0.5, "label": 0}, {"image": 0.5, "label": 1}]),
        Subset(with_attribute("targets", [0, 1, 2]), [2, 0, 1]),
    ],
)
def test_labels_are_found(dataset):
    labels = labels_of(dataset)
    assert labels.dtype == np.int64 and labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("items", [[(0, 0.5)], [(0, torch.zeros(4, 4))], [torch.zeros(3)], [{"text": "no label"}]])
def test_labels_that_are_no_classes_are_refused(items):
    with pytest.raises(ValueError, match=r"labels read from Items.*Pass labels=\.\.\., or use a partitioner"):
        labels_of(Items(items))


def test_label_arrays_are_int64():
    assert as_labels([True, False], "labels").dtype == np.int64


# ---- ClientDataModule ----


def test_any_dataset_is_federated():
    data = ClientDataModule(ten_samples(), num_clients=3, partitioner=Shards(1), batch_size=2, drop_last=True, seed=5)
    loader = data.train_dataloader()
    assert isinstance(loader.dataset, FederatedDataset) and type(loader.dataset.dataset) is TensorDataset
    assert loader.batch_size == 2 and loader.drop_last and isinstance(loader.sampler, torch.utils.data.RandomSampler)
    expected = Shards(1)(np.arange(10) % 3, 3, 5)
    assert all(np.array_equal(a, b) for a, b in zip(loader.dataset.client_indices, expected))
    assert data.num_classes == 3
    assert data.label_counts.shape == (3, 3) and data.label_counts.sum() == 10


def test_default_partition_is_iid():
    data = ClientDataModule(ten_samples(), num_clients=5)
    assert [len(shard) for shard in data.train_dataset.client_indices] == [2] * 5


def test_data_without_labels_is_federated():
    for partitioner in (IID(), QuantitySkew(5.0)):
        data = ClientDataModule(Items([torch.zeros(3)] * 10), num_clients=2, partitioner=partitioner)
        assert sum(map(len, data.train_dataset.client_indices)) == 10
    with pytest.raises(ValueError, match="one integer per sample"):
        ClientDataModule(Items([torch.zeros(3)] * 10), num_clients=2, partitioner=Dirichlet()).setup("fit")


def test_explicit_labels():
    data = ClientDataModule(ten_samples(), num_clients=2, partitioner=Shards(1), labels=[0] * 5 + [1] * 5)
    assert sorted(data.label_counts.tolist()) == [[0, 5], [5, 0]]


@pytest.mark.parametrize("share", [0.25, 0.99])
def test_clients_hold_out_a_share_of_their_own_samples(share):
    whole = DigitsDataModule(num_clients=5, seed=3).train_dataset
    data = DigitsDataModule(num_clients=5, seed=3, client_eval_split=share)
    train = data.train_dataset
    for client, shard in enumerate(whole.client_indices):
        kept, held_out = train.client_indices[client], train.client_eval_indices[client]
        np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), shard)
        assert len(held_out) == min(round(share * len(shard)), len(shard) - 1)
    assert data.label_counts.sum() == sum(map(len, train.client_indices))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClientDataModule(ten_samples(), num_clients=0), "num_clients=0"),
        (lambda: ClientDataModule(ten_samples(), num_clients=1, batch_size=0), "batch_size=0"),
        (lambda: ClientDataModule(ten_samples(), num_clients=1, client_eval_split=1.0), "client_eval_split=1.0"),
        (lambda: ClientDataModule(num_clients=1).setup("fit"), r"no training data: pass train=\.\.\."),
        (lambda: ClientDataModule(ten_samples(), num_clients=1).test_dataloader(), "has no test data"),
        (lambda: ClientDataModule(ten_samples(), num_clients=1, labels=[0, 1]).labels, "labels are 2, but"),
        (lambda: VisionDataModule("imagenet"), "name='imagenet' .* choose one of cifar10"),
        (lambda: VisionDataModule("mnist", val_fraction=1.0), "val_fraction=1.0"),
    ],
)
def test_bad_setting(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class RandomVectors(ClientDataModule):
    """What a user writes for data of their own."""

    def splits(self) -> Splits:
        return Splits(train=Items([torch.randn(32) for _ in range(8)]))


@pytest.mark.filterwarnings("ignore:Total length of `list`")
def test_plain_lightning_trains_on_it_without_validation_data(tmp_path):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(BoringModel(), datamodule=RandomVectors(num_clients=2, batch_size=4))
    assert trainer.global_step == 2


# ---- digits ----


def test_digits():
    data = DigitsDataModule()
    train, val, test = data.datasets[:3]
    assert [len(part) for part in (train, val, test)] == [1197, 200, 400]
    images, labels = train.tensors
    assert images.shape == (1197, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    assert all(abs(torch.bincount(part.tensors[1]) / len(part) - 0.1).max() < 0.011 for part in (train, val, test))
    assert len(data.val_dataloader()) == 1
    assert len(data.test_dataloader().dataset) == len(data.predict_dataloader().dataset) == 400
    assert isinstance(data.partitioner, Dirichlet) and data.partitioner.alpha == 0.3
    assert data.label_counts.shape == (20, 10) and data.label_counts.sum() == 1197


def test_digits_division_does_not_depend_on_the_seed():
    first, second = DigitsDataModule(seed=0), DigitsDataModule(seed=1)
    assert torch.equal(first.datasets.test.tensors[0], second.datasets.test.tensors[0])
    assert not np.array_equal(first.label_counts, second.label_counts)


@pytest.mark.parametrize("module", [DigitsDataModule, VisionDataModule, ClientDataModule])
def test_partitioner_is_chosen_in_yaml(module):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(module, "data")
    arguments = {
        "name": "mnist",
        "num_clients": 4,
        "partitioner": {"class_path": "lightning_fed.partition.Dirichlet", "init_args": {"alpha": 7.0}},
    }
    if module is not VisionDataModule:
        del arguments["name"]
    path = f"{module.__module__}.{module.__name__}"
    data = parser.instantiate(parser.parse_object({"data": {"class_path": path, "init_args": arguments}})).data
    assert type(data) is module and data.num_clients == 4 and data.partitioner.alpha == 7.0


# ---- vision: tiny files in the formats of the real ones ----


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, folder: str, train: str = "train", test: str = "t10k", num_classes: int = 10) -> None:
    draw = np.random.default_rng(0)
    for prefix, size in ((train, 60), (test, 20)):
        write_idx(root / folder / "raw" / f"{prefix}-images-idx3-ubyte", draw.integers(0, 256, (size, 28, 28)))
        write_idx(root / folder / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(size) % num_classes)


def write_cifar(root: Path, folder: str, train: list[str], test: list[str], meta: str, fine: bool) -> None:
    draw = np.random.default_rng(0)
    (root / folder).mkdir(parents=True)
    key = "fine_labels" if fine else "labels"
    for name in train + test:
        data = draw.integers(1, 256, (20, 3 * 32 * 32)).astype(np.uint8)  # no black pixel: black is the crops' padding
        (root / folder / name).write_bytes(pickle.dumps({"data": data, key: [i % 10 for i in range(20)]}))
    (root / folder / meta).write_bytes(pickle.dumps({"label_names": [], "fine_label_names": []}))


@pytest.fixture
def vision_root(tmp_path, monkeypatch):
    """Files of all six data sets; checksums, which only the real ones have, are not looked at."""
    datasets = importlib.import_module("torchvision.datasets")
    scipy_io = importlib.import_module("scipy.io")
    write_mnist(tmp_path, "MNIST")
    write_mnist(tmp_path, "FashionMNIST")
    write_mnist(tmp_path, "EMNIST", "emnist-balanced-train", "emnist-balanced-test", num_classes=47)
    ten = [f"data_batch_{number}" for number in range(1, 6)]
    write_cifar(tmp_path, "cifar-10-batches-py", ten, ["test_batch"], "batches.meta", fine=False)
    write_cifar(tmp_path, "cifar-100-python", ["train"], ["test"], "meta", fine=True)
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        images = draw.integers(1, 256, (32, 32, 3, 20)).astype(np.uint8)
        scipy_io.savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": np.arange(20)[:, None] % 10 + 1})
    for dataset in (datasets.CIFAR10, datasets.CIFAR100):
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(dataset, attribute, [[name, None] for name, _ in getattr(dataset, attribute)])
        monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": None})
    split_list = {part: [url, name, None] for part, (url, name, _) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "shape", "train", "val", "test", "num_classes"),
    [
        ("mnist", (1, 28, 28), 54, 6, 20, 10),
        ("fashion-mnist", (1, 28, 28), 54, 6, 20, 10),
        ("emnist", (1, 28, 28), 54, 6, 20, 47),
        ("cifar10", (3, 32, 32), 90, 10, 20, 10),
        ("cifar100", (3, 32, 32), 18, 2, 20, 100),
        ("svhn", (3, 32, 32), 18, 2, 20, 10),
    ],
)
def test_vision_datasets(vision_root, name, shape, train, val, test, num_classes):
    data = VisionDataModule(name, vision_root, num_clients=3, partitioner=QuantitySkew(2.0), eval_batch_size=8)
    data.prepare_data()
    data.setup("fit")
    assert [len(part) for part in data.datasets[:3]] == [train, val, test]
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape[1:] == shape and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert data.num_classes == num_classes
    assert data.label_counts.shape == (3, num_classes) and data.label_counts.sum() == train


def test_cifar_training_images_are_augmented_and_held_out_ones_are_not(vision_root):
    data = VisionDataModule("cifar10", vision_root, num_clients=2, client_eval_split=0.5)
    train = data.train_dataset
    kept, held_out = train.client_indices[0][0], train.client_eval_indices[0][0]
    assert any(not torch.equal(train[kept][0], train[kept][0]) for _ in range(5))
    assert all(torch.equal(train[held_out][0], train[held_out][0]) for _ in range(5))
    plain = VisionDataModule("cifar10", vision_root, num_clients=2, augment=False)
    assert type(plain.train_dataset.dataset) is TensorDataset
    torch.testing.assert_close(train[held_out][0], plain.train_dataset[held_out][0])
    assert train[held_out][1] == plain.train_dataset[held_out][1]


def test_pixels_are_normalised_and_in_their_places(vision_root):
    datasets = importlib.import_module("torchvision.datasets")
    for name, published in (
        ("cifar10", datasets.CIFAR10(vision_root, train=False)),
        ("svhn", datasets.SVHN(vision_root, split="test")),
        ("mnist", datasets.MNIST(vision_root, train=False)),
    ):
        data = VisionDataModule(name, vision_root)
        image, label = data.datasets.test[3]
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.source.mean, data.source.std))
        pixels = torch.from_numpy(np.array(published[3][0])).reshape(*image.shape[1:], -1).permute(2, 0, 1) / 255
        torch.testing.assert_close(image * std + mean, pixels)
        assert label == published[3][1]


def test_validation_part_is_seeded_and_may_be_empty(vision_root):
    def validation(**settings) -> torch.Tensor:
        return VisionDataModule("mnist", vision_root, num_clients=2, **settings).datasets.val.tensors[0]

    assert torch.equal(validation(seed=1), validation(seed=1))
    assert not torch.equal(validation(seed=1), validation(seed=2))
    everything = VisionDataModule("mnist", vision_root, num_clients=2, val_fraction=0.0)
    assert everything.val_dataloader() == [] and len(everything.train_dataset) == 60


@pytest.mark.parametrize("name", ["cifar10", "svhn", "mnist", "emnist"])
def test_absent_files(tmp_path, name):
    data = VisionDataModule(name, tmp_path / "nowhere")
    data.prepare_data()
    with pytest.raises(ValueError, match=f"{name} is not complete in root='.*nowhere'. Set download=True"):
        data.setup("fit")


def test_download_without_network(tmp_path, monkeypatch):
    datasets = importlib.import_module("torchvision.datasets")

    def no_network(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    with pytest.raises(ValueError, match=r"mnist is not complete .* download failed \(no route to host\)"):
        VisionDataModule("mnist", tmp_path, download=True).prepare_data()


def test_download_fetches_into_root(vision_root, tmp_path, monkeypatch):
    """A download is simulated by copying files; afterwards the data are used from root."""
    datasets = importlib.import_module("torchvision.datasets")
    root = tmp_path / "elsewhere"

    def copy(self):
        shutil.copytree(vision_root / "MNIST", root / "MNIST", dirs_exist_ok=True)

    monkeypatch.setattr(datasets.MNIST, "download", copy)
    data = VisionDataModule("mnist", root, num_clients=2, download=True)
    data.prepare_data()
    assert len(data.datasets.test) == 20

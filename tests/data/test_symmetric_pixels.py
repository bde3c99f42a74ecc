"""Images in [-1, 1] for generators: the same images, and what is done to them in training."""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_fed.data import DigitsDataModule, VisionDataModule


def test_digits_are_the_same_but_for_the_scale() -> None:
    for unit, symmetric in zip(DigitsDataModule().datasets[:3], DigitsDataModule(pixels="symmetric").datasets[:3]):
        assert torch.equal(symmetric.tensors[0], 2 * unit.tensors[0] - 1)
        assert torch.equal(symmetric.tensors[1], unit.tensors[1])
        assert (symmetric.tensors[0].min(), symmetric.tensors[0].max()) == (-1, 1)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's files with 20 images each and no black pixel; the checksums of the real ones are not looked at."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)]
    for name in [*names, "test_batch"]:
        data = draw.integers(1, 256, (20, 3 * 32 * 32)).astype(np.uint8)
        data[0, :2] = 1, 255
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    published = import_module("torchvision.datasets").CIFAR10
    monkeypatch.setattr(published, "train_list", [[name, None] for name in names])
    monkeypatch.setattr(published, "test_list", [["test_batch", None]])
    monkeypatch.setattr(published, "meta", {**published.meta, "md5": None})
    return tmp_path


def test_cifar_images_are_mirrored_but_not_cropped(cifar: Path) -> None:
    data = VisionDataModule("cifar10", cifar, num_clients=2, pixels="symmetric", val_fraction=0)
    train, plain = data.datasets.train, data.datasets.train_for_evaluation
    assert plain is not None
    for sample in range(10):
        image, _ = plain[sample]
        drawn = [train[sample][0] for _ in range(12)]
        seen = {"as it is" if torch.equal(one, image) else "mirrored" if torch.equal(one, image.flip(-1)) else "cropped"
                for one in drawn}  # fmt: skip
        assert seen == {"as it is", "mirrored"}


def test_cifar_lies_in_minus_one_to_one(cifar: Path) -> None:
    standard, symmetric = (
        VisionDataModule("cifar10", cifar, augment=False, pixels=pixels) for pixels in ("standard", "symmetric")
    )
    images = symmetric.datasets.test.tensors[0]
    assert images.max() == 1 and images.min() == pytest.approx(2 / 255 - 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (standard.source.mean, standard.source.std))
    torch.testing.assert_close((images + 1) / 2, standard.datasets.test.tensors[0] * std + mean)
    assert type(symmetric.datasets.train) is type(standard.datasets.train) is torch.utils.data.TensorDataset


@pytest.mark.parametrize("module", [DigitsDataModule, VisionDataModule])
def test_pixels_are_plain_strings_in_yaml(module: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(module, "data")
    arguments = {"pixels": "symmetric"} | ({"name": "mnist"} if module is VisionDataModule else {})
    assert parser.instantiate(parser.parse_object({"data": arguments})).data.pixels == "symmetric"
    name = {"name": "mnist"} if module is VisionDataModule else {}
    with pytest.raises(ValueError, match="pixels='symetric' is unknown"):
        module(**name, pixels="symetric")

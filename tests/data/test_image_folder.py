"""Images in folders become images in [-1, 1], labelled by their folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_fed.data import ImageFolderDataModule
from lightning_fed.partition import Shards


def write_images(root: Path, part: str, classes: dict[str, int], size: tuple[int, int] = (12, 8)) -> None:
    """For each class so many images, black on the left half and white on the right."""
    for name, count in classes.items():
        (root / part / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[:, size[0] // 2 :] = 255
            Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def test_images_are_cut_square_and_lie_between_minus_one_and_one(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"cat": 3, "dog": 5})
    write_images(tmp_path, "val", {"cat": 1, "dog": 1})
    data = ImageFolderDataModule(tmp_path, image_size=8, mirror=False)
    image, label = data.datasets.train[7]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and label == 1
    assert (image[..., :3] == -1).all() and (image[..., 5:] == 1).all()
    assert data.num_classes == 2 and data.labels.tolist() == [0] * 3 + [1] * 5
    assert len(data.datasets.val) == 2


def test_training_images_are_mirrored_and_others_are_not(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"cat": 1})
    write_images(tmp_path, "val", {"cat": 1})
    splits = ImageFolderDataModule(tmp_path, image_size=8).datasets
    torch.manual_seed(0)
    corners = {float(splits.train[0][0][0, 0, 0]) for _ in range(20)}
    assert corners == {-1.0, 1.0}
    for part in (splits.val, splits.train_for_evaluation):
        assert {float(part[0][0][0, 0, 0]) for _ in range(20)} == {-1.0}


def test_clients_can_have_classes_of_their_own(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"cat": 4, "dog": 4})
    data = ImageFolderDataModule(tmp_path, image_size=8, num_clients=2, partitioner=Shards(1))
    assert [set(data.labels[shard]) for shard in data.train_dataset.client_indices] in ([{0}, {1}], [{1}, {0}])


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size=0"):
        ImageFolderDataModule(tmp_path, image_size=0)
    with pytest.raises(ValueError, match=r"must lie in train/<class>/"):
        _ = ImageFolderDataModule(tmp_path, image_size=8).datasets
    write_images(tmp_path, "train", {"cat": 1})
    write_images(tmp_path, "val", {"dog": 1})
    with pytest.raises(ValueError, match=r"different classes: \['cat', 'dog'\]"):
        _ = ImageFolderDataModule(tmp_path, image_size=8).datasets

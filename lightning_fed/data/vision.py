"""Image data sets of torchvision, federated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightning_fed.checks import check_flags, check_names, check_numbers, check_paths
from lightning_fed.data.client_data_module import ClientDataModule, Splits
from lightning_fed.partition import Partitioner

VisionName = Literal["cifar10", "cifar100", "emnist", "svhn", "mnist", "fashion-mnist"]
VisionPixels = Literal["standard", "symmetric"]


@dataclass(frozen=True)
class VisionSource:
    """What torchvision does not tell about a data set.

    Attributes:
        torchvision_class: its name in ``torchvision.datasets``.
        num_classes: K.
        mean: of each channel over the training set, pixels in [0, 1].
        std: likewise.
        crops: training images are padded by 4 and cropped at random.
        flips: training images are mirrored at random.
    """

    torchvision_class: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crops: bool = False
    flips: bool = False


SOURCES: dict[str, VisionSource] = {
    "cifar10": VisionSource("CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), crops=True, flips=True),
    "cifar100": VisionSource("CIFAR100", 100, (0.507, 0.4865, 0.4409), (0.267, 0.2564, 0.2762), crops=True, flips=True),
    "emnist": VisionSource("EMNIST", 47, (0.1751,), (0.3332,)),
    "svhn": VisionSource("SVHN", 10, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), crops=True),
    "mnist": VisionSource("MNIST", 10, (0.1307,), (0.3081,)),
    "fashion-mnist": VisionSource("FashionMNIST", 10, (0.2860,), (0.3530,)),
}


class VisionDataModule(ClientDataModule):
    """CIFAR-10/100, EMNIST (its "balanced" split, 47 classes), SVHN, MNIST or Fashion-MNIST.

    Images are float32 ``[channels, height, width]``, normalised by the training set's mean and deviation. In training
    CIFAR images are padded by 4, cropped at random and mirrored; SVHN images are only cropped; the others are left as
    they are. With ``pixels="symmetric"``, for generators, no image is cropped, for they would learn the black borders.
    The test set is the published one. Needs torchvision.

    Args:
        name: the data set.
        root: folder of the files, in torchvision's layout.
        num_clients: N; must equal the strategy's.
        partitioner: who gets what; None means IID.
        download: fetch absent files into ``root``, once a node, before training.
        augment: crop and mirror training images, where that is usual (see above).
        val_fraction: share of the published training set, in [0, 1), drawn with ``seed`` and kept from all clients for
            validation: 5,000 images of CIFAR by default. 0 trains on everything, as most papers do, without validation.
        batch_size: samples in a client's minibatch.
        eval_batch_size: samples in a minibatch of validation, test and prediction.
        num_workers: worker processes of each loader.
        client_eval_split: share of each client's samples held out to evaluate its own model on, without augmentation.
        drop_last: leave out the last, smaller minibatch of a client's pass.
        seed: of the validation set and of the partition.
        pixels: ``"standard"``: normalised; ``"symmetric"``: in [-1, 1], and no crops.

    Raises:
        ValueError: as :class:`ClientDataModule`; if ``name`` or ``pixels`` is unknown; when the data are first used, if
            they are absent.
    """

    def __init__(
        self,
        name: VisionName,
        root: str | Path = "data",
        num_clients: int = 20,
        partitioner: Partitioner | None = None,
        download: bool = False,
        augment: bool = True,
        val_fraction: float = 0.1,
        batch_size: int = 50,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        client_eval_split: float = 0.0,
        drop_last: bool = False,
        seed: int = 0,
        pixels: VisionPixels = "standard",
    ) -> None:
        super().__init__(
            num_clients=num_clients,
            partitioner=partitioner,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            client_eval_split=client_eval_split,
            drop_last=drop_last,
            seed=seed,
        )
        check_names(name=name, pixels=pixels)
        check_paths(root=root)
        check_flags(download=download, augment=augment)
        check_numbers("[0, 1)", val_fraction=val_fraction)
        if name not in get_args(VisionName):
            raise ValueError(f"name={name!r} is not a known data set: choose one of {', '.join(get_args(VisionName))}.")
        if pixels not in get_args(VisionPixels):
            raise ValueError(f'pixels={pixels!r} is unknown: use "standard" (normalised) or "symmetric" for [-1, 1].')
        self.name: str = name
        self.source = SOURCES[name]
        self.root = Path(root)
        self.download = download
        self.augment = augment
        self.val_fraction = val_fraction
        self.pixels: VisionPixels = pixels

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def prepare_data(self) -> None:
        if self.download:
            for train in (True, False):
                self._published(train, download=True)

    def splits(self) -> Splits:
        images, labels = as_tensors(self._published(train=True))
        shuffled = np.random.default_rng(self.seed).permutation(len(labels))
        val_size = round(self.val_fraction * len(labels))
        val, train = np.sort(shuffled[:val_size]), np.sort(shuffled[val_size:])
        normalise, augment = self._transforms(images.shape[-1])
        test_images, test_labels = as_tensors(self._published(train=False))
        validation = TensorDataset(normalise(images[val]), labels[val]) if val_size else None
        test = TensorDataset(normalise(test_images), test_labels)
        if augment is None:
            return Splits(TensorDataset(normalise(images[train]), labels[train]), validation, test)
        images, labels = images[train], labels[train]
        return Splits(
            TransformedImages(images, labels, augment), validation, test, TransformedImages(images, labels, normalise)
        )

    def _transforms(self, size: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """From uint8 ``[..., channels, height, width]`` to a model's input: always; for training, None if the same."""
        from torchvision.transforms import v2

        is_symmetric = self.pixels == "symmetric"
        halves = [0.5] * len(self.source.mean)
        mean, std = (halves, halves) if is_symmetric else (list(self.source.mean), list(self.source.std))
        normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
        random: list[torch.nn.Module] = []
        if self.source.crops and not is_symmetric:
            random.append(v2.RandomCrop(size, padding=4))
        random += [v2.RandomHorizontalFlip()] if self.source.flips else []
        return normalise, v2.Compose([*random, normalise]) if random and self.augment else None

    def _published(self, train: bool, download: bool = False) -> Any:
        """torchvision's data set of one of the published parts."""
        from torchvision import datasets

        part: dict[str, Any] = {"train": train}
        if self.name == "svhn":
            part = {"split": "train" if train else "test"}
        elif self.name == "emnist":
            part["split"] = "balanced"
        try:
            return getattr(datasets, self.source.torchvision_class)(self.root, download=download, **part)
        except (RuntimeError, OSError) as error:  # OSError: no network, or a folder that cannot be written
            if download:
                way_out = f"The download failed ({error}): copy the files there from a machine that has a network."
            else:
                way_out = "Set download=True on a machine that has a network, or copy the files there."
            raise ValueError(f"{self.name} is not complete in root={str(self.root)!r}. {way_out}") from error


class TransformedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory that are transformed each time they are read.

    Args:
        images: uint8 ``[S, channels, height, width]``.
        targets: int64 ``[S]``.
        transform: from one image to a model's input.
    """

    def __init__(self, images: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images = images
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.targets[index]


def as_tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[S, channels, height, width]`` and labels int64 ``[S]`` of a torchvision data set."""
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return images.contiguous(), torch.as_tensor(labels, dtype=torch.int64)

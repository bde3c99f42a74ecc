"""Images in folders, a folder a class: ImageNet at any size, or pictures of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_fed.checks import check_counts, check_flags, check_paths
from lightning_fed.data.client_data_module import ClientDataModule, Splits
from lightning_fed.partition import Partitioner


class ImageFolderDataModule(ClientDataModule):
    """The image files under ``root/train/<class>/`` and, if it is there, ``root/val/<class>/``.

    Images are float32 ``[3, image_size, image_size]`` in [-1, 1], as generators expect: the shorter side is resized,
    with antialiasing, and the middle is cut out. In training they are mirrored at random. Classes are numbered in the
    order of their names. Files are read when they are needed; ``num_workers`` processes hide that.

    Args:
        root: the folder.
        image_size: side of the square images in pixels.
        num_clients: N; must equal the strategy's.
        partitioner: who gets what; None means IID.
        mirror: mirror training images at random.
        batch_size: samples in a client's minibatch.
        eval_batch_size: samples in a minibatch of validation and prediction.
        num_workers: worker processes of each loader.
        client_eval_split: share of each client's samples held out to evaluate its own model on, not mirrored.
        drop_last: leave out the last, smaller minibatch of a client's pass.
        seed: of the partition.

    Raises:
        ValueError: as :class:`ClientDataModule`; when the data are first used, if there is no such folder of images, or
            the classes of ``val`` are not those of ``train``.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        num_clients: int = 1,
        partitioner: Partitioner | None = None,
        mirror: bool = True,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        client_eval_split: float = 0.0,
        drop_last: bool = False,
        seed: int = 0,
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
        check_paths(root=root)
        check_counts(image_size=image_size)
        check_flags(mirror=mirror)
        self.root, self.image_size, self.mirror = Path(root), image_size, mirror

    def splits(self) -> Splits:
        train = self._folder("train", self.mirror)
        val = self._folder("val", mirror=False) if (self.root / "val").is_dir() else None
        if val is not None and val.classes != train.classes:
            different = sorted(set(val.classes) ^ set(train.classes))
            raise ValueError(f"root={str(self.root)!r}: train and val have different classes: {different[:5]}.")
        return Splits(train, val, train_for_evaluation=self._folder("train", mirror=False))

    def _folder(self, part: str, mirror: bool) -> Any:
        from torchvision import datasets
        from torchvision.transforms import v2

        crop = [v2.Resize(self.image_size), v2.CenterCrop(self.image_size)]
        flip = [v2.RandomHorizontalFlip()] if mirror else []
        scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
        try:
            return datasets.ImageFolder(self.root / part, v2.Compose([*crop, *flip, *scale]))
        except FileNotFoundError as error:
            raise ValueError(
                f"root={str(self.root)!r}: {error} The images must lie in {part}/<class>/ under it."
            ) from error

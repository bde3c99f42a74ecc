"""What metrics of generators look at: the pixels themselves, or the features of a small classifier.

Any module from images to features ``[B, d]`` with an attribute ``num_features`` (d) will do, for
``torchmetrics.image.fid.FrechetInceptionDistance(feature=...)`` too.

Shapes: B = images of a batch.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_fed.checks import check_counts

if TYPE_CHECKING:
    from lightning_fed.modules import SmallConvNet

EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 20, 64, 3e-3, 0


class PixelFeatures(nn.Module):
    """Images as vectors, ``[B, ...]`` to ``[B, d]``.

    Args:
        num_features: d, the numbers of an image.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        check_counts(num_features=num_features)
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class DigitsFeatures(nn.Module):
    """The 128 features before the last layer of a small convolutional network that knows scikit-learn's digits.

    The first one in a process trains for a few seconds on the 1,197 training images of
    :class:`~lightning_fed.data.DigitsDataModule`, from a fixed seed; it is then right for 99 % of the other 600 images.
    Nothing is downloaded.

    Attributes:
        classifier: the network, from images to logits ``[B, 10]``.

    Shapes:
        images float ``[B, 1, 8, 8]`` in [0, 1]; features ``[B, 128]``.
    """

    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        self.classifier = copy.deepcopy(trained_on_digits())
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f"images are {list(images.shape)}, but this network knows digits only, [batch, 1, 8, 8].")
        features: Tensor = self.classifier.layers[:-1](images.float())
        return features


@cache
def trained_on_digits() -> SmallConvNet:
    """A classifier of digits in [0, 1]; global random numbers stay as they are."""
    # These stand on metrics.
    from lightning_fed.data import DigitsDataModule
    from lightning_fed.modules import SmallConvNet

    images, labels = DigitsDataModule().datasets.train[:]
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(SEED)
        network = SmallConvNet()
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(images)).split(BATCH_SIZE):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
                optimizer.step()
        optimizer.zero_grad()
    return network

"""Networks for small images: two that train on a CPU within seconds on 8x8 digits, and the ResNet-18 of CIFAR."""

from __future__ import annotations

import timm
from torch import Tensor, nn

from lightning_fed.checks import check_counts


class SmallConvNet(nn.Module):
    """Two convolutions and a linear layer: 6,186 parameters for 10 classes.

    Its normalization is GroupNorm, which keeps no running statistics: clients with different label distributions
    average badly under BatchNorm (Hsieh et al., ICML 2020, "The Non-IID Data Quagmire").

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.

    Shapes:
        images ``[B, in_channels, H, W]`` of any size from 4x4 on, logits ``[B, num_classes]``.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class MLP(nn.Module):
    """Two hidden layers of ReLUs on the flattened image: 8,970 parameters for the 8x8 digits.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: side of the square images, in pixels.
        hidden_size: units of each hidden layer.

    Shapes:
        images ``[B, in_channels, image_size, image_size]``, logits ``[B, num_classes]``.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 8, hidden_size: int = 64) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_counts(image_size=image_size, hidden_size=hidden_size)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def resnet18_cifar(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-18 for 32x32 images, as papers on CIFAR use it: a 3x3 stem without stride or pooling.

    timm's ``resnet18`` begins with the stem for 224x224 images, which leaves 8x8 pixels of a CIFAR image.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
    """
    network = timm.create_model("resnet18", num_classes=num_classes, in_chans=in_channels)
    network.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network

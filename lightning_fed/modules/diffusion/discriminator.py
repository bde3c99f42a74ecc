"""A discriminator of noisy images that reads the features of a diffusion model.

Shapes: B = samples, C, H, W = channels, height and width of an image or of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lightning_fed.checks import check_counts, check_kinds, check_names, given
from lightning_fed.modules.diffusion.denoiser import EDMDenoiser

# A map is halved until its sides are no longer than this, and then read by one kernel as large as itself.
LAST_SIDE = 4
# In a group of GroupNorm, which on a 1 x 1 map normalises over these alone.
CHANNELS_PER_GROUP = 16


class _AllSeen(Exception):
    """Ends a forward pass whose further layers nobody needs."""


class FeatureDiscriminator(nn.Module):
    """Convolutional heads on feature maps of a denoiser; its logit is their mean.

    The denoiser is not part of this module: it is neither trained nor saved with it, and has to be on the same device.
    A forward pass ends at the last of the layers that are read. Gradients flow through the denoiser to the images.

    Args:
        denoiser: whose features to read: the teacher in f-distill, the fake score network in DMD2.
        layers: names of submodules of its network, each with one head.
        shape: of an image, ``(C, H, W)``, for networks that do not tell.

    Shapes:
        noisy ``[B, C, H, W]``, sigma ``[B]``, class_labels int64 ``[B]`` or None; logits ``[B]``, positive where an
        image looks like the teacher's.

    Raises:
        ValueError: if the network has no such layer, or the shape is unknown.
    """

    denoiser: nn.Module
    read: list[nn.Module]

    def __init__(
        self, denoiser: nn.Module, layers: Sequence[str] = ("mid_block",), shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        check_kinds(nn.Module, denoiser=denoiser)
        check_kinds((list, tuple), feature_layers=layers, **given(shape=shape))
        for layer in layers:
            check_names(feature_layers=layer)
        for size in shape or ():
            check_counts(shape=size)
        if shape is not None and len(shape) != 3:
            raise ValueError(f"shape={shape} must be that of an image, (C, H, W).")
        self.layers = tuple(layers)
        # Past nn.Module.__setattr__, which would register it.
        self.__dict__["denoiser"] = denoiser
        self.__dict__["read"] = [submodule(denoiser, layer) for layer in self.layers]
        shape = shape or getattr(denoiser, "sample_shape", None)
        if shape is None:
            raise ValueError("shape=None: the teacher's network has no sample_size, so pass shape=(C, H, W).")
        self.heads = nn.ModuleList(head_for(features) for features in self._try(shape))

    def forward(self, noisy: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        features = self.features(noisy, sigma, class_labels)
        logits = [head(as_map(found)).flatten(1).mean(dim=1) for head, found in zip(self.heads, features)]
        return torch.stack(logits).mean(dim=0)

    def features(self, noisy: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> list[Tensor]:
        """What the layers put out, in their order."""
        found: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found.setdefault(module, output if isinstance(output, Tensor) else output[0])
            if len(found) == len(set(self.read)):
                raise _AllSeen

        hooks = [module.register_forward_hook(keep) for module in set(self.read)]
        try:
            self.denoiser(noisy, sigma, class_labels)
        except _AllSeen:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if len(found) < len(set(self.read)):
            raise ValueError(f"feature_layers={self.layers}: the network does not use all of them in a forward pass.")
        return [found[module] for module in self.read]

    @torch.no_grad()
    def _try(self, shape: tuple[int, ...]) -> list[Tensor]:
        """Features of one empty image, for their sizes."""
        some = next(self.denoiser.parameters(), torch.zeros(()))
        image = torch.zeros(1, *shape, dtype=some.dtype, device=some.device)
        labels = None
        if getattr(self.denoiser, "num_classes", None) is not None:
            labels = torch.zeros(1, dtype=torch.int64, device=some.device)
        was_training = self.denoiser.training
        self.denoiser.eval()
        features = self.features(image, torch.ones(1, dtype=some.dtype, device=some.device), labels)
        self.denoiser.train(was_training)
        return features


def submodule(denoiser: nn.Module, layer: str) -> nn.Module:
    """A submodule of a denoiser's network by name."""
    network = denoiser.network if isinstance(denoiser, EDMDenoiser) else denoiser
    try:
        return network.get_submodule(layer)
    except AttributeError:
        known = ", ".join(repr(name) for name, _ in network.named_children())
        raise ValueError(
            f"feature_layers: {type(network).__name__} has no layer {layer!r}; it has {known}, and what is inside of "
            "them. Or pass a discriminator of your own."
        ) from None


def as_map(features: Tensor) -> Tensor:
    """``[B, C, H, W]`` of a map; of vectors ``[B, C]`` and tokens ``[B, T, C]`` the map that is as long as they are."""
    if features.ndim == 3:
        features = features.transpose(1, 2)
    return features.reshape(*features.shape, *[1] * (4 - features.ndim))


def head_for(features: Tensor) -> nn.Sequential:
    """A head that fits a feature map: convolutions that halve it, one that reads all of it, and a linear map."""
    _, channels, *sides = as_map(features).shape
    layers: list[nn.Module] = []
    while max(sides) > LAST_SIDE:
        halve = [side > LAST_SIDE for side in sides]
        layers += convolution(channels, [4 if h else 1 for h in halve], [2 if h else 1 for h in halve])
        sides = [side // 2 if h else side for side, h in zip(sides, halve)]
    layers += convolution(channels, sides, [1, 1])
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def convolution(channels: int, kernel: list[int], stride: list[int]) -> list[nn.Module]:
    """Convolution, normalisation and nonlinearity."""
    padding = [1 if step == 2 else 0 for step in stride]
    groups = channels // CHANNELS_PER_GROUP if channels % CHANNELS_PER_GROUP == 0 else 1
    kernel_size, strides = (kernel[0], kernel[1]), (stride[0], stride[1])
    conv = nn.Conv2d(channels, channels, kernel_size, strides, (padding[0], padding[1]))
    return [conv, nn.GroupNorm(groups, channels), nn.SiLU()]


def discriminator_losses(fake: Tensor, real: Tensor) -> Tensor:
    """``softplus(fake) + softplus(-real)`` of each pair of logits ``[B]``; at the minimum a logit is ``log p / q``."""
    dtype = torch.promote_types(fake.dtype, torch.float32)
    return softplus(fake.to(dtype)) + softplus(-real.to(dtype))

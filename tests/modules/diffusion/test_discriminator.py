"""A discriminator on the features of a denoiser: heads of every size, and a pass that ends early."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from line_distributions import LineNetwork
from small_denoisers import dit_config, unet_config
from torch import Tensor, nn

from lightning_fed.modules.diffusion import load_denoiser
from lightning_fed.modules.diffusion.discriminator import FeatureDiscriminator, discriminator_losses


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 12])
def test_heads_fit_feature_maps_of_every_size(size: int) -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(1, 32, 1)

        def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
            return self.features(x).mean(dim=1, keepdim=True)

    torch.manual_seed(0)
    found = FeatureDiscriminator(Denoiser(), ["features"], (1, size, size))
    logits = found(torch.randn(6, 1, size, size), torch.ones(6))
    assert logits.shape == (6,) and logits.std() > 1e-4  # a group norm over one number would make them equal
    assert all(name.startswith("heads") for name in found.state_dict())


def test_heads_fit_vectors_and_tokens() -> None:
    line = FeatureDiscriminator(LineNetwork(True), ["layers.1", "layers.3"])
    assert len(line.heads) == 2 and line(torch.randn(5, 1, 1, 1), torch.ones(5)).shape == (5,)
    tokens = FeatureDiscriminator(load_denoiser(dit_config()), ["transformer_blocks.0"])
    labels = torch.zeros(5, dtype=torch.int64)
    assert tokens(torch.randn(5, 1, 8, 8), torch.ones(5), labels).shape == (5,)


def test_the_pass_ends_with_the_last_layer_that_is_read() -> None:
    denoiser, calls = load_denoiser(unet_config()), []
    denoiser.network.up_blocks[0].register_forward_hook(lambda *args: calls.append(1))
    discriminator = FeatureDiscriminator(denoiser)
    x = torch.randn(3, 1, 8, 8, requires_grad=True)
    discriminator(x, torch.ones(3)).sum().backward()
    assert not calls and x.grad.abs().max() > 0
    assert not denoiser.network.mid_block._forward_hooks and denoiser(x, 1.0).shape == x.shape and calls


def test_its_minimum_is_the_logarithm_of_the_ratio() -> None:
    """Teacher over student: at a point of densities 0.3 and 0.1 a logit of log 3."""
    logit, far = torch.zeros(1, dtype=torch.float64), torch.full((1,), 50.0, dtype=torch.float64)
    for _ in range(300):
        logit = logit.detach().requires_grad_()
        loss = 0.3 * discriminator_losses(-far, logit) + 0.1 * discriminator_losses(logit, far)
        logit = logit - 5 * torch.autograd.grad(loss.sum(), logit)[0]
    assert float(logit.detach().exp()) == pytest.approx(3, rel=1e-4)


def test_losses_are_exact_in_half_precision() -> None:
    found = discriminator_losses(torch.tensor([12.0]).half(), torch.tensor([12.0]).half())
    assert found.dtype == torch.float32 and float(found) == pytest.approx(12 + 2 * math.log1p(math.exp(-12)), abs=1e-6)


class Idle(nn.Module):
    """It has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
        return self.used(x).mean(dim=1, keepdim=True)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="UNet2DModel has no layer 'mid'; it has 'conv_in'"):
        FeatureDiscriminator(load_denoiser(unet_config()), ["mid"])
    with pytest.raises(ValueError, match="pass shape="):
        FeatureDiscriminator(Idle(), ["used"])
    with pytest.raises(ValueError, match="does not use all of them"):
        FeatureDiscriminator(Idle(), ["used", "unused"], (1, 4, 4))

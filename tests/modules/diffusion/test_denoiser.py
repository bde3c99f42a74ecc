"""The denoiser against its papers in float64, against diffusers' schedulers, and with networks that do not fit."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from small_denoisers import CLASSES, LinearNetwork, Zero, dit_config, unet_config
from torch import Tensor, nn

from lightning_fed.modules.diffusion import EDMDenoiser, load_denoiser

SIGMAS = [0.002, 0.0021, 0.5, 7.3, 80.0]


def unet(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return load_denoiser(unet_config(**settings)).network


class Recorder(nn.Module):
    """Remembers what a network is given, and answers with its input, shifted."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.seen = x, time
        return x + 1


# -------------------------------------------------------------------------------------------------- preconditioning


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize("time_embedding", ["edm", "consistency"])
def test_against_a_transcription_in_float64(boundary: bool, time_embedding: Any) -> None:
    network, sd, smin = LinearNetwork(), 0.7, 0.002
    W, b, c = (weight.detach().numpy() for weight in (network.W, network.b, network.c))
    x = np.random.default_rng(0).normal(size=(5, 3)) * 3
    s = np.array(SIGMAS)
    if boundary:
        c_skip = sd**2 / ((s - smin) ** 2 + sd**2)
        c_out = (s - smin) * sd / np.sqrt(s**2 + sd**2)
    else:
        c_skip = sd**2 / (s**2 + sd**2)
        c_out = s * sd / np.sqrt(s**2 + sd**2)
    c_in = 1 / np.sqrt(s**2 + sd**2)
    time = np.log(s) / 4 if time_embedding == "edm" else 250 * np.log(s)
    F = (c_in[:, None] * x) @ W.T + time[:, None] * b + c
    expected = c_skip[:, None] * x + c_out[:, None] * F

    denoiser = EDMDenoiser(network, sd, smin, 80.0, time_embedding, boundary)
    found = denoiser(torch.from_numpy(x), torch.from_numpy(s)).detach().numpy()
    assert np.abs(found - expected).max() <= 1e-11 * np.abs(expected).max()


@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_boundary_is_the_identity_to_the_bit(sigma_data: float, dtype: torch.dtype) -> None:
    denoiser = EDMDenoiser(Recorder(), sigma_data, time_embedding="consistency", boundary=True)
    x = torch.randn(4, 1, 2, 2).to(dtype)
    for sigma in (0.002, torch.full((4,), 0.002, dtype=torch.promote_types(dtype, torch.float32))):
        assert torch.equal(denoiser(x, sigma), x.to(denoiser(x, sigma).dtype))
    assert not torch.equal(EDMDenoiser(Recorder(), sigma_data)(x, 0.002), x)


def test_a_level_for_each_sample_is_that_of_all() -> None:
    denoiser, x = EDMDenoiser(unet()), torch.randn(3, 1, 8, 8)
    sigma = torch.tensor([0.01, 1.0, 50.0])
    together = denoiser(x, sigma)
    for i in range(3):
        torch.testing.assert_close(denoiser(x[i : i + 1], float(sigma[i]))[0], together[i], rtol=0, atol=2e-6)


@pytest.mark.parametrize("sigma", [0.002, 0.8209, 80.0])
def test_time_is_that_of_diffusers(sigma: float) -> None:
    x, level = torch.randn(2, 1, 8, 8), torch.tensor([sigma])
    edm = EDMDenoiser(Recorder())
    edm(x, sigma)
    np.testing.assert_allclose(
        edm.network.seen[1], diffusers.EDMEulerScheduler().precondition_noise(level).expand(2), rtol=1e-6
    )
    consistency = EDMDenoiser(Recorder(), time_embedding="consistency")
    consistency(x, sigma)
    # To the bit: a rounding here is a phase in the sine embedding.
    exact = np.float32(diffusers.CMStochasticIterativeScheduler().sigma_to_t(sigma))
    assert consistency.network.seen[1].tolist() == [exact, exact]


def test_preconditioning_is_that_of_diffusers() -> None:
    x, F, level = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor(3.7)

    class Fixed(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            self.seen = x
            return F

    edm = EDMDenoiser(Fixed(), sigma_data=0.6)
    theirs = diffusers.EDMEulerScheduler(sigma_data=0.6)
    torch.testing.assert_close(edm(x, level), theirs.precondition_outputs(x, F, level))
    torch.testing.assert_close(edm.network.seen, theirs.precondition_inputs(x, level))
    consistency = EDMDenoiser(Fixed(), sigma_data=0.6, boundary=True)
    c_skip, c_out = diffusers.CMStochasticIterativeScheduler(sigma_data=0.6).get_scalings_for_boundary_condition(level)
    torch.testing.assert_close(consistency(x, level), c_skip * x + c_out * F)


# -------------------------------------------------------------------------------------------------------- precision


def test_half_precision_is_for_the_network_alone() -> None:
    """At sigma_max, where bfloat16 would lose c_skip x."""
    denoiser = EDMDenoiser(Zero(), sigma_data=0.5)
    x = 80 * torch.randn(8, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        halved = denoiser(x, 80.0)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, 0.25 / (80**2 + 0.25) * x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_weights_in_half_precision(dtype: torch.dtype) -> None:
    denoiser, x = EDMDenoiser(unet()), torch.randn(2, 1, 8, 8)
    exact = denoiser(x, 2.0)
    with torch.autocast("cpu", dtype):
        autocast = denoiser(x, 2.0)
    halved = denoiser.to(dtype)(x.to(dtype), 2.0)
    for found in (autocast, halved):
        assert found.dtype == torch.float32 and not torch.equal(found, exact)
        torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


def test_float64() -> None:
    x = torch.randn(2, 1, 8, 8)
    exact = EDMDenoiser(unet()).double()(x.double(), 2.0)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(EDMDenoiser(unet())(x, 2.0), exact.float(), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- classes


def test_classes_of_a_unet() -> None:
    denoiser, x = EDMDenoiser(unet(num_class_embeds=CLASSES)), torch.randn(2, 1, 8, 8)
    assert denoiser.num_classes == CLASSES and denoiser.no_class is None
    one, other = (denoiser(x, 1.0, torch.tensor([label, label])) for label in (0, 1))
    assert (one - other).abs().max() > 1e-3
    assert EDMDenoiser(unet()).num_classes is None


def test_a_dit_without_labels_is_told_its_class_of_no_class() -> None:
    torch.manual_seed(0)
    denoiser, x = load_denoiser(dit_config()).eval(), torch.randn(2, 1, 8, 8)
    assert (denoiser.num_classes, denoiser.no_class, denoiser.sample_shape) == (CLASSES, CLASSES, (1, 8, 8))
    unconditional = denoiser(x, 1.0)
    assert torch.equal(unconditional, denoiser(x, 1.0, torch.tensor([CLASSES, CLASSES])))
    assert not torch.equal(unconditional, denoiser(x, 1.0, torch.tensor([0, 0])))


def test_an_unconditional_dit() -> None:
    denoiser = load_denoiser(dit_config(num_embeds_ada_norm=0))
    assert denoiser.num_classes is None
    assert denoiser.train()(torch.randn(2, 1, 8, 8), 1.0).shape == (2, 1, 8, 8)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sigma_min": 90.0}, "sigma_min=90.0, sigma_max=80.0: it must be 0 < sigma_min < sigma_max"),
        ({"time_embedding": "EDM"}, r"time_embedding='EDM' is not one of \('edm', 'consistency'\)"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EDMDenoiser(Zero(), **settings)


class NeedsText(nn.Module):
    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (lambda: unet(time_embedding_type="fourier"), "time_embedding_type='fourier'"),
        (lambda: unet(time_embedding_type="learned", num_train_timesteps=9), "time_embedding_type='learned'"),
        (lambda: unet(class_embed_type="timestep"), "class_embed_type='timestep'"),
        (lambda: unet(out_channels=2), "in_channels=1 and out_channels=2: they must be equal"),
        (lambda: unet(sample_size=9), "images of 9 x 9 do not fit the network.* multiples of 2"),
        (lambda: unet(sample_size=[8, 11]), "images of 8 x 11 do not fit"),
        (lambda: load_denoiser(dit_config(sample_size=9)), "images of 9 x 9 do not fit.* multiples of 2"),
        (NeedsText, "NeedsText, cannot be called with images and a time.*'text'"),
        (lambda: nn.Linear(2, 2), "Linear, cannot be called with images and a time.*too many positional"),
        (diffusers.AutoencoderKL, "AutoencoderKL, cannot be called with images and a time"),
    ],
)
def test_networks_that_cannot_work(network: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EDMDenoiser(network())


def test_images_that_do_not_fit() -> None:
    known, unknown = EDMDenoiser(unet()), EDMDenoiser(unet(sample_size=None))
    assert unknown.sample_shape is None
    known.check_images((1, 8, 8))
    unknown.check_images((1, 6, 10))
    for denoiser, shape, says in (
        (known, (3, 8, 8), r"images are \[3, 8, 8\], the network is for \[1, 8, 8\].*in_channels"),
        (known, (1, 16, 16), r"images are \[1, 16, 16\], the network is for \[1, 8, 8\].*sample_size"),
        (unknown, (3, 8, 8), "images have 3 channels, the network has in_channels=1"),
        (unknown, (1, 8, 7), "images of 8 x 7 do not fit the network"),
    ):
        with pytest.raises(ValueError, match=says):
            denoiser.check_images(shape)


def test_a_network_that_makes_something_else_of_images() -> None:
    class Learned(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor]:
            return (torch.cat([x, x], dim=1),)

    with pytest.raises(ValueError, match=r"the network makes \[2, 8, 8\] of images \[1, 8, 8\]"):
        EDMDenoiser(Learned())(torch.zeros(1, 1, 8, 8), 1.0)


# ------------------------------------------------------------------------------------------------------------ copies


def test_a_copy_has_parameters_of_its_own_that_can_be_trained() -> None:
    frozen = EDMDenoiser(unet(), sigma_data=0.6, sigma_max=20.0, time_embedding="consistency").requires_grad_(False)
    copied = frozen.copy(boundary=True)
    assert copied.settings == {**frozen.settings, "boundary": True}
    for theirs, ours in zip(frozen.parameters(), copied.parameters()):
        assert torch.equal(theirs, ours) and ours.requires_grad and theirs.data_ptr() != ours.data_ptr()

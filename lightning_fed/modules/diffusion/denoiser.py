"""A network of diffusers as a denoiser: EDM's preconditioning, and the one whose boundary condition is exact.

Shapes: B = samples, C, H, W = channels, height and width of an image.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_fed.checks import check_choice, check_flags, check_kinds, check_numbers

TimeEmbedding = Literal["edm", "consistency"]


class EDMDenoiser(nn.Module):
    """``D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)``: the estimated clean image (Karras et al. 2022, table 1).

    ======== =============================================== ==============================================
    factor   ``boundary=False`` (EDM)                        ``boundary=True`` (consistency models, eq. 5)
    ======== =============================================== ==============================================
    c_skip   ``sigma_data^2 / (sigma^2 + sigma_data^2)``     the same of ``sigma - sigma_min``
    c_out    ``sigma sigma_data / sqrt(sigma^2 + sigma_data^2)``  ``(sigma - sigma_min) sigma_data / sqrt(...)``
    c_in     ``1 / sqrt(sigma^2 + sigma_data^2)``            the same
    ======== =============================================== ==============================================

    With ``boundary=True`` the denoiser is the identity at ``sigma_min``, exactly.

    Args:
        network: F, any diffusers model that takes images and a time, and class labels if it knows classes
            (``UNet2DModel``, ``DiTTransformer2DModel``), or any module with such a ``forward(x, time)``. It runs in the
            precision of its weights.
        sigma_data: standard deviation of the data, 0.5 for photographs in [-1, 1].
        sigma_min: the smallest noise level, 0.002 in the papers.
        sigma_max: the largest, 80 in the papers.
        time_embedding: what the network is told of sigma. ``"edm"``: ``log(sigma) / 4``, as EDM's checkpoints expect.
            ``"consistency"``: ``250 log(sigma)``, as diffusers' pipeline of consistency models does.
        boundary: see above.

    Shapes:
        x ``[B, C, H, W]``, sigma ``[B]`` or a number, class_labels int64 ``[B]`` or None; the estimate is like x, in
        float32 at least. A DiT that is given no labels is told its class of no class.

    Raises:
        ValueError: if a setting is out of range, or the network needs something else than images, a time and classes,
            embeds time in a way that cannot work, or is for images that do not fit its own levels.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        time_embedding: TimeEmbedding = "edm",
        boundary: bool = False,
    ) -> None:
        super().__init__()
        check_kinds(nn.Module, network=network)
        check_numbers("(0, inf)", sigma_data=sigma_data, sigma_min=sigma_min, sigma_max=sigma_max)
        check_choice("time_embedding", time_embedding, "edm", "consistency")
        check_flags(boundary=boundary)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: it must be 0 < sigma_min < sigma_max.")
        self.network = network
        self.sigma_data, self.sigma_min, self.sigma_max = float(sigma_data), float(sigma_min), float(sigma_max)
        self.time_embedding: TimeEmbedding = time_embedding
        self.boundary = boundary
        self._check_network()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor but the network."""
        names = ("sigma_data", "sigma_min", "sigma_max", "time_embedding", "boundary")
        return {name: getattr(self, name) for name in names}

    @property
    def num_classes(self) -> int | None:
        """Classes that the network can be told; None if it knows none."""
        config = network_config(self.network)
        return config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or None

    @property
    def no_class(self) -> int | None:
        """The label that means no class: a DiT has one, after those of its classes. None if there is none."""
        return network_config(self.network).get("num_embeds_ada_norm")

    @property
    def sample_shape(self) -> tuple[int, int, int] | None:
        """``(C, H, W)`` of an image, if the network tells."""
        config = network_config(self.network)
        size, channels = config.get("sample_size"), config.get("in_channels")
        if size is None or channels is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return int(channels), int(height), int(width)

    def check_images(self, shape: tuple[int, ...]) -> None:
        """Refuse images ``(C, H, W)`` that the network cannot take, as far as it tells.

        Raises:
            ValueError: naming both sizes and the setting.
        """
        config, expected = network_config(self.network), self.sample_shape
        if expected is not None and tuple(shape) != expected:
            raise ValueError(
                f"images are {list(shape)}, the network is for {list(expected)} (channels, height, width): set its "
                "in_channels, out_channels and sample_size, or transform the data."
            )
        if (channels := config.get("in_channels")) is not None and shape[0] != channels:
            raise ValueError(f"images have {shape[0]} channels, the network has in_channels={channels}.")
        # Each level but the last halves the image, and each patch is a square of it.
        patch = config.get("patch_size")
        divisor = 2 ** (len(config.get("block_out_channels", [0])) - 1) * (patch if isinstance(patch, int) else 1)
        if any(side % divisor for side in shape[1:]):
            raise ValueError(
                f"images of {' x '.join(map(str, shape[1:]))} do not fit the network, which halves and doubles them: "
                f"height and width must be multiples of {divisor}. Resize or pad them, or take fewer levels."
            )

    def copy(self, boundary: bool) -> EDMDenoiser:
        """A denoiser with the same weights in parameters of its own, which can be trained."""
        network = copy.deepcopy(self.network).requires_grad_(True)
        return EDMDenoiser(network, **{**self.settings, "boundary": boundary})

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        # The factors differ by 10^4 at sigma_max, so only the network may be in half precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        # A level that is given as a number keeps its digits until its logarithm is taken.
        sigma = torch.as_tensor(sigma, dtype=_widest(x.device), device=x.device).expand(len(x))
        level, x = like_images(sigma.to(dtype), x), x.to(dtype)
        c_skip, c_out, c_in = self.scalings(level)
        if class_labels is None and self.no_class is not None:
            class_labels = torch.full((len(x),), self.no_class, device=x.device)
        labels = {} if class_labels is None else {"class_labels": class_labels}
        weights = next(self.network.parameters(), x)
        output = self.network((c_in * x).to(weights.dtype), self.time(sigma).to(dtype), **labels)
        output = output if isinstance(output, Tensor) else output[0]
        if output.shape != x.shape:
            raise ValueError(
                f"the network makes {list(output.shape[1:])} of images {list(x.shape[1:])}: it must have "
                "out_channels equal to in_channels (no learned variance) and a size that its levels divide."
            )
        return c_skip * x + c_out * output.to(dtype)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, each of sigma's shape."""
        offset = sigma - self.sigma_min if self.boundary else sigma
        scale = (sigma**2 + self.sigma_data**2).rsqrt()
        # Divided by sigma_data^2, so that it is 1 to the bit at the boundary.
        c_skip = 1 / (1 + (offset / self.sigma_data) ** 2)
        return c_skip, offset * self.sigma_data * scale, scale

    def time(self, sigma: Tensor) -> Tensor:
        """What the network is told of the noise levels, ``[B]``.

        In float64 where there is one: a rounding of ``250 log(sigma)`` is a phase in the sine embedding.
        """
        log = sigma.to(_widest(sigma.device)).log()
        return log / 4 if self.time_embedding == "edm" else 250 * log

    def _check_network(self) -> None:
        config, name = network_config(self.network), type(self.network).__name__
        as_we_do = f"the network, {name}, cannot be called with images and a time, as UNet2DModel is:"
        try:
            taken = list(inspect.signature(self.network.forward).bind("images", "time").arguments)
        except TypeError as error:
            raise ValueError(f"{as_we_do} {error}.") from error
        if config and len(taken) == 2 and "time" not in taken[1]:
            raise ValueError(f"{as_we_do} it takes {taken[0]} and {taken[1]}.")
        embedding = config.get("time_embedding_type", "positional")
        if embedding != "positional":
            raise ValueError(
                f"the network has time_embedding_type={embedding!r}: its time is a logarithm of the noise level here, "
                "negative and not whole, which only 'positional' can embed."
            )
        if (kind := config.get("class_embed_type")) is not None:
            raise ValueError(f"the network has class_embed_type={kind!r}: classes are told by num_class_embeds alone.")
        channels, out_channels = config.get("in_channels"), config.get("out_channels")
        if channels is not None and out_channels is not None and channels != out_channels:
            raise ValueError(
                f"the network has in_channels={channels} and out_channels={out_channels}: they must be equal (no "
                "learned variance)."
            )
        if self.sample_shape is not None:
            self.check_images(self.sample_shape)


def like_images(values: Tensor, images: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, 1, 1]``."""
    return values.view(-1, *[1] * (images.ndim - 1))


def network_config(network: nn.Module) -> dict[str, Any]:
    """The configuration of a diffusers model, empty for other modules."""
    config: Any = getattr(network, "config", None)
    return dict(config) if hasattr(config, "items") else {}


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64

"""The networks of a distillation: where each comes from, and what a checkpoint remembers of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from lightning_fed.modules.diffusion.denoiser import EDMDenoiser
from lightning_fed.modules.diffusion.diffusion_module import DiffusionModule
from lightning_fed.modules.diffusion.pretrained import DEFAULTS, load_denoiser, network_setting

Source = nn.Module | dict[str, Any] | str
# What a checkpoint says of a network that it cannot describe.
UNNAMED = "(an object)"


class ModuleDenoiser(EDMDenoiser):
    """A module that denoises by itself, without preconditioning: ``module(x, sigma, class_labels)`` is the estimate.

    Args:
        network: the module. It may tell ``num_classes`` and ``sample_shape`` by attributes of these names.
        sigma_data: standard deviation of the data.
        sigma_min: the smallest noise level.
        sigma_max: the largest.
    """

    def __init__(
        self, network: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0
    ) -> None:
        super().__init__(network, sigma_data, sigma_min, sigma_max, time_embedding="consistency", boundary=True)

    @property
    def num_classes(self) -> int | None:
        return getattr(self.network, "num_classes", None)

    @property
    def sample_shape(self) -> tuple[int, int, int] | None:
        return getattr(self.network, "sample_shape", None)

    def copy(self, boundary: bool) -> ModuleDenoiser:
        network = copy.deepcopy(self.network).requires_grad_(True)
        return ModuleDenoiser(network, self.sigma_data, self.sigma_min, self.sigma_max)

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        return self.network(x, level, class_labels)

    def _check_network(self) -> None:
        """It is called in its own way."""


def denoiser_from(
    source: nn.Module | Mapping[str, Any] | str | Path, setting: str, levels: Mapping[str, Any], boundary: bool = False
) -> EDMDenoiser:
    """A denoiser of whatever one may be given as.

    Args:
        source: anything that :func:`load_denoiser` takes, what :func:`remembered` returns, or any other module, which
            is then a denoiser itself.
        setting: the name of the argument, for errors.
        levels: arguments of :class:`EDMDenoiser`; None where the source tells.
        boundary: of a denoiser that is made here.

    Raises:
        ValueError: if it is none, or it is an object that a checkpoint could not hold.
    """
    if source == UNNAMED:
        raise ValueError(
            f"{setting} was given as an object, which checkpoints do not hold: give it again, "
            f"FDistill.load_from_checkpoint(path, {setting}=...)."
        )
    if isinstance(source, ModuleDenoiser):
        return source
    if isinstance(source, EDMDenoiser):
        return load_denoiser(source, **levels, boundary=source.boundary, setting=setting)
    if isinstance(source, nn.Module) and not isinstance(source, (diffusers.ModelMixin, DiffusionModule)):
        noise = {name: levels[name] for name in ("sigma_data", "sigma_min", "sigma_max") if levels[name] is not None}
        return ModuleDenoiser(source, **noise)
    if isinstance(source, Mapping) and "network" in source:
        settings = {name: source[name] for name in (*DEFAULTS, "boundary")}
        return load_denoiser(source["network"], **settings, setting=setting)
    return load_denoiser(source, **levels, boundary=boundary, setting=setting)


def remembered(denoiser: EDMDenoiser) -> dict[str, Any] | str:
    """What a checkpoint holds of a denoiser beside its weights: plain values, of which a like one can be made."""
    network = None if isinstance(denoiser, ModuleDenoiser) else network_setting(denoiser)
    return UNNAMED if network is None else {"network": network, **denoiser.settings}


def remembered_teacher(denoiser: EDMDenoiser, source: Any) -> dict[str, Any] | str:
    """The same of a teacher, whose weights a checkpoint does not hold, with where it came from."""
    known = remembered(denoiser)
    if isinstance(known, str):
        return known
    if isinstance(source, Mapping):
        return dict(source)
    return {"source": str(source) if isinstance(source, (str, Path)) else UNNAMED, **known}


def remembered_source(teacher: Any) -> str | None:
    """Where a teacher's weights are to be loaded from, if it is only what a checkpoint has remembered of one.

    Raises:
        ValueError: if it is the configuration of a network, which never had any.
    """
    if not isinstance(teacher, Mapping):
        return None
    if "source" not in teacher:
        raise ValueError("teacher is a configuration: a network with random weights teaches nothing, train it first.")
    return teacher["source"]


def bring_back(teacher: EDMDenoiser, source: str) -> None:
    """Load the weights of a teacher that a checkpoint has remembered from where it was.

    Raises:
        ValueError: if it is not there any more.
    """
    way_out = "Give another one: FDistill.load_from_checkpoint(path, teacher=...)."
    if source == UNNAMED:
        raise ValueError(
            "this student was distilled from a teacher that was given as an object, which checkpoints do not hold. It "
            f"can be sampled from, but not trained further. {way_out}"
        )
    try:
        found = load_denoiser(source, **{name: teacher.settings[name] for name in DEFAULTS})
        teacher.network.load_state_dict(found.network.state_dict())
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"teacher={source!r} is needed for training (not for sampling): {error} {way_out}") from error


def check_alike(teacher: EDMDenoiser, **others: EDMDenoiser) -> None:
    """Refuse networks that are for other images or classes than the teacher, or have nothing to train.

    Raises:
        ValueError: naming the network and what differs.
    """
    for setting, denoiser in others.items():
        for name in ("num_classes", "sample_shape"):
            if getattr(denoiser, name) != getattr(teacher, name):
                raise ValueError(
                    f"{setting} has {name}={getattr(denoiser, name)}, the teacher {getattr(teacher, name)}: take one "
                    f"like the teacher, or leave {setting} out to start from a copy of it."
                )
        if not any(parameter.requires_grad for parameter in denoiser.parameters()):
            raise ValueError(f"{setting} has no parameters to train: pass {setting}, a module that has.")

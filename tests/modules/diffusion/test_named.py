"""Settings chosen by name: objects, names and mappings mean the same, and who misspells one is told what exists."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_fed.modules.diffusion import KarrasUniform, LogNormal, NoiseDistribution, Weighting
from lightning_fed.modules.diffusion.named import Named


@pytest.mark.parametrize("choice", ["karras", {"name": "karras"}, KarrasUniform()])
def test_three_ways_to_say_the_same(choice: Any) -> None:
    assert NoiseDistribution.of(choice, "noise") == KarrasUniform()


def test_fields_reach_the_member_and_come_back_plain() -> None:
    noise = NoiseDistribution.of({"name": "lognormal", "mean": -1.1, "std": 2.0}, "noise")
    assert noise == LogNormal(-1.1, 2.0)
    assert noise.plain() == {"name": "lognormal", "mean": -1.1, "std": 2.0}
    file = io.BytesIO()
    torch.save(noise.plain(), file)
    file.seek(0)
    assert NoiseDistribution.of(torch.load(file, weights_only=True), "noise") == noise


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("lognormel", r"noise='lognormel' is unknown: did you mean 'lognormal'\? There are 'lognormal', 'karras'"),
        ({"name": "karas"}, r"did you mean 'karras'\?"),
        ("something else", r"noise='something else' is unknown: There are 'lognormal'"),
        ({"mean": 1.0}, "is unknown: There are"),
        (3, "noise=3 is unknown"),
        (Weighting.of("edm", "weighting"), "is unknown: There are 'lognormal'"),
        ({"name": "lognormal", "mu": 1.0}, r"noise: 'lognormal' has no \['mu'\]; it takes \['mean', 'std'\]"),
        ({"name": "lognormal", "std": -1.0}, "std=-1.0"),
    ],
)
def test_what_does_not_exist(choice: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NoiseDistribution.of(choice, "noise")


def test_members_without_settings_say_so() -> None:
    with pytest.raises(ValueError, match=r"'edm' has no \['scale'\]; it takes no settings"):
        Weighting.of({"name": "edm", "scale": 2}, "weighting")


class Shape(Named):
    """A family of a user's own, whose member needs a value."""


@dataclass(frozen=True)
class Circle(Shape):
    name = "circle"
    radius: float


@dataclass(frozen=True)
class Dot(Circle):
    name = "dot"
    radius: float = 0.0


def test_a_family_of_ones_own() -> None:
    assert Shape.members() == {"circle": Circle, "dot": Dot}
    assert Shape.of("dot", "shape") == Dot() and Shape.of({"name": "circle", "radius": 2}, "shape") == Circle(2)
    with pytest.raises(ValueError, match=r"shape: 'circle' needs .*'radius'"):
        Shape.of("circle", "shape")

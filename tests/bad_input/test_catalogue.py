"""The catalogue of bad settings: every setting of every public class has an entry, and every entry is refused."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest
from bad_input import callbacks, data_modules, hostile_clients, lightning_modules, metrics, parts, strategies
from bad_input.bad_values import Case, Catalogue, problems

CATALOGUE: Catalogue = {
    kind: case
    for room in (strategies, hostile_clients, parts, callbacks, data_modules, metrics, lightning_modules)
    for kind, case in room.CATALOGUE.items()
}
# Rooms that say what is public, and others whose classes without an underscore are.
PUBLIC = ("", ".strategies", ".callbacks", ".modules", ".modules.diffusion", ".data", ".metrics", ".compression")
OPEN = (
    "topology",
    "partition",
    "proximal",
    "sharpness",
    "federation.availability",
    "federation.layout",
    "federation.participation",
    "federation.virtual_clock",
    "federation.local_rules",
)
NOT_SETTINGS = {
    "Splits": "what a data module hands to its base class",
    "Moments": "a result",
    "Layer": "a part of a module",
    "SparseVector": "a result",
    "DenseVector": "a result",
    "MembershipChange": "a result",
    "LocalGradient": "what the engine hands to a local rule",
    "LocalRule": "a base without settings",
    "Divergence": "a base without settings",
    "NoiseDistribution": "a base without settings",
    "NoisePairs": "a base without settings",
    "Objective": "a base whose members are in the catalogue",
    "Weighting": "a base without settings",
}


def public_classes() -> list[type]:
    """Every class that a user may make an object of."""
    found: dict[str, type] = {}
    for name in PUBLIC:
        module = importlib.import_module(f"lightning_fed{name}")
        found |= {each: getattr(module, each) for each in module.__all__}
    for name in OPEN:
        module = importlib.import_module(f"lightning_fed.{name}")
        found |= {f"{name}.{each}": kind for each, kind in vars(module).items() if is_own(module, each, kind)}
    classes = {kind for kind in found.values() if inspect.isclass(kind)}
    kept = [kind for kind in classes if not inspect.isabstract(kind) or kind in CATALOGUE]
    return sorted((kind for kind in kept if kind.__name__ not in NOT_SETTINGS), key=lambda kind: kind.__qualname__)


def is_own(module: ModuleType, name: str, value: Any) -> bool:
    return inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")


@pytest.mark.parametrize("kind", public_classes(), ids=lambda kind: kind.__name__)
def test_every_setting_is_in_the_catalogue(kind: type) -> None:
    case = CATALOGUE.get(kind, Case())
    settings = set(inspect.signature(kind).parameters) if kind.__init__ is not object.__init__ else set()
    missing, gone = sorted(settings - set(case.settings)), sorted(set(case.settings) - settings)
    assert not missing, (
        f"{kind.__name__} has settings that the catalogue of bad input lacks: {missing}. Add a line for each to "
        f"tests/bad_input/, in the file of the class's room: the values that must be refused (for example "
        f"`{missing[0]!r}: COUNT`), or `Fine('why every value will do')`; and let the constructor refuse them with the "
        "checks of lightning_fed/checks.py."
    )
    assert not gone, f"{kind.__name__} no longer has {gone}: take them out of tests/bad_input/."
    assert kind in CATALOGUE, f"{kind.__name__} is not in the catalogue of bad input: add `{kind.__name__}: Case()`."


def test_every_class_of_the_catalogue_is_public() -> None:
    assert set(CATALOGUE) == set(public_classes())


@pytest.mark.parametrize("kind", [kind for kind, case in CATALOGUE.items() if case.tries()], ids=lambda k: k.__name__)
def test_bad_settings_are_refused_by_name_and_value(kind: type) -> None:
    case, found = CATALOGUE[kind], []
    for name, value in case.tries():
        given = {**case.valid(), name: value}
        found += problems(lambda given=given: (case.make or kind)(**given), name, value)
    assert not found, f"{kind.__name__}:\n" + "\n".join(found)


@pytest.mark.parametrize("kind", [kind for kind, case in CATALOGUE.items() if case.settings], ids=lambda k: k.__name__)
def test_without_the_bad_setting_nothing_is_refused(kind: type) -> None:
    """Else a refusal could be about something else."""
    case = CATALOGUE[kind]
    (case.make or kind)(**case.valid())

"""Values that settings of each kind must refuse, and how a refusal must read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

nan, inf = math.nan, math.inf

COUNT = (0, -1, 1.5, nan, inf, "two", True, None)
COUNT_FROM_ZERO = (-1, 1.5, nan, inf, "two", True, None)
COUNT_FROM_TWO = (1, *COUNT)
NUMBER = (nan, inf, "much", True, None)
POSITIVE = (0.0, -1.0, *NUMBER)
NOT_NEGATIVE = (-1.0, *NUMBER)
SHARE = (0.0, -0.1, 1.5, *NUMBER)  # in (0, 1]
SHARE_BELOW_ONE = (-0.1, 1.0, *NUMBER)  # in [0, 1)
SECONDS = (0, -1.0, nan, inf, "soon", True, None)
CHOICE = ("other", "", 3, None)
FLAG = ("false", 1, None)
NAME = ("", 3, None)
PATH = ("", 3, None)
FUNCTION = ("mean", 3, None)
PART = ("none", 3, None)  # an object of a class of ours, or of torch
PAIR = ((0.5,), (0.5, nan), (-1.0, 0.5), ("a", "b"), 3, None)


def optional(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without None, which stands for a default."""
    return tuple(value for value in values if value is not None)


@dataclass(frozen=True)
class Fine:
    """Why no value of a setting is refused."""

    reason: str


@dataclass(frozen=True)
class Case:
    """The settings of one class.

    Attributes:
        settings: for each parameter of the constructor, the values that it must refuse, or why there are none.
        valid: makes what the constructor needs beside the setting that is tried.
        make: what is called; by default the class.
    """

    settings: dict[str, tuple[Any, ...] | Fine] = field(default_factory=dict)
    valid: Callable[[], Mapping[str, Any]] = dict
    make: Callable[..., Any] | None = None

    def tries(self) -> list[tuple[str, Any]]:
        """Each setting with each of its bad values."""
        return [
            (name, value) for name, values in self.settings.items() if isinstance(values, tuple) for value in values
        ]


Catalogue = dict[type, Case]


def refusal(call: Callable[[], Any]) -> str:
    """The message with which a call is refused: one clear line, not about something that went wrong inside."""
    with pytest.raises(ValueError) as refused:
        call()
    error, message = refused.value, str(refused.value)
    assert error.__context__ is None or error.__suppress_context__, f"another error led to it: {message}"
    assert "\n" not in message and message.endswith((".", "?")) and len(message) < 500, f"no clear line: {message}"
    return message


def problems(call: Callable[[], Any], name: str, value: Any) -> list[str]:
    """What is wrong with how a value is refused: it must be, with a line that names setting and value."""
    try:
        message = refusal(call)
    except BaseException as error:  # pytest's "did not raise" is not an Exception
        return [f"{name}={value!r}: {type(error).__name__}: {error}"]
    if name in message and any(text in message for text in shown(value)):
        return []
    return [f"{name}={value!r} is not in the message: {message}"]


def shown(value: Any) -> Iterator[str]:
    """How a message may show a value, or that part of it which is wrong."""
    yield repr(value)
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from shown(part)
    if isinstance(value, np.ndarray):
        yield str(value.shape)
        yield str(value.flat[0])

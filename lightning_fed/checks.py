"""Checks of settings, with messages that name the setting, its value and the way out.

Each takes settings by name and raises a ``ValueError`` for the first that is out of range or of another kind.
``True`` is no number, and ``5.0`` is no whole number: either is a slip more often than it is meant.
"""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from typing import Any


def given(**settings: Any) -> dict[str, Any]:
    """Those settings that are not None, for settings of which None stands for a default."""
    return {name: value for name, value in settings.items() if value is not None}


def check_counts(least: int = 1, /, **counts: Any) -> None:
    """Refuse what is no whole number, or is below ``least``.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, count in counts.items():
        if not _is(Integral, count):
            raise ValueError(f"{name}={count!r} must be a whole number of at least {least}.")
        if count < least:
            raise ValueError(f"{name}={count} must be at least {least}.")


def check_counts_or(word: str, /, **counts: Any) -> None:
    """Refuse what is neither a whole number of at least 1 nor the one word that there is.

    Raises:
        ValueError: naming the setting, its value and the word.
    """
    for name, count in counts.items():
        if isinstance(count, str) and count != word:
            raise ValueError(f"{name}={count!r} must be a whole number of at least 1, or {word!r}.")
        if not isinstance(count, str):
            check_counts(**{name: count})


def check_numbers(interval: str = "(-inf, inf)", /, **numbers: Any) -> None:
    """Refuse what is no number in an interval such as ``"(0, 1]"``; NaN is in none.

    Raises:
        ValueError: naming the setting, its value and the interval.
    """
    low, high = map(float, interval[1:-1].split(","))
    wanted = {"(-inf, inf)": "a finite number", "[-inf, inf]": "a number"}.get(interval, f"a number in {interval}")
    for name, number in numbers.items():
        if not _is(Real, number) or math.isnan(number):
            raise ValueError(f"{name}={number!r} must be {wanted}.")
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        if not (above and below):
            raise ValueError(f"{name}={number} must be in {interval}.")


def check_seconds(**durations: Any) -> None:
    """Refuse durations that are not positive, or not finite.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, seconds in durations.items():
        if not _is(Real, seconds) or not 0 < seconds < math.inf:
            raise ValueError(f"{name}={seconds!r} must be more than 0 seconds, and finite.")


def check_choice(name: str, choice: Any, *choices: str) -> None:
    """Refuse a choice that is none of those that there are.

    Raises:
        ValueError: naming the setting, its value and the choices.
    """
    if not isinstance(choice, str) or choice not in choices:
        raise ValueError(f"{name}={choice!r} is not one of {choices}.")


def check_flags(**flags: Any) -> None:
    """Refuse what is neither True nor False: the word ``"false"`` would count as True.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name}={flag!r} must be True or False.")


def check_names(**names: Any) -> None:
    """Refuse names that are no text, or empty.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, text in names.items():
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name}={text!r} must be a text that is not empty.")


def check_paths(**paths: Any) -> None:
    """Refuse what is no path. Whether there is such a file is for the reader to find out.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, path in paths.items():
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ValueError(f"{name}={path!r} must be a path.")


def check_kinds(kind: type | tuple[type, ...], /, **objects: Any) -> None:
    """Refuse objects of another class.

    Raises:
        ValueError: naming the setting, its value and the class.
    """
    wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
    for name, value in objects.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name}={value!r} must be a {wanted}.")


def check_callables(**functions: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, function in functions.items():
        if not callable(function):
            raise ValueError(f"{name}={function!r} must be a function.")


def check_pairs(interval: str, /, **pairs: Any) -> None:
    """Refuse what is not two numbers in an interval.

    Raises:
        ValueError: naming the setting, its value and the interval.
    """
    for name, pair in pairs.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"{name}={pair!r} must be two numbers in {interval}.")
        for number in pair:
            try:
                check_numbers(interval, **{name: number})
            except ValueError:
                raise ValueError(f"{name}={pair!r} must be two numbers in {interval}.") from None


def _is(kind: type, value: Any) -> bool:
    """Whether a value is a number of a kind, NumPy's included; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)

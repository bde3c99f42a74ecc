"""Checks of plain settings, with messages that name the setting and what it may be."""

from __future__ import annotations


def check_counts(**counts: int | None) -> None:
    """Refuse counts below 1; None stands for a default.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")


def check_choice(name: str, choice: str, *choices: str) -> None:
    """Refuse a choice that is none of those that there are.

    Raises:
        ValueError: naming the setting, its value and the choices.
    """
    if choice not in choices:
        raise ValueError(f"{name}={choice!r} is not one of {choices}.")

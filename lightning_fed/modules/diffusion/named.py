"""Small settings that are objects in Python, and a name or a mapping in a config, a command line or a checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

Kind = TypeVar("Kind", bound="Named")


class Named:
    """The base of families of small frozen dataclasses that are chosen by name.

    The family is the class that derives from this one directly; its members set ``name``. ``Family.of("member")``,
    ``Family.of({"name": "member", "field": 1.0})`` and ``Family.of(Member(1.0))`` are the same.
    """

    name: ClassVar[str] = ""

    @classmethod
    def members(cls: type[Kind]) -> dict[str, type[Kind]]:
        """The classes of this family, by name."""
        found: dict[str, type[Kind]] = {cls.name: cls} if cls.name else {}
        for subclass in cls.__subclasses__():
            found |= subclass.members()
        return found

    @classmethod
    def of(cls: type[Kind], choice: Kind | str | Mapping[str, Any], setting: str) -> Kind:
        """The object that a setting means.

        Args:
            choice: a member, its name, or a mapping of ``name`` and its fields.
            setting: the name of the setting, for the error.

        Raises:
            ValueError: if there is no such member or field; the nearest names are offered.
        """
        if isinstance(choice, cls):
            return choice
        fields = {"name": choice} if isinstance(choice, str) else dict(choice) if isinstance(choice, Mapping) else {}
        name, members = fields.pop("name", None), cls.members()
        if name not in members:
            near = difflib.get_close_matches(str(name), members, n=2, cutoff=0.5)
            offer = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"{setting}={choice!r} is unknown: {offer}There are {', '.join(map(repr, members))}.")
        member = members[name]
        known = [field.name for field in dataclasses.fields(member)]  # type: ignore[arg-type]
        if unknown := set(fields) - set(known):
            raise ValueError(f"{setting}: {name!r} has no {sorted(unknown)}; it takes {known or 'no settings'}.")
        try:
            return member(**fields)
        except TypeError as error:
            raise ValueError(f"{setting}: {name!r} needs other settings: {error}.") from error

    def plain(self) -> dict[str, Any]:
        """What :meth:`of` makes an equal object of, without classes, for checkpoints that load safely."""
        return {"name": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

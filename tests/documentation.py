"""The examples of the documentation, as tests run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARKED_BLOCK = re.compile(r"<!-- test: ([^\n]+) -->\n```(\w+)\n(.*?)```", re.DOTALL)


def example(page: Path, name: str, language: str = "python") -> list[str]:
    """The blocks of a page, in one language, that are marked with ``<!-- test: name -->``."""
    found = MARKED_BLOCK.findall(page.read_text())
    blocks = [code for marked, kind, code in found if (marked, kind) == (name, language)]
    assert blocks, f"{page.name} has no {language} block marked {name!r}"
    return blocks


def execute(page: Path, blocks: list[str], **given: Any) -> dict[str, Any]:
    """Run blocks one after another, as the script that a reader would paste together; returns its variables."""
    names: dict[str, Any] = {"__name__": "example", **given}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    return names

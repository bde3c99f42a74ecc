"""Files are read as plain values: tensors, numbers, text and containers of them. Nothing that a file holds is run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError


@contextmanager
def plain_values(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, a file is loaded with torch's ``weights_only=True``; a refusal names the class and the way out.

    Raises:
        ValueError: if the file holds other objects.
    """
    try:
        yield
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        name = found[1] if found else "a class"
        raise ValueError(
            f"the file {os.fspath(path)!r} holds an object of {name}, and loading it could run code. If you trust the "
            f"file, call torch.serialization.add_safe_globals([{name}]) before; better, let save_hyperparameters save "
            "numbers, text and lists alone."
        ) from None

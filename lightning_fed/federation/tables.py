"""Tables of numbers in CSV files, read with errors that name the file, the line and the way out."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TableLine:
    """One line of a table.

    Attributes:
        where: setting, file and line, for errors.
        values: the number in each column.
    """

    where: str
    values: dict[str, float]

    def error(self, problem: str) -> ValueError:
        """An error about this line; ``problem`` says what is wrong and the way out."""
        return ValueError(f"{self.where}: {problem}")

    def client(self, column: str, num_clients: int) -> int:
        """The client that a column names.

        Raises:
            ValueError: if the federation has no such client.
        """
        value = self.values[column]
        if value not in range(num_clients):
            raise self.error(
                f"{column}={value:g} is not a client of this federation (0 to {num_clients - 1}): correct the line, or "
                f"change num_clients={num_clients}."
            )
        return int(value)


def read_table(setting: str, path: str, columns: Sequence[str]) -> Iterator[TableLine]:
    """The lines of a CSV file with a header; other columns and empty lines are skipped.

    Args:
        setting: the constructor argument that names the file, for errors.
        path: of the file.
        columns: that are read; all of them hold numbers.

    Raises:
        ValueError: if the file or a column is missing, or a field is not a number.
    """
    if not Path(path).is_file():
        raise ValueError(f"{setting}={path!r} is not a file: give the path of a CSV file with {','.join(columns)}.")
    with open(path, newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{setting}={path!r}, line 1: the columns {missing} are missing: begin the file with the header "
                f"{','.join(columns)}."
            )
        for record in reader:
            where = f"{setting}={path!r}, line {reader.line_num}"
            yield TableLine(where, {column: _number(where, column, record[column]) for column in columns})


def _number(where: str, column: str, field: str | None) -> float:
    try:
        number = float(field or "")
    except ValueError:
        number = float("nan")
    if number != number:
        raise ValueError(f"{where}: {column}={field!r} is not a number: write one number in every column.")
    return number

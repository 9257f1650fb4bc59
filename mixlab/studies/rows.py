"""The CSV files of studies, and the folder that holds them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from mixlab.errors import DiskError
from mixlab.files import write_atomically
from mixlab.records import read_table

Row = dict[str, str]


def make_folder(path: Path) -> None:
    """The folder of a study, with its parents. DiskError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"the folder cannot be made: {error.strerror}", where=str(path)) from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    return read_table(path, ())


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """The whole file anew, so that it is the old one or the new one, never a part."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def distinct(rows: Sequence[Row], column: str) -> str:
    """What a column says, each once, in order."""
    return "; ".join(dict.fromkeys(row[column] for row in rows))

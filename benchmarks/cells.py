"""Long measurements, cell by cell: each is a row of a CSV file, and what is in the file is not measured again."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mixlab.studies.rows import read_rows


def measure_missing(
    cells: Iterable[dict[str, Any]],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    path: Path,
    columns: Sequence[str],
) -> None:
    """Measure the cells that have no row in `path` yet, and append each row as soon as it is there.

    measure: gives a cell's row, with all `columns`; a cell's own keys tell it from the others.
    """
    for cell in cells:
        if any(all(row[key] == str(value) for key, value in cell.items()) for row in read_rows(path)):
            continue
        row = measure(cell)
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)

"""Records out of files that nobody vouches for: JSON, TOML and CSV, read with limits of size, depth and type.

Every record in a run or weights folder is read here. A file that is no regular one (a link, a pipe, a device) is not
opened for reading; numbers are finite; errors are WeightsErrors that name the file and, where there is one, the key.
"""

import csv
import io
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mixlab.errors import WeightsError

MAX_JSON_BYTES = 16 * 2**20  # 21,843 class names take 1 MB
MAX_TOML_BYTES = 64 * 2**10
MAX_LINES_BYTES = 32 * 2**20  # of a run log: some 100,000 rows
MAX_TABLE_BYTES = 2**30  # of a CSV file; split.csv of ImageNet takes 150 MB
MAX_ITEMS = 2_000_000  # values in one record: a few bytes of each become a hundred in memory
MAX_DEPTH = 32
MAX_DOTS = 200  # in one line of TOML: the time that keys of many parts take grows with their square
LARGEST = 2**63  # of numbers


def open_record(path: Path, max_bytes: int, *, follow: bool = False) -> BinaryIO:
    """A regular file of at most `max_bytes`, open for reading; WeightsError for anything else, and nothing hangs.

    follow: take a link too. Only what a person names, or a cache of links holds, is opened so.
    """
    # O_NONBLOCK: a pipe without a writer would be waited for before one can see what it is.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise WeightsError("there is no such file", where=str(path)) from None
    except (OSError, ValueError) as error:
        what = "it is a link, which is not followed" if Path(path).is_symlink() else _reason(error)
        raise WeightsError(f"it cannot be read: {what}", where=str(path)) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise WeightsError("it is no regular file", where=str(path))
        if found.st_size > max_bytes:
            raise WeightsError(
                f"it has {found.st_size:,} bytes, more than the {max_bytes:,} of the largest of its kind",
                where=str(path),
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, max_bytes: int, *, follow: bool = False) -> bytes:
    """The content of a file as `open_record` opens it."""
    with open_record(path, max_bytes, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            content = file.read(size + 1)
        except OSError as error:
            raise WeightsError(f"it cannot be read: {_reason(error)}", where=str(path)) from error
    if len(content) > size:
        raise WeightsError("it grows while it is read", where=str(path))
    return content


def read_text(path: Path, max_bytes: int = MAX_TOML_BYTES, *, follow: bool = False) -> str:
    """The text of a small file; what is no UTF-8 is replaced. follow: as for `open_record`."""
    return read_bytes(path, max_bytes, follow=follow).decode(errors="replace")


def parse_json(content: bytes, where: str) -> Any:
    """The value of a JSON text; WeightsError, with `where`, if it is none or beyond the limits."""
    if sum(content.count(sign) for sign in (b",", b"[", b"{")) > MAX_ITEMS:
        raise WeightsError("it holds too many values", where=where)
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # includes bytes that are no UTF-8
        raise WeightsError(f"it cannot be read as JSON: {_reason(error)}", where=where) from None
    check_value(value, where)
    return value


def read_json(path: Path, *, follow: bool = False) -> dict[str, Any]:
    """The JSON object in a file. follow: as for `open_record`."""
    value = parse_json(read_bytes(path, MAX_JSON_BYTES, follow=follow), str(path))
    if not isinstance(value, dict):
        raise WeightsError("it is no JSON object", where=str(path))
    return value


def read_toml(path: Path, *, follow: bool = False) -> dict[str, Any]:
    """The table in a TOML file. follow: as for `open_record`."""
    content = read_bytes(path, MAX_TOML_BYTES, follow=follow)
    if max(line.count(b".") for line in content.split(b"\n")) > MAX_DOTS:
        raise WeightsError("a line of it has too many dots", where=str(path))
    try:
        values = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"it cannot be read as TOML: {_reason(error)}", where=str(path)) from None
    check_value(values, str(path))
    return values


def read_table(path: Path, columns: Iterable[str], max_bytes: int = MAX_TABLE_BYTES) -> list[dict[str, str]]:
    """The rows of a CSV file that has all of `columns`; bytes that are no UTF-8 survive as surrogates."""
    with open_record(path, max_bytes) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        try:
            reader = csv.reader(text)
            header = next(reader, [])
            missing = [name for name in columns if name not in header]
            if missing:
                raise WeightsError(f"there is no column {missing[0]!r}", where=str(path))
            rows = []
            for fields in reader:
                if len(fields) != len(header):
                    raise WeightsError(
                        f"{len(fields)} fields, but the header has {len(header)}",
                        where=f"{path}:{reader.line_num}",
                    )
                rows.append(dict(zip(header, fields, strict=True)))
        except (csv.Error, OSError) as error:
            raise WeightsError(f"it cannot be read: {_reason(error)}", where=str(path)) from None
    return rows


def check_value(value: Any, where: str) -> None:
    """WeightsError, with the key, for nesting, numbers or kinds that no record of ours has."""
    waiting: list[tuple[Any, str, int]] = [(value, "", 0)]
    while waiting:
        found, key, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise WeightsError(f"it is nested more than {MAX_DEPTH} deep", where=f"{where}: {key[:100]}")
        if isinstance(found, dict):
            waiting += [(inner, f"{key}.{name}" if key else name, depth + 1) for name, inner in found.items()]
        elif isinstance(found, list):
            waiting += [(inner, key, depth + 1) for inner in found]
        elif isinstance(found, float) and not math.isfinite(found):
            raise WeightsError(f"{key or 'it'} is {found}, which is no number", where=where)
        elif isinstance(found, int) and not -LARGEST <= found <= LARGEST:
            raise WeightsError(f"{key or 'it'} is larger than any number here", where=where)
        elif found is not None and not isinstance(found, str | bool | int | float):
            raise WeightsError(f"{key} is a {type(found).__name__}", where=where)


def take(
    record: dict[str, Any],
    key: str,
    kind: type,
    where: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    optional: bool = False,
) -> Any:
    """`record[key]` of type `kind`, of numbers those between `low` and `high`; WeightsError names file and key.

    An int is a float too, a bool is no number. optional: it may be null, or not there, which gives None.
    """
    value = record.get(key)
    if value is None and optional:
        return None
    if key not in record:
        raise WeightsError(f"the key {key!r} is missing", where=where)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise WeightsError(f"{key} must be {_NAMES[kind]}, got {_shown(value)}", where=where)
    if isinstance(value, int | float) and kind is not bool and not low <= value <= high:
        raise WeightsError(f"{key} is {_shown(value)}, not between {low:g} and {high:g}", where=where)
    return value


def take_list(record: dict[str, Any], key: str, kind: type, where: str, **limits: Any) -> tuple[Any, ...]:
    """`record[key]`, a list of values as `take` takes them."""
    values = record.get(key)
    values = take({key: list(values)} if isinstance(values, tuple) else record, key, list, where)
    return tuple(take({key: value}, key, kind, where, **limits) for value in values)


_NAMES = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "an object",
}  # fmt: skip


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r}" if isinstance(value, str) else str(value)[:60]


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"\s+", " ", text)[:200]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")

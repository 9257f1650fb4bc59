"""Labelled examples through Hugging Face `datasets`: a set of the Hub, or local parquet files. Runs no code of a set.

Their bytes are taken as they are stored and decoded here, with the same care as any other file.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.data.dataset import SPLIT_NAMES, Source, Split
from mixlab.data.modality import MAX_BYTES, MODALITIES, Modality
from mixlab.errors import DataError, DiskError, ExampleError, UsageError
from mixlab.files import can_be_written
from mixlab.words import install_hint

STREAM_WINDOW = (
    1024  # examples that a stream shuffles among themselves; two windows of encoded ones are in memory
)
UNNAMED = "unnamed"  # a split; `all` is a word of `datasets` itself
_LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label", "category", "target")


class TableExamples:
    """`Encoded` examples in the tables of `datasets`, which lie on the disk and are mapped into memory."""

    window = 0
    is_checked = False

    def __init__(self, tables: list[Any], column: str) -> None:
        self._tables, self._column = tables, column
        self._starts = np.cumsum([0, *(len(table) for table in tables)])

    def read(self, row: int) -> bytes:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return _bytes_of(self._tables[number][row - int(self._starts[number])][self._column])


class StreamExamples:
    """`Encoded` examples that are read from front to back, a window at a time; going back begins again.

    Reading a row that is far ahead reads everything before it, which is what a resume costs.
    """

    window = STREAM_WINDOW
    is_checked = False

    def __init__(self, streams: list[Any], counts: list[int], column: str) -> None:
        self._streams, self._counts, self._column = streams, counts, column
        self._rows: Iterator[Any] = iter(())
        self._position = -1  # of the next row
        self._windows: dict[int, list[Any]] = {}
        self._lock = threading.Lock()  # examples are decoded in several threads, from one stream

    def read(self, row: int) -> bytes:
        number = row // self.window
        with self._lock:
            if number not in self._windows:
                self._load(number)
            value = self._windows[number][row % self.window]
        return _bytes_of(value)

    def _load(self, number: int) -> None:
        first = number * self.window
        if self._position != first:
            self._rows, self._position = self._rows_from(first), first
        window = []
        for value in self._rows:
            window.append(None if _size_of(value) > MAX_BYTES else value)
            self._position += 1
            if len(window) == self.window:
                break
        expected = min(self.window, sum(self._counts) - first)
        if len(window) != expected:
            raise DataError(
                f"the stream ended early: {len(window)} of {expected} examples", where=f"row {first}"
            )
        # A batch may end one window and begin the next; no order goes further back than that.
        self._windows = {key: rows for key, rows in self._windows.items() if key == number - 1}
        self._windows[number] = window

    def _rows_from(self, first: int) -> Iterator[Any]:
        for stream, count in zip(self._streams, self._counts, strict=True):
            if first < count:
                for row in stream.skip(first):
                    yield row[self._column]
            first = max(first - count, 0)


def _size_of(value: Any) -> int:
    data = value.get("bytes") if isinstance(value, dict) else value
    return len(data) if isinstance(data, bytes) else 0


def _bytes_of(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        raise ExampleError("the set names a file instead of holding its content", where=str(value["path"]))
    if not isinstance(data, bytes):
        raise ExampleError(f"there is nothing in this row, or one larger than {MAX_BYTES // 1024**2} MiB")
    if len(data) > MAX_BYTES:
        raise ExampleError(f"larger than {MAX_BYTES // 1024**2} MiB")
    return data


def open_hub(name: str, *, streaming: bool = False, download: bool = False) -> Source:
    """`hf:NAME[:CONFIG]`: a Hub set, a folder of parquet files or one such file.

    streaming: read from front to back instead of making a local copy. download: a Hub set that is not in the local
    cache may be fetched.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError("hf: needs the package datasets", hint=install_hint("hf")) from None
    datasets.disable_progress_bars()
    found = _load(datasets, name, streaming, download)
    first = next(iter(found.values()))
    if first.features is None:
        raise DataError("the set does not say what its columns are", where=name)
    modality, column, label = _columns(datasets, first, name)
    splits: dict[str, Any] = {}
    for split_name, table in found.items():
        splits[SPLIT_NAMES.get(split_name, "all" if len(found) == 1 else split_name)] = table
    unknown = sorted(set(splits) - {"train", "val", "test", "all"})
    splits = {key: table for key, table in splits.items() if key not in unknown}
    if not splits:
        raise DataError(f"none of its splits is train, val or test: {', '.join(unknown)}", where=name)
    labels = {key: _labels(table, label) for key, table in splits.items()}
    class_names, numbers = _classes(first.features[label], labels, name, label)
    tables = [
        table.select_columns([column]).cast_column(column, _raw(datasets, first.features[column], modality))
        for table in splits.values()
    ]
    counts = [len(values) for values in labels.values()]
    encoded: Any = StreamExamples(tables, counts, column) if streaming else TableExamples(tables, column)
    result, start = {}, 0
    for key, values in labels.items():
        result[key] = Split(
            names=tuple(f"{key} row {row}" for row in range(len(values))),
            labels=np.array([numbers[value] for value in values], dtype=np.int64),
            encoded=encoded,
            rows=np.arange(start, start + len(values)),
        )
        start += len(values)
    return Source(
        name=Path(name.split(":")[0]).name, class_names=class_names, splits=result, modality=modality
    )


def _load(datasets: Any, name: str, streaming: bool, download: bool) -> dict[str, Any]:
    path, _, config = name.partition(":")
    local = Path(os.path.expanduser(path))
    options: dict[str, Any] = {"streaming": streaming}
    try:
        if local.is_file():
            found = datasets.load_dataset("parquet", data_files={UNNAMED: str(local)}, **options)
        elif local.is_dir():
            files = _parquet_files(local)
            found = datasets.load_dataset("parquet", data_files=files, **options)
        else:
            with nullcontext() if streaming or download else _offline():
                found = datasets.load_dataset(path, config or None, **options)
    except DataError:
        raise
    except Exception as error:  # no network, no such set, damaged files, no space
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        # Without a home folder its name still begins with a ~.
        if not streaming and (not cache.is_absolute() or not can_be_written(cache)):
            raise DiskError(
                "the cache of Hugging Face's datasets cannot be written",
                where=str(cache),
                hint="HF_HOME in the environment names another folder",
            ) from error
        reason = " ".join(str(error).split())[:300]
        hint = "check the name and the files"
        if not local.exists() and not download:
            hint = "is the name right? --download fetches a set of the Hub that is not on this machine yet"
        raise DataError(f"the set cannot be opened: {reason}", where=f"hf:{name}", hint=hint) from error
    return dict(found)


@contextmanager
def _offline() -> Iterator[None]:
    """Only the local cache: without this, a name that is not in it is tried for half a minute."""
    import datasets
    from huggingface_hub import constants

    before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """The parquet files below `folder` by split, which is the beginning of a file's or its folder's name."""
    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        words = (path.name.split("-")[0].split(".")[0].lower(), path.parent.name.lower())
        split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "all")
        files.setdefault(UNNAMED if split == "all" else split, []).append(str(path))
    if not files:
        raise DataError("no .parquet files", where=str(folder))
    if len(files) > 1 and UNNAMED in files:
        raise DataError(f"{files[UNNAMED][0]} names no split, but others do", where=str(folder))
    return files


def _columns(datasets: Any, table: Any, where: str) -> tuple[Modality, str, str]:
    """What kind of examples a set has; the names of their column and of the label column."""
    features = table.features
    found = next(
        (
            (modality, column)
            for modality in MODALITIES.values()
            if modality.column and (column := _typed(datasets, features, modality))
        ),
        None,
    ) or _plain(table)
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [
        key
        for key, kind in features.items()
        if key.lower() in _LABEL_NAMES
        and str(getattr(kind, "dtype", "")).startswith(("int", "uint", "string", "large_s"))
    ]
    label = next((key for key in labels if key.lower() in _LABEL_NAMES), None)
    label = label or (labels[0] if len(labels) == 1 else None) or (plain[0] if plain else None)
    if found is None or label is None:
        kinds = [modality for modality in MODALITIES.values() if modality.column]
        missing = "labels" if label is None else " or ".join(modality.many for modality in kinds)
        types = " or ".join(modality.column for modality in kinds)
        raise DataError(
            f"no column of {missing} among {', '.join(features)}",
            where=f"hf:{where}",
            hint=f"examples are an {types} or bytes; a label column is a ClassLabel, or is called label",
        )
    return (*found, label)


def _typed(datasets: Any, features: Any, modality: Modality) -> str | None:
    """The column whose type says that it has such examples."""
    columns = [k for k, kind in features.items() if isinstance(kind, getattr(datasets, modality.column))]
    return next((key for key in columns if key.lower() in modality.column_names), next(iter(columns), None))


def _plain(table: Any) -> tuple[Modality, str] | None:
    """The column that holds bytes; what kind they are, its name says, or the first row, or it is the first kind."""
    columns = [key for key, kind in table.features.items() if _holds_bytes(kind)]
    kinds = [modality for modality in MODALITIES.values() if modality.column]
    for modality in kinds:
        if column := next((key for key in columns if key.lower() in modality.column_names), None):
            return modality, column
    if not columns:
        return None
    row = next(iter(table.select_columns([columns[0]])), {columns[0]: b""})
    try:
        start = _bytes_of(row[columns[0]])[:16]
    except ExampleError:  # it is listed as unreadable where it is read
        start = b""
    return next((modality for modality in kinds if modality.claims(start)), kinds[0]), columns[0]


def _holds_bytes(kind: Any) -> bool:
    return (
        "bytes" in kind
        if isinstance(kind, dict)
        else getattr(kind, "dtype", None) in ("binary", "large_binary")
    )


def _raw(datasets: Any, kind: Any, modality: Modality) -> Any:
    """The type of a column whose bytes are given as they are stored."""
    type_ = getattr(datasets, modality.column)
    return type_(decode=False) if isinstance(kind, type_) else kind


def _labels(table: Any, column: str) -> list[Any]:
    """All values of the label column; of a parquet stream nothing else is read for it."""
    selected = table.select_columns([column])
    return [row[column] for row in selected]


def _classes(
    feature: Any, labels: dict[str, list[Any]], where: str, column: str
) -> tuple[tuple[str, ...], dict[Any, int]]:
    present = {value for values in labels.values() for value in values}
    if None in present or -1 in present:
        raise DataError(f"some rows have no {column}", where=f"hf:{where}")
    names = getattr(feature, "names", None)
    if names is not None:
        return tuple(names), {i: i for i in range(len(names))}
    values = sorted(present)
    return tuple(str(value) for value in values), {value: i for i, value in enumerate(values)}

"""Where labelled images come from: class folders, a CSV file, digits, or a set that torchvision knows."""

import contextlib
import csv
import difflib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mixlab.data.dataset import SPLIT_NAMES, Source, Split
from mixlab.data.decode import is_image_name
from mixlab.data.known import TORCHVISION_NAMES, open_digits, open_torchvision
from mixlab.data.shards import open_shards
from mixlab.errors import DataError, DiskError, UsageError

_LAYOUT = "lay it out as FOLDER/CLASS/IMAGE, or as FOLDER/train/CLASS/IMAGE with val and test beside train"
SOURCE_NAMES: tuple[str, ...] = ("digits", *TORCHVISION_NAMES)


def open_source(
    data: str, *, data_dir: str | Path | None = None, download: bool = False, streaming: bool = False
) -> Source:
    """The data set that `data` names: `wds:FOLDER` of shards, `hf:NAME`, a folder, a CSV file or one of SOURCE_NAMES.

    `data_dir` (default ./data) is where the files of the torchvision sets are, or are downloaded to.
    """
    kind, _, rest = data.partition(":")
    if kind == "wds":
        return open_shards(rest)
    if kind == "hf":
        from mixlab.data.hub import open_hub

        return open_hub(rest, streaming=streaming, download=download)
    if streaming:
        raise UsageError("only hf: sets are streamed", where="data.streaming", hint="leave it out")
    path = Path(os.path.expanduser(data))
    if data and os.path.isdir(path):
        return _open_folder(path)
    if os.path.isfile(path):
        if path.suffix.lower() == ".csv":
            return _open_csv(path)
        raise UsageError("a data set is a folder, a .csv file or a known name", where=data)
    name = data.lower()
    if name == "digits":
        return open_digits()
    if name in TORCHVISION_NAMES:
        return open_torchvision(name, Path(os.path.expanduser(data_dir or "data")), download)
    known = "known names: " + ", ".join(SOURCE_NAMES)
    if not data or data.startswith((".", "~")) or "/" in data or os.sep in data or path.suffix:
        hint = "give an existing folder, a .csv file or a name; " + known
        raise UsageError("no such folder or file", where=data or "an empty name", hint=hint)
    near = difflib.get_close_matches(name.replace("-", "").replace("_", ""), SOURCE_NAMES, n=1)
    hint = f"did you mean {near[0]}? {known}" if near else "no folder here has that name either; " + known
    raise UsageError(f"no data set is called '{data}'", hint=hint)


# Class folders and CSV files


def _open_folder(root: Path) -> Source:
    folders = _class_folders(root)
    splits: dict[str, Path] = {}
    for folder in folders:
        split = SPLIT_NAMES.get(folder.name.lower())
        if split in splits:
            raise DataError(
                f"{splits[split].name} and {folder.name} are both the {split} split", where=str(root)
            )
        if split:
            splits[split] = folder
    if splits:
        others = [f.name for f in folders if f not in splits.values() and any(_images_below(f))]
        if others:
            found = (
                f"both split folders ({_some(f.name for f in splits.values())}) and others ({_some(others)})"
            )
            raise DataError(found, where=str(root), hint="move the others away; " + _LAYOUT)
    rows: list[tuple[str, str, str]] = []
    empty = []
    for split, folder in (splits or {"all": root}).items():
        classes = _class_folders(folder)
        if not classes:
            loose = sum(is_image_name(name) for name in _listed(folder))
            found = f"{loose} images without class folders" if loose else "no class folders and no images"
            raise DataError(found, where=str(folder), hint=_LAYOUT)
        for class_folder in classes:
            images = sorted(_images_below(class_folder))
            rows += [(path, class_folder.name, split) for path in images]
            if not images:
                empty.append(os.path.relpath(class_folder, root))
    if not rows:
        raise DataError("no images in any class folder", where=str(root), hint=_LAYOUT)
    if empty:
        raise DataError(
            f"class folders without images: {_some(empty)}", where=str(root), hint="remove them or fill them"
        )
    return _source_of_files(root.resolve().name, root, rows)


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"the folder cannot be read: {error.strerror}", where=str(folder)) from None


def _class_folders(folder: Path) -> list[Path]:
    return [folder / n for n in _listed(folder) if not n.startswith(".") and os.path.isdir(folder / n)]


def _images_below(folder: Path) -> Iterator[str]:
    """Paths of the images in a folder and its subfolders; linked subfolders are left, they may be loops."""

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder cannot be read: {error.strerror}", where=str(error.filename))

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in files if is_image_name(name))


def _open_csv(path: Path) -> Source:
    rows: dict[str, tuple[str, str]] = {}
    lines: dict[str, int] = {}
    for line, row in _csv_rows(path, ("path", "label")):
        where = f"{path}, line {line}"
        label = row["label"].strip()
        if not row["path"] or not label:
            raise DataError("the path or the label is empty", where=where)
        split = row.get("split", "all").strip().lower()
        if split not in SPLIT_NAMES and split != "all":
            raise DataError(f"unknown split '{split}'", where=where, hint="use train, val or test")
        image = os.path.normpath(os.path.join(path.parent, row["path"]))
        entry = (label, SPLIT_NAMES.get(split, split))
        if rows.setdefault(image, entry) != entry:
            raise DataError(f"{row['path']} has another label or split in line {lines[image]}", where=where)
        lines.setdefault(image, line)
    splits = {split for _, split in rows.values()}
    if len(splits) > 1 and "all" in splits:
        raise DataError(
            "the split 'all' stands beside others", where=str(path), hint="use train, val or test"
        )
    return _source_of_files(path.stem, path, [(image, *entry) for image, entry in rows.items()])


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of each row, by lower-case column name."""
    try:
        # surrogateescape: file names that are not UTF-8 survive, as in os.fsdecode.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                hint = "the first line must be path,label or path,label,split"
                raise DataError(f"no column '{missing[0]}'", where=f"{path}, line 1", hint=hint)
            for fields in reader:
                if fields and len(fields) != len(header):
                    found = f"{len(fields)} fields, but the header has {len(header)}"
                    raise DataError(
                        found,
                        where=f"{path}, line {reader.line_num}",
                        hint="put a text with commas in quotes",
                    )
                if fields:
                    yield reader.line_num, dict(zip(header, fields, strict=True))
    except (OSError, csv.Error) as error:
        raise DataError(f"the CSV file cannot be read: {error}", where=str(path)) from None


def _source_of_files(name: str, root: Path, rows: Sequence[tuple[str, str, str]]) -> Source:
    """A source from (path, class, split), once its classes make sense."""
    if not rows:
        raise DataError("no images", where=str(root))
    class_names = tuple(sorted({label for _, label, _ in rows}))
    if len(class_names) == 1:
        hint = "a classifier needs two or more; " + _LAYOUT
        raise DataError(f"only one class, {class_names[0]}", where=str(root), hint=hint)
    alike: dict[str, str] = {}
    for label in class_names:
        other = alike.setdefault(unicodedata.normalize("NFC", label).strip().casefold(), label)
        if other != label:
            found = (
                f"the classes '{other}' and '{label}' differ only in case, spaces or the coding of accents"
            )
            raise DataError(found, where=str(root), hint="give them one name, or two different ones")
    by_split = {s: [row for row in rows if row[2] == s] for s in ("train", "val", "test", "all")}
    trained = {label for _, label, _ in by_split["train"]}
    for split in ("val", "test"):
        unknown = sorted({label for _, label, _ in by_split[split]} - trained)
        if trained and unknown:
            raise DataError(f"classes in {split} that are not in train: {_some(unknown)}", where=str(root))
    index = {label: i for i, label in enumerate(class_names)}
    splits = {
        split: Split(
            names=tuple(path for path, _, _ in part),
            labels=np.array([index[label] for _, label, _ in part], dtype=np.int64),
        )
        for split, part in by_split.items()
        if part
    }
    return Source(name=name, class_names=class_names, splits=splits, root=root)


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


# The record of a split


def write_split_csv(source_splits: Mapping[str, Split], class_names: Sequence[str], path: str | Path) -> None:
    """Write `path,label,split` for every image; file paths are absolute, so that it is a source too."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "split"))
            for name, split in source_splits.items():
                for image, label in zip(split.names, split.labels, strict=True):
                    writer.writerow(
                        (os.path.abspath(image) if split.has_files else image, class_names[label], name)
                    )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DiskError(f"the split could not be written: {error.strerror}", where=str(path)) from None


def read_split_csv(path: str | Path) -> dict[str, list[str]]:
    """The image names of each split, as `write_split_csv` wrote them."""
    names: dict[str, list[str]] = {}
    for _, row in _csv_rows(Path(path), ("path", "label", "split")):
        names.setdefault(row["split"], []).append(row["path"])
    return names

"""Where labelled images come from: class folders, a CSV file, digits, or a set that torchvision knows."""

import csv
import difflib
import os
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.data.dataset import Source, Split
from mixlab.data.decode import is_image_name
from mixlab.data.splits import stratified_split
from mixlab.errors import DataError, DiskError, UsageError

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
_LAYOUT = "lay it out as FOLDER/CLASS/IMAGE, or as FOLDER/train/CLASS/IMAGE with val and test beside train"


@dataclass(frozen=True)
class _Library:
    """A set of torchvision: its class, which of its parts is which split, and where its files belong.

    images, labels: the attributes that hold pixels or paths, and the class indices.
    axes: how the pixels are turned to (n, H, W, channels).
    """

    dataset: str
    files: str
    parts: Mapping[str, Mapping[str, Any]]
    images: str = "data"
    labels: str = "targets"
    axes: tuple[int, ...] | None = None


_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_BY_NAME = {"train": {"split": "train"}, "test": {"split": "test"}}
_LIBRARY = {
    "cifar10": _Library("CIFAR10", "cifar-10-batches-py", _BY_FLAG),
    "cifar100": _Library("CIFAR100", "cifar-100-python", _BY_FLAG),
    "mnist": _Library("MNIST", "MNIST/raw", _BY_FLAG),
    "fashionmnist": _Library("FashionMNIST", "FashionMNIST/raw", _BY_FLAG),
    "kmnist": _Library("KMNIST", "KMNIST/raw", _BY_FLAG),
    "svhn": _Library(
        "SVHN", "train_32x32.mat and test_32x32.mat", _BY_NAME, labels="labels", axes=(0, 2, 3, 1)
    ),
    "stl10": _Library("STL10", "stl10_binary", _BY_NAME, labels="labels", axes=(0, 2, 3, 1)),
    "flowers102": _Library(
        "Flowers102",
        "flowers-102",
        {**_BY_NAME, "val": {"split": "val"}},
        images="_image_files",
        labels="_labels",
    ),
    "oxfordiiitpet": _Library(
        "OxfordIIITPet",
        "oxford-iiit-pet",
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        images="_images",
        labels="_labels",
    ),
    "food101": _Library("Food101", "food-101", _BY_NAME, images="_image_files", labels="_labels"),
    "eurosat": _Library("EuroSAT", "eurosat/2750", {"all": {}}, images="imgs"),
}
SOURCE_NAMES: tuple[str, ...] = ("digits", *_LIBRARY)


def open_source(data: str, *, data_dir: str | Path | None = None, download: bool = False) -> Source:
    """The data set that `data` names: a folder, a CSV file or one of SOURCE_NAMES, tried in that order.

    `data_dir` (default ./data) is where the files of the torchvision sets are, or are downloaded to.
    """
    path = Path(data).expanduser()
    if data and os.path.isdir(path):
        return _open_folder(path)
    if os.path.isfile(path):
        if path.suffix.lower() == ".csv":
            return _open_csv(path)
        raise UsageError("a data set is a folder, a .csv file or a known name", where=data)
    name = data.lower()
    if name == "digits":
        return _open_digits()
    if name in _LIBRARY:
        return _open_library(name, Path(data_dir or "data").expanduser(), download)
    near = difflib.get_close_matches(name.replace("-", "").replace("_", ""), SOURCE_NAMES, n=1)
    known = "known names: " + ", ".join(SOURCE_NAMES)
    if not near and (data.startswith((".", "~")) or "/" in data or os.sep in data or path.suffix):
        raise UsageError(
            "no such folder or file",
            where=data,
            hint="give an existing folder or .csv file, or a name; " + known,
        )
    hint = (
        f"did you mean {near[0]}? {known}" if near else "it is no folder or .csv file here either; " + known
    )
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
            found = f"split folders ({_some(f.name for f in splits.values())}) beside other folders of images ({_some(others)})"
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
        if not row["path"] or not row["label"]:
            raise DataError("the path or the label is empty", where=where)
        split = row.get("split", "all").strip().lower()
        if split not in SPLIT_NAMES and split != "all":
            raise DataError(f"unknown split '{split}'", where=where, hint="use train, val or test")
        image = os.path.normpath(os.path.join(path.parent, row["path"]))
        entry = (row["label"], SPLIT_NAMES.get(split, split))
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
        other = alike.setdefault(unicodedata.normalize("NFC", label).casefold(), label)
        if other != label:
            found = f"the classes '{other}' and '{label}' differ only in case or in how accents are written"
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


# Sets that live in a library


def _open_digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    everything = _split_of_pixels(pixels, digits.target)
    parts = stratified_split(everything.labels, (0.6, 0.2, 0.2), seed=0)
    splits = {name: everything.take(part) for name, part in zip(("train", "val", "test"), parts, strict=True)}
    return Source(name="digits", class_names=tuple("0123456789"), splits=splits)


def _split_of_pixels(pixels: np.ndarray, labels: Any) -> Split:
    names = tuple(f"index {i}" for i in range(len(pixels)))
    return Split(names=names, labels=np.asarray(labels, dtype=np.int64), pixels=np.ascontiguousarray(pixels))


def _open_library(name: str, data_dir: Path, download: bool) -> Source:
    library = _LIBRARY[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns about the pickles of CIFAR
            from torchvision import datasets

            make: Callable[..., Any] = getattr(datasets, library.dataset)
            loaded = {part: make(str(data_dir), download=download, **o) for part, o in library.parts.items()}
            splits = {part: _library_split(library, dataset) for part, dataset in loaded.items()}
    except Exception as error:  # no network, no space, a bad archive, a missing optional package
        expected = f"{data_dir.absolute()}: {library.files}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if download:
            hint = "mend that, or put its files there by hand"
            raise DataError(
                f"{name} could not be downloaded or read: {reason}", where=expected, hint=hint
            ) from None
        hint = (
            "add --download to fetch it, put its files there by hand, or name another folder with --data-dir"
        )
        raise DataError(f"{name} is not there or not complete: {reason}", where=expected, hint=hint) from None
    count = int(max(split.labels.max() for split in splits.values())) + 1
    classes = getattr(next(iter(loaded.values())), "classes", None) or [str(i) for i in range(count)]
    return Source(name=name, class_names=tuple(classes), splits=splits)


def _library_split(library: _Library, dataset: Any) -> Split:
    images, labels = getattr(dataset, library.images), getattr(dataset, library.labels)
    if isinstance(images, list):  # paths, or ImageFolder's (path, label)
        names = tuple(str(image[0] if isinstance(image, tuple) else image) for image in images)
        return Split(names=names, labels=np.asarray(labels, dtype=np.int64))
    pixels = np.asarray(images)
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    return _split_of_pixels(pixels.transpose(library.axes) if library.axes else pixels, labels)


# The record of a split


def write_split_csv(source_splits: Mapping[str, Split], class_names: Sequence[str], path: str | Path) -> None:
    """Write `path,label,split` for every image; for files with absolute paths, so that it is a source itself."""
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with open(handle, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "split"))
            for name, split in source_splits.items():
                files = split.pixels is None
                for image, label in zip(split.names, split.labels, strict=True):
                    writer.writerow((os.path.abspath(image) if files else image, class_names[label], name))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise DiskError(f"the split could not be written: {error.strerror}", where=str(path)) from None


def read_split_csv(path: str | Path) -> dict[str, list[str]]:
    """The image names of each split, as `write_split_csv` wrote them."""
    names: dict[str, list[str]] = {}
    for _, row in _csv_rows(Path(path), ("path", "label", "split")):
        names.setdefault(row["split"], []).append(row["path"])
    return names

"""Data sets that libraries bring: scikit-learn's digits, the sets that torchvision downloads, and one of Debian's."""

import gzip
import importlib.util
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mixlab.data.dataset import Source, Split
from mixlab.data.images.modality import IMAGES
from mixlab.data.splits import stratified_split
from mixlab.errors import DataError, DiskError
from mixlab.files import can_be_written


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
        {s: {"split": s} for s in ("train", "val", "test")},
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
TORCHVISION_NAMES: tuple[str, ...] = tuple(_LIBRARY)
DEBIAN_DATA = Path("/usr/share/datasets")  # where Debian's packages dataset-* put their files
# Sets that also come as four packed IDX files: the folder's name, and how a person gets it without torchvision.
_PACKED = {"fashionmnist": ("fashion-mnist", "`apt-get install dataset-fashion-mnist`")}
_PACKED_PARTS = {"train": "train", "test": "t10k"}


def open_digits() -> Source:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8, split once and for all 60/20/20."""
    table = _digits_table()
    pixels = np.round(table[:, :-1].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)[..., None]
    everything = _split_of_pixels(pixels, table[:, -1])
    parts = stratified_split(everything.labels, (0.6, 0.2, 0.2), seed=0)
    splits = {name: everything.take(part) for name, part in zip(("train", "val", "test"), parts, strict=True)}
    return Source(name="digits", class_names=tuple("0123456789"), splits=splits, modality=IMAGES)


def _digits_table() -> np.ndarray:
    """(1797, 65): 64 pixels from 0 to 16 and the label, from the file that scikit-learn brings along.

    Importing scikit-learn itself, with SciPy's statistics and pandas behind it, takes longer than a short training.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # wherever another version keeps it

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def _split_of_pixels(pixels: np.ndarray, labels: Any, part: str = "") -> Split:
    names = tuple(f"{part} index {i}".strip() for i in range(len(pixels)))
    return Split(names=names, labels=np.asarray(labels, dtype=np.int64), arrays=np.ascontiguousarray(pixels))


# By name, sets that are here without a download.
EMBEDDED: dict[str, Callable[[], Source]] = {"digits": open_digits}


def open_torchvision(name: str, data_dir: Path, download: bool, debian_data: Path = DEBIAN_DATA) -> Source:
    """One of TORCHVISION_NAMES, from its files below `data_dir`; fetched first only with `download`.

    Fashion-MNIST may also lie in a folder fashion-mnist below `data_dir`, or where Debian's package has it.
    """
    library = _LIBRARY[name]
    packed = _packed_folder(name, library, (data_dir, debian_data))
    if packed is not None:
        return _open_packed(name, library, packed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns about the pickles of CIFAR
            from torchvision import datasets

            make: Callable[..., Any] = getattr(datasets, library.dataset)
            loaded = {part: make(str(data_dir), download=download, **o) for part, o in library.parts.items()}
            splits = {part: _library_split(library, dataset, part) for part, dataset in loaded.items()}
    except Exception as error:  # no network, no space, a bad archive, a missing optional package
        expected = f"{data_dir.absolute()}: {library.files}"
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if download and not can_be_written(data_dir):
            hint = "give another --data-dir, or run mixlab in a folder that can be written"
            raise DiskError(
                f"{name} cannot be kept here: no right to write", where=str(data_dir.absolute()), hint=hint
            ) from None
        reason = text.split(" You can use download=True")[0][:200]
        if download:
            found = f"{name} could not be downloaded or read: {reason}"
            raise DataError(found, where=expected, hint="mend that, or put its files there by hand") from None
        found = f"{name} is not there or not complete: {reason}"
        other = f", {_PACKED[name][1]}" if name in _PACKED else ""
        hint = f"add --download to fetch it{other}, put its files there by hand, or give another --data-dir"
        raise DataError(found, where=expected, hint=hint) from None
    count = int(max(split.labels.max() for split in splits.values())) + 1
    classes = getattr(next(iter(loaded.values())), "classes", None) or [str(i) for i in range(count)]
    return Source(name=name, class_names=tuple(classes), splits=splits, modality=IMAGES)


def _library_split(library: _Library, dataset: Any, part: str) -> Split:
    images, labels = getattr(dataset, library.images), getattr(dataset, library.labels)
    if isinstance(images, list):  # paths, or ImageFolder's (path, label)
        names = tuple(str(image[0] if isinstance(image, tuple) else image) for image in images)
        return Split(names=names, labels=np.asarray(labels, dtype=np.int64))
    pixels = np.asarray(images)
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    return _split_of_pixels(pixels.transpose(library.axes) if library.axes else pixels, labels, part)


def _packed_folder(name: str, library: _Library, parents: tuple[Path, Path]) -> Path | None:
    """The folder with the four packed files of a set, if it has one and torchvision's own files are not there."""
    if name not in _PACKED or (parents[0] / library.files).is_dir():
        return None
    places = [parent / _PACKED[name][0] for parent in parents]
    return next((folder for folder in places if all(file.is_file() for file in _packed_files(folder))), None)


def _packed_files(folder: Path) -> list[Path]:
    return [
        folder / f"{stem}-{kind}-ubyte.gz"
        for stem in _PACKED_PARTS.values()
        for kind in ("images-idx3", "labels-idx1")
    ]


def _open_packed(name: str, library: _Library, folder: Path) -> Source:
    from torchvision import datasets

    files, splits = iter(_packed_files(folder)), {}
    for part in _PACKED_PARTS:
        images, labels = next(files), next(files)
        pair = SimpleNamespace(data=_read_idx(images, axes=3), targets=_read_idx(labels, axes=1))
        if len(pair.data) != len(pair.targets):
            found = f"{len(pair.data)} images and {len(pair.targets)} labels"
            raise DataError(found, where=str(labels))
        splits[part] = _library_split(library, pair, part)
    class_names = tuple(getattr(datasets, library.dataset).classes)
    return Source(name=name, class_names=class_names, splits=splits, modality=IMAGES, root=folder)


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """The bytes of a packed IDX file: uint8 of `axes` dimensions. DataError if it holds anything else."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"the file cannot be read: {error}", where=str(path)) from None
    start = 4 * (1 + axes)
    header = struct.unpack(f">{1 + axes}I", content[:start]) if len(content) >= start else (0,)
    # 8 stands for unsigned bytes; the other half of the first number is the count of dimensions.
    if header[0] != 0x800 + axes or len(content) - start != int(np.prod(header[1:], dtype=np.int64)):
        raise DataError(f"this is no whole IDX file of {axes} dimensions", where=str(path))
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(header[1:])

"""Examples in tar shards, as webdataset writes and reads them, with a manifest so that no damage goes unnoticed.

A folder of shards holds `train-000000.tar`, ... (members KEY.jpg or KEY.wav, and KEY.cls), for each shard an index
`train-000000.index.json` with key, label, place and digest of every example, and `manifest.json` with the modality,
the class names and the count, size and SHA-256 of every shard and index. Examples are read at their places, so exact
order and resume are the same as for files; each is compared with its digest whenever it is read.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.data.dataset import SPLIT_NAMES, Source, Split
from mixlab.data.modality import MAX_BYTES, MODALITIES, Modality, registered
from mixlab.errors import DataError, ExampleError, UsageError
from mixlab.files import sha256

MANIFEST_NAME = "manifest.json"
FORMAT = "mixlab-shards"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 30
Progress = Callable[[int, int], None]


def bytes_digest(data: bytes) -> str:
    """Eight bytes of BLAKE2b, in hexadecimal: against damage, not against forgery."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass(frozen=True)
class ShardExamples:
    """`Encoded` examples in tar files: paths of the shards, and for each row shard, offset, size and digest."""

    paths: tuple[Path, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    digest: tuple[str, ...]
    window = 0
    is_checked = True

    def read(self, row: int) -> bytes:
        path = self.paths[self.shard[row]]
        try:
            # Opened anew: workers share no position, and a network file system that was away comes back.
            with path.open("rb") as file:
                file.seek(int(self.offset[row]))
                data = file.read(int(self.size[row]))
        except OSError as error:
            raise ExampleError(f"the shard cannot be read: {error.strerror}", where=str(path)) from None
        if bytes_digest(data) != self.digest[row]:
            raise ExampleError("the shard is damaged here: the digest differs", where=str(path))
        return data


def split_of(name: str) -> str:
    """`train-000000.tar`, `imagenet-validation-7.tar` -> the split that a word of the name is; `all` for none."""
    words = re.split(r"[-_.]", name.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "all")


def check_splits(splits: set[str], folder: Path) -> None:
    """DataError if some shards belong to a split and others to none: those would be left out."""
    if len(splits) > 1 and "all" in splits:
        raise DataError(
            "the names of some shards say train, val or test, and those of others do not",
            where=str(folder),
            hint="rename them, such as train-000000.tar",
        )


def open_shards(pattern: str) -> Source:
    """The source in a folder of shards with a manifest. DataError for a shard that is missing, cut or extended."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UsageError(
            "shards are read from files only; pipe: would run a command, and URLs are not fetched",
            where=pattern,
            hint="mount the storage or copy the shards, and give the folder",
        )
    folder = Path(os.path.expanduser(pattern))
    if folder.name == MANIFEST_NAME:
        folder = folder.parent
    if not (folder / MANIFEST_NAME).is_file():
        tars_in(folder)
        raise DataError(
            "these shards have no manifest, so damage to them would not be noticed",
            where=str(folder),
            hint=f"`mixlab shard {folder}` reads them once and writes one",
        )
    manifest = read_json(folder / MANIFEST_NAME)
    try:
        return _source_of(folder, manifest)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"the manifest is damaged: {error!r}", where=str(folder / MANIFEST_NAME)) from error


def tars_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError("there is no such folder of shards", where=str(folder))
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError("no .tar shards", where=str(folder))
    return tars


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("it is too large")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"it cannot be read: {error}"[:300], where=str(path)) from error
    return value


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything else in a manifest."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _source_of(folder: Path, manifest: dict[str, Any]) -> Source:
    if manifest["format"] != FORMAT or manifest["format_version"] != FORMAT_VERSION:
        raise DataError("this is no manifest that this mixlab reads", where=str(folder / MANIFEST_NAME))
    if manifest["sha256"] != manifest_digest(manifest):
        raise DataError(
            "the manifest was changed or is damaged: its SHA-256 differs", where=str(folder / MANIFEST_NAME),
            hint="copy it again, or remove it and let `mixlab shard` write a new one",
        )  # fmt: skip
    modality = _modality_of(manifest, folder)
    class_names = tuple(str(name) for name in manifest["class_names"])
    paths: list[Path] = []
    names: list[str] = []
    columns = []
    by_split: dict[str, list[tuple[int, int]]] = {}
    for number, shard in enumerate(manifest["shards"]):
        path = folder / Path(str(shard["file"])).name
        index_path = path.with_suffix(".index.json")
        if not path.is_file() or path.stat().st_size != shard["size"]:
            found = f"{path.stat().st_size:,} bytes" if path.is_file() else "nothing"
            raise DataError(
                f"the shard has {found} where the manifest says {shard['size']:,} bytes", where=str(path),
                hint="copy it again",
            )  # fmt: skip
        if not index_path.is_file() or sha256(index_path) != shard["index_sha256"]:
            raise DataError("the index is missing or damaged: its SHA-256 differs", where=str(index_path))
        index = read_json(index_path)
        label, offset, size = (np.array(index[key], dtype=np.int64) for key in ("label", "offset", "size"))
        count = shard["count"]
        lengths = {len(index["key"]), len(index["digest"]), len(label), len(offset), len(size), count}
        if len(lengths) != 1 or (count and (label.min() < 0 or label.max() >= len(class_names))):
            raise DataError("the index does not fit the manifest", where=str(index_path))
        if count and (offset.min() < 0 or size.min() < 0 or (offset + size).max() > shard["size"]):
            raise DataError("the index points outside of the shard", where=str(index_path))
        if count and size.max() > MAX_BYTES:
            raise DataError("the index names an example that is too large", where=str(index_path))
        by_split.setdefault(str(shard["split"]), []).append((len(names), len(names) + count))
        names += [f"{path.name}/{key}" for key in index["key"]]
        paths.append(path)
        columns.append((np.full(count, number), label, offset, size, np.array(index["digest"], dtype=object)))
    check_splits(set(by_split), folder)
    shards, labels, offsets, sizes, digests = (
        np.concatenate(column) for column in zip(*columns, strict=True)
    )
    examples = ShardExamples(tuple(paths), shards, offsets, sizes, tuple(digests))
    splits = {}
    for split, ranges in by_split.items():
        rows = np.concatenate([np.arange(*bounds) for bounds in ranges])
        splits[split] = Split(
            names=tuple(names[row] for row in rows), labels=labels[rows], encoded=examples, rows=rows
        )
    return Source(
        name=folder.resolve().name, class_names=class_names, splits=splits, modality=modality, root=folder
    )


def _modality_of(manifest: dict[str, Any], folder: Path) -> Modality:
    """What kind of examples they are; manifests of older versions say nothing, and have images."""
    name = manifest.get("modality", "images")
    modality = registered(name)
    if modality is None:
        raise DataError(
            f"these shards hold {str(name)[:40]!r}; this mixlab knows {', '.join(MODALITIES)}",
            where=str(folder / MANIFEST_NAME),
            hint="use the mixlab that wrote them, or a newer one",
        )
    return modality


def verify_shards(folder: Path, *, progress: Progress | None = None) -> list[dict[str, str]]:
    """Read every shard whole and compare size and SHA-256 with the manifest: path and reason of each that differs."""
    bad = []
    shards = read_json(folder / MANIFEST_NAME)["shards"]
    for done, shard in enumerate(shards):
        path = folder / Path(str(shard["file"])).name
        reason = None
        try:
            if path.stat().st_size != shard["size"] or sha256(path) != shard["sha256"]:
                reason = "size or SHA-256 differ from the manifest"
        except OSError as error:
            reason = f"it cannot be read: {error.strerror}"
        if reason:
            bad.append({"path": str(path), "reason": reason})
        if progress is not None:
            progress(done + 1, len(shards))
    return bad

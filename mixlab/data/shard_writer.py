"""Writing shards: pictures as they are into tar files, an index of each, and the manifest of all (see `shards`)."""

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from mixlab.data.dataset import Source, Split
from mixlab.data.decode import IMAGE_SUFFIXES, MAX_BYTES, decode, describe
from mixlab.data.shards import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Progress,
    check_splits,
    manifest_digest,
    picture_digest,
    read_json,
    split_of,
    tars_in,
)
from mixlab.errors import DataError, ImageError, UsageError
from mixlab.files import sha256, write_atomically, written_whole

_CODE_SUFFIXES = (
    ".pyd",
    ".pickle",
    ".pkl",
    ".pth",
    ".pt",
    ".py",
)  # of which webdataset decodes some by unpickling
_BLOCK = 512  # of a tar file
_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # of others it is the name itself


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What `write_shards` wrote: pictures written and left out, which sum to all of them, and shards."""

    num_ok: int
    num_bad: int
    bad: list[dict[str, str]]
    num_shards: int
    num_bytes: int
    splits: dict[str, int]


def write_shards(
    source: Source,
    folder: Path,
    *,
    shard_bytes: int = 256 << 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> ShardResult:
    """Write every picture of `source`, as it is, into shards of about `shard_bytes`; unreadable ones are listed.

    Within a split the pictures are shuffled, for readers that go from front to back. `folder` must not exist; it
    appears when all of it is on the disk.
    """
    if folder.exists():
        raise UsageError("this folder exists already", where=str(folder), hint="choose another, or remove it")
    _webdataset()
    total = sum(len(split) for split in source.splits.values())
    bad: list[dict[str, str]] = []
    counts: dict[str, int] = {}
    with written_whole(folder) as temporary:
        temporary.mkdir()
        done = 0
        for name, split in source.splits.items():
            order = np.argsort(np.random.Philox(key=seed).random_raw(len(split)), kind="stable")
            with _Writer(temporary, name, shard_bytes) as writer:
                for i in order:
                    done += 1
                    try:
                        data, suffix = _encoded(split, int(i))
                        decode(data)
                    except ImageError as error:
                        bad.append({"path": split.names[i], "reason": error.message})
                        continue
                    writer.write(data, suffix, int(split.labels[i]))
                    if progress is not None and done % 256 == 0:
                        progress(done, total)
            counts[name] = writer.count
        if not any(counts.values()):
            raise DataError("no picture can be read", where=source.name)
        num_shards, size = _write_manifest(
            temporary, list(source.class_names), {str(i): i for i in range(len(source.class_names))}
        )
        if bad:
            text = io.StringIO()
            rows = csv.DictWriter(text, ("path", "reason"), lineterminator="\n")
            rows.writeheader()
            rows.writerows(bad)
            (temporary / "bad_files.csv").write_text(
                text.getvalue(), encoding="utf-8", errors="surrogateescape"
            )
    num_ok = sum(counts.values())
    return ShardResult(
        num_ok=num_ok, num_bad=len(bad), bad=bad, num_shards=num_shards, num_bytes=size, splits=counts
    )


def index_shards(folder: Path, *, progress: Progress | None = None) -> ShardResult:
    """Write index and manifest beside tar files that someone else made, after reading all of them.

    Classes are the numbers or names in the .cls (or .txt) members; the split is the file name's beginning.
    """
    if (folder / MANIFEST_NAME).exists():
        raise UsageError("these shards have a manifest already", where=str(folder))
    tars = tars_in(folder)
    splits = {split_of(path.name) for path in tars}
    check_splits(splits, folder)
    names = sorted({label for path in tars for label in _pictures_in(path)[1].values()}, key=_class_order)
    numbers = {name: i for i, name in enumerate(names)}
    num_shards, num_bytes = _write_manifest(folder, names, numbers, progress=progress)
    counts: dict[str, int] = {}
    for shard in read_json(folder / MANIFEST_NAME)["shards"]:
        counts[shard["split"]] = counts.get(shard["split"], 0) + shard["count"]
    return ShardResult(
        num_ok=sum(counts.values()), num_bad=0, bad=[], num_shards=num_shards, num_bytes=num_bytes, splits=counts
    )  # fmt: skip


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise UsageError(
            "writing shards needs the package webdataset", hint="pip install 'mixlab[shards]'"
        ) from None
    return webdataset


class _Writer:
    """The shards of one split, each begun when the one before is full."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._number = self._size = self.count = 0
        self._file: BinaryIO | None = None
        self._tar: Any = None

    def write(self, data: bytes, suffix: str, label: int) -> None:
        if self._tar is None or self._size + len(data) > self._shard_bytes:
            self._close()
            path = self._folder / f"{self._split}-{self._number:06d}.tar"
            self._file = path.open("wb")
            # The same pictures give the same bytes: no time and no user in them.
            self._tar = _webdataset().TarWriter(
                self._file, encoder=False, mtime=0, user="mixlab", group="mixlab"
            )
            self._number, self._size = self._number + 1, 0
        self._tar.write({"__key__": f"{self.count:09d}", suffix: data, "cls": str(label).encode()})
        self._size += len(data) + 4 * _BLOCK
        self.count += 1

    def _close(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            self._file.close()
            self._tar = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _encoded(split: Split, index: int) -> tuple[bytes, str]:
    """The bytes of a picture and the suffix that tells their format: as they are, or pixels as PNG."""
    if split.pixels is None:
        data = split.read(index)
        return data, _suffix_of(data)
    from PIL import Image

    pixels = split.pixels[index]
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "png")
    return buffer.getvalue(), "png"


def _suffix_of(data: bytes) -> str:
    name = describe(data)[3]
    return _SUFFIX_OF_FORMAT.get(name, name.lower())


# Indexing


def _members(path: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """(key, suffix, offset, content) of every member that counts. DataError if the archive is cut or odd."""
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:  # never compressed: members must have places
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isdir():
                    continue
                name = PurePosixPath(member.name)
                if not member.isfile() or name.is_absolute() or ".." in name.parts:
                    raise DataError(f"{member.name} is no plain file", where=str(path))
                suffix = name.suffix.lower()
                if suffix in _CODE_SUFFIXES:
                    raise DataError(
                        f"{member.name} may hold code; such members are not read", where=str(path),
                        hint="write the shards without it",
                    )  # fmt: skip
                if suffix not in IMAGE_SUFFIXES and suffix not in (".cls", ".txt"):
                    continue
                if member.size > MAX_BYTES:
                    raise DataError(f"{member.name} is larger than {MAX_BYTES >> 20} MiB", where=str(path))
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                if len(data) != member.size:
                    raise DataError(f"it is cut in {member.name}", where=str(path))
                yield str(name.with_suffix("")), suffix, member.offset_data, data
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"the shard cannot be read: {error}", where=str(path)) from error
    # tarfile takes a cut between two members, or a damaged header, for the end. A whole archive ends in zeros.
    with path.open("rb") as file_:
        file_.seek(end)
        rest = file_.read(1 << 20)
    if len(rest) < 2 * _BLOCK or any(rest):
        raise DataError("the archive has no end: it is cut or damaged", where=str(path))


def _pictures_in(path: Path) -> tuple[dict[str, tuple[int, int, str]], dict[str, str]]:
    """Of every key the picture's offset, size and digest, and what its .cls says, or its .txt where there is none."""
    pictures: dict[str, tuple[int, int, str]] = {}
    classes: dict[str, str] = {}
    texts: dict[str, str] = {}
    for key, suffix, offset, data in _members(path):
        if suffix in IMAGE_SUFFIXES:
            if key in pictures:
                raise DataError(f"two pictures have the key {key}", where=str(path))
            pictures[key] = (offset, len(data), picture_digest(data))
        else:
            labels = classes if suffix == ".cls" else texts
            labels[key] = data.decode("utf-8", errors="replace").strip()
    labels = {key: classes.get(key, texts.get(key, "")) for key in pictures}
    unlabelled = [key for key, label in labels.items() if not label]
    if unlabelled:
        raise DataError(f"{unlabelled[0]} has a picture but no .cls with its class", where=str(path))
    return pictures, labels


def _class_order(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isascii() and label.isdigit() else (1 << 62, label)


def _index_of(path: Path, label_numbers: dict[str, int]) -> dict[str, list[Any]]:
    pictures, labels = _pictures_in(path)
    return {
        "key": list(pictures),
        "label": [label_numbers[labels[key]] for key in pictures],
        "offset": [offset for offset, _, _ in pictures.values()],
        "size": [size for _, size, _ in pictures.values()],
        "digest": [digest for _, _, digest in pictures.values()],
    }


def _write_manifest(
    folder: Path, class_names: list[str], label_numbers: dict[str, int], *, progress: Progress | None = None
) -> tuple[int, int]:
    """Index every shard in `folder` and describe them all; number of shards, and of their bytes.

    label_numbers: the class that each text in a .cls member means.
    """
    tars = tars_in(folder)
    shards: list[dict[str, Any]] = []
    for done, path in enumerate(tars):
        index = _index_of(path, label_numbers)
        index_path = path.with_suffix(".index.json")
        write_atomically(index_path, json.dumps(index).encode())
        shards.append(
            {
                "file": path.name,
                "split": split_of(path.name),
                "count": len(index["key"]),
                "size": path.stat().st_size,
                "sha256": sha256(path),
                "index_sha256": sha256(index_path),
            }
        )
        if progress is not None:
            progress(done + 1, len(tars))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class_names": class_names,
        "shards": shards,
    }
    manifest["sha256"] = manifest_digest(manifest)
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
    return len(shards), sum(shard["size"] for shard in shards)

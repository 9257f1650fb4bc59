"""Writing shards: examples as they are into tar files, an index of each, and the manifest of all (see `shards`)."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mixlab.data.dataset import Source, Split
from mixlab.data.modality import Modality
from mixlab.data.shard_index import BLOCK, contents_of, write_manifest
from mixlab.data.shards import MANIFEST_NAME, Progress, check_splits, split_of, tars_in
from mixlab.errors import DataError, ExampleError, UsageError
from mixlab.files import written_whole
from mixlab.words import install_hint


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What `write_shards` wrote: examples written, those and files that may be some left out, and shards."""

    num_ok: int
    num_bad: int
    bad: list[dict[str, str]]
    num_shards: int
    num_bytes: int
    modality: str
    splits: dict[str, int]


def write_shards(
    source: Source,
    folder: Path,
    *,
    shard_bytes: int = 256 << 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> ShardResult:
    """Write every example of `source`, as it is, into shards of about `shard_bytes`; unreadable ones are listed.

    Within a split they are shuffled, for readers that go from front to back. `folder` must not exist; it
    appears when all of it is on the disk.
    """
    if folder.exists():
        raise UsageError("this folder exists already", where=str(folder), hint="choose another, or remove it")
    _webdataset()
    total = sum(len(split) for split in source.splits.values())
    bad = [{"path": path, "reason": reason} for path, reason in source.lost]
    with written_whole(folder) as temporary:
        temporary.mkdir()
        done = 0
        for name, split in source.splits.items():
            order = np.argsort(np.random.Philox(key=seed).random_raw(len(split)), kind="stable")
            with _Writer(temporary, name, shard_bytes) as writer:
                for i in order:
                    done += 1
                    try:
                        data, suffix = _encoded(split, int(i), source.modality)
                    except ExampleError as error:
                        bad.append({"path": split.names[i], "reason": error.message})
                        continue
                    writer.write(data, suffix, int(split.labels[i]))
                    if progress is not None and done % 256 == 0:
                        progress(done, total)
        if len(bad) == total + len(source.lost):
            raise DataError(f"no {source.modality.one} can be read", where=source.name)
        contents = {path: contents_of(path) for path in tars_in(temporary)}
        numbers = {str(i): i for i in range(len(source.class_names))}
        manifest = write_manifest(temporary, contents, list(source.class_names), numbers)
        if bad:
            text = io.StringIO()
            rows = csv.DictWriter(text, ("path", "reason"), lineterminator="\n")
            rows.writeheader()
            rows.writerows(bad)
            (temporary / "bad_files.csv").write_text(
                text.getvalue(), encoding="utf-8", errors="surrogateescape"
            )
    return _result(manifest, bad)


def index_shards(folder: Path, *, progress: Progress | None = None) -> ShardResult:
    """Write index and manifest beside tar files that someone else made, after reading all of them.

    Classes are the numbers or names in the .cls (or .txt) members; the split is the file name's beginning.
    """
    if (folder / MANIFEST_NAME).exists():
        raise UsageError("these shards have a manifest already", where=str(folder))
    tars = tars_in(folder)
    splits = {split_of(path.name) for path in tars}
    check_splits(splits, folder)
    contents = {path: contents_of(path) for path in tars}
    names = sorted({label for one in contents.values() for label in one.labels.values()}, key=_class_order)
    numbers = {name: i for i, name in enumerate(names)}
    return _result(write_manifest(folder, contents, names, numbers, progress=progress), [])


def _result(manifest: dict[str, Any], bad: list[dict[str, str]]) -> ShardResult:
    splits = dict.fromkeys(("train", "val", "test", "all"), 0)
    for shard in manifest["shards"]:
        splits[shard["split"]] += shard["count"]
    return ShardResult(
        num_ok=sum(splits.values()),
        num_bad=len(bad),
        bad=bad,
        num_shards=len(manifest["shards"]),
        num_bytes=sum(shard["size"] for shard in manifest["shards"]),
        modality=manifest["modality"],
        splits={name: count for name, count in splits.items() if count},
    )


def _class_order(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isascii() and label.isdigit() else (1 << 62, label)


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise UsageError("writing shards needs the package webdataset", hint=install_hint("shards")) from None
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
            # The same files give the same bytes: no time and no user in them.
            self._tar = _webdataset().TarWriter(
                self._file, encoder=False, mtime=0, user="mixlab", group="mixlab"
            )
            self._number, self._size = self._number + 1, 0
        self._tar.write({"__key__": f"{self.count:09d}", suffix: data, "cls": str(label).encode()})
        self._size += len(data) + 4 * BLOCK
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


def _encoded(split: Split, index: int, modality: Modality) -> tuple[bytes, str]:
    """The bytes of an example and the suffix that tells their format: as they are, or an array as a file."""
    if split.arrays is not None:
        return modality.encode(split.arrays[index])
    content = split.read(index)
    modality.decode(content)
    return content, modality.suffix_of(content)

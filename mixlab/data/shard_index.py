"""What is in tar shards: every example's place, digest and class, and the manifest of all (see `shards`)."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from mixlab.data.modality import MAX_BYTES, MODALITIES, Modality
from mixlab.data.shards import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Progress,
    bytes_digest,
    manifest_digest,
    split_of,
)
from mixlab.errors import DataError
from mixlab.files import sha256, write_atomically

# webdataset decodes some of these by unpickling.
_CODE_SUFFIXES = (".pyd", ".pickle", ".pkl", ".pth", ".pt", ".py")
BLOCK = 512  # of a tar file


@dataclass(frozen=True)
class Contents:
    """Of a shard. places: of every key the example's offset, size and digest. labels: what its .cls says, or its .txt
    where there is none. modality: what kind of examples they are; None where there is none."""

    places: dict[str, tuple[int, int, str]]
    labels: dict[str, str]
    modality: Modality | None


class _Capped:
    """A file of which tarfile cannot be made to read gigabytes at once, as it does for a header that says so."""

    def __init__(self, file: BinaryIO) -> None:
        self.tell, self.seek, self.read_file = file.tell, file.seek, file.read

    def read(self, size: int) -> bytes:
        if size > MAX_BYTES + BLOCK:
            raise tarfile.ReadError("a part of it is too large")
        return self.read_file(size)


def _members(path: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """(key, suffix, offset, content) of every member that counts. DataError if the archive is cut or odd."""
    end = 0
    try:
        # "r:", never compressed: members must have places
        with path.open("rb") as whole, tarfile.open(fileobj=cast(Any, _Capped(whole)), mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.isdir():
                    continue
                name = PurePosixPath(member.name)
                if not member.isfile() or member.issparse() or name.is_absolute() or ".." in name.parts:
                    raise DataError(f"{member.name} is no plain file", where=str(path))
                suffix = name.suffix.lower()
                if suffix in _CODE_SUFFIXES:
                    raise DataError(
                        f"{member.name} may hold code; such members are not read", where=str(path),
                        hint="write the shards without it",
                    )  # fmt: skip
                if _modality_of(suffix) is None and suffix not in (".cls", ".txt"):
                    continue
                if member.size > MAX_BYTES:
                    raise DataError(f"{member.name} is larger than {MAX_BYTES >> 20} MiB", where=str(path))
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                if len(data) != member.size:
                    raise DataError(f"it is cut in {member.name}", where=str(path))
                yield str(name.with_suffix("")), suffix, member.offset_data, data
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"the shard cannot be read: {error}", where=str(path)) from error
    # tarfile takes a cut between two members, or a damaged header, for the end. A whole archive ends in zeros.
    with path.open("rb") as file_:
        file_.seek(end)
        rest = file_.read(1 << 20)
    if len(rest) < 2 * BLOCK or any(rest):
        raise DataError("the archive has no end: it is cut or damaged", where=str(path))


def contents_of(path: Path) -> Contents:
    """What is in a shard. DataError if an example has no class, or if they are of more than one kind."""
    places: dict[str, tuple[int, int, str]] = {}
    classes: dict[str, str] = {}
    texts: dict[str, str] = {}
    modality: Modality | None = None
    for key, suffix, offset, data in _members(path):
        kind = _modality_of(suffix)
        if kind is None:
            labels = classes if suffix == ".cls" else texts
            labels[key] = data.decode("utf-8", errors="replace").strip()
            continue
        modality = modality or kind
        _check_kinds(modality, kind, path)
        if key in places:
            raise DataError(f"two {kind.many} have the key {key}", where=str(path))
        places[key] = (offset, len(data), bytes_digest(data))
    labels = {key: classes.get(key, texts.get(key, "")) for key in places}
    unlabelled = [key for key, label in labels.items() if not label]
    if unlabelled:
        raise DataError(f"{unlabelled[0]} has no .cls with its class", where=str(path))
    return Contents(places, labels, modality)


def _modality_of(suffix: str) -> Modality | None:
    """What kind of example a member of this ending is; None for any other member."""
    return next((one for one in MODALITIES.values() if suffix in one.suffixes), None)


def _check_kinds(one: Modality, other: Modality, path: Path) -> None:
    if one is not other:
        raise DataError(
            f"there are both {one.many} and {other.many} in these shards", where=str(path),
            hint="a set has one kind of example; write the shards without the other",
        )  # fmt: skip


def write_manifest(
    folder: Path,
    contents: Mapping[Path, Contents],
    class_names: list[str],
    label_numbers: Mapping[str, int],
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an index of every shard and the manifest of all, and return the manifest.

    contents: what is in every shard. label_numbers: the class that each text in a .cls member means.
    """
    kinds = [(one.modality, path) for path, one in contents.items() if one.modality is not None]
    if not kinds:
        names = " or ".join(one.many for one in MODALITIES.values())
        raise DataError(f"there are no {names} in these shards", where=str(folder))
    modality = kinds[0][0]
    for kind, path in kinds:
        _check_kinds(modality, kind, path)
    shards: list[dict[str, Any]] = []
    for done, (path, one) in enumerate(contents.items()):
        index = {
            "key": list(one.places),
            "label": [label_numbers[one.labels[key]] for key in one.places],
            "offset": [offset for offset, _, _ in one.places.values()],
            "size": [size for _, size, _ in one.places.values()],
            "digest": [digest for _, _, digest in one.places.values()],
        }
        index_path = path.with_suffix(".index.json")
        write_atomically(index_path, json.dumps(index).encode())
        shards.append(
            {
                "file": path.name,
                "split": split_of(path.name),
                "count": len(one.places),
                "size": path.stat().st_size,
                "sha256": sha256(path),
                "index_sha256": sha256(index_path),
            }
        )
        if progress is not None:
            progress(done + 1, len(contents))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "modality": modality.name,
        "class_names": class_names,
        "shards": shards,
    }
    manifest["sha256"] = manifest_digest(manifest)
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
    return manifest

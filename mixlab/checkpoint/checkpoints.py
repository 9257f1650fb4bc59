"""Checkpoints, what a run resumes from, on disk.

One is `checkpoints/step_00000500/` with the tensors, `state.json`, and `manifest.json` holding the size and SHA-256
of each; it is written under another name and renamed when all of it is on the disk.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mixlab.checkpoint.store import save_tensors
from mixlab.errors import DiskError, WeightsError
from mixlab.files import TEMPORARY, remove, sha256, written_whole
from mixlab.records import open_record, read_json, take

CHECKPOINTS_NAME = "checkpoints"  # the folder of a run that has them
PARTS_INDEX = ".metadata"  # in a checkpoint whose tensors `sharded` reads
MANIFEST_NAME, STATE_NAME = "manifest.json", "state.json"
MAX_FILE_BYTES = 2**42  # of a checkpoint
TENSOR_FILES = ("model", "ema", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a run resumes from: tensors by file (`model`, `ema`, `optimizer`) and plain values.

    parts: the folder where the tensors are instead, for `sharded.read_shards`, if each rank wrote its own.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    parts: Path | None = None


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    keep: int = 2,
    write_parts: Callable[[Path], None] | None = None,
) -> Path:
    """Write `folder/step_NNNNNNNN`, read it back, then remove all but the newest `keep`.

    write_parts: writes more files into the folder it is given, before the manifest lists them all.
    DiskError leaves the old ones, also where what is read back is not what was written.
    """
    path = folder / f"step_{checkpoint.step:08d}"
    if _is_whole(path):  # the same step once more, after a resume: the content is the same
        return path
    with written_whole(path) as temporary:
        temporary.mkdir()
        for name, tensors in checkpoint.tensors.items():
            save_tensors(tensors, temporary / f"{name}.safetensors")
        if write_parts is not None:
            write_parts(temporary)
        (temporary / STATE_NAME).write_text(json.dumps({"step": checkpoint.step} | checkpoint.state))
        manifest = {
            file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(temporary.iterdir())
        }
        (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2))
        _make_room(path)
    if not _is_whole(path):
        raise DiskError("what was written cannot be read back", where=str(path), hint="is the disk failing?")
    for old in checkpoint_paths(folder)[:-keep]:
        if not _is_ours(old):
            continue
        try:
            remove(old)
        except OSError as error:
            raise DiskError(
                f"an old checkpoint cannot be removed: {error.strerror}", where=str(old)
            ) from error
    return path


def _is_whole(path: Path) -> bool:
    try:
        _verify(path)
    except (OSError, WeightsError):
        return False
    return True


def _make_room(path: Path) -> None:
    """Take away a damaged checkpoint whose step is saved again; what is not known to be ours gets another name."""
    if _is_ours(path) or not os.path.lexists(path):
        remove(path)
        return
    number = 1
    while os.path.lexists(other := path.with_name(f"not_ours_{number}_{path.name}")):
        number += 1
    path.rename(other)


def _is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint that we wrote: what its manifest lists, and nothing else, is in it."""
    try:
        listed = {*read_json(path / MANIFEST_NAME), MANIFEST_NAME}
        return all(file.name in listed and file.is_file() for file in path.iterdir())
    except (WeightsError, OSError):
        return False


def sweep(folder: Path) -> None:
    """Remove what a killed save left behind: files and folders that never got their name."""
    for leftover in folder.glob(".*.tmp"):
        if TEMPORARY.fullmatch(leftover.name):
            remove(leftover)


def load_newest_checkpoint(
    folder: Path, check: Callable[[Checkpoint], object] = lambda checkpoint: None
) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was passed over. WeightsError if none does.

    check: raises WeightsError for one that is whole, but does not fit.
    """
    rejected: list[str] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            checkpoint = _load_checkpoint(path)
            check(checkpoint)
        except WeightsError as error:
            where = "" if error.where in (None, str(path)) else f" ({Path(str(error.where)).name})"
            rejected.append(f"{path.name}: {error.message}{where}")
            continue
        return checkpoint, rejected
    raise WeightsError(
        "there is no checkpoint to resume from" + "".join(f"; {reason}" for reason in rejected),
        where=str(folder),
    )


def checkpoint_paths(folder: Path) -> list[Path]:
    """The folders in `folder` that are called as checkpoints are, oldest first."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,18}", path.name, re.ASCII))
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; WeightsError names the first file that is not what it says."""
    where = path / MANIFEST_NAME
    manifest = read_json(where)
    for name in manifest:
        if Path(name).name != name or name in ("", "..", MANIFEST_NAME):
            raise WeightsError(f"{name[:100]!r} is no file of a checkpoint", where=str(where))
        facts = take(manifest, name, dict, str(where))
        size, digest = (take(facts, key, kind, str(where)) for key, kind in (("size", int), ("sha256", str)))
        with open_record(path / name, MAX_FILE_BYTES) as file:  # no link, and nothing that one waits for
            found = file.seek(0, 2)
        if found != size or sha256(path / name) != digest:
            raise WeightsError(
                f"{name} is damaged: size or SHA-256 differ from the manifest", where=str(path)
            )
    if STATE_NAME not in manifest:
        raise WeightsError(f"it is incomplete: {STATE_NAME} is not in its manifest", where=str(path))
    return manifest


def _load_checkpoint(path: Path) -> Checkpoint:
    try:
        manifest = _verify(path)
        state = read_json(path / STATE_NAME)
        if take(state, "step", int, str(path / STATE_NAME)) != _step_of(path):
            raise WeightsError(f"it is of step {state['step']}", where=str(path / STATE_NAME))
        tensors = {
            name: load_file(path / f"{name}.safetensors")
            for name in TENSOR_FILES
            if f"{name}.safetensors" in manifest
        }
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"it cannot be read: {error}", where=str(path)) from error
    parts = path if PARTS_INDEX in manifest else None
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state, parts=parts)

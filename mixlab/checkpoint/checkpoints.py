"""Checkpoints, what a run resumes from, on disk.

One is `checkpoints/step_00000500/` with the tensors, `state.json`, and `manifest.json` holding the size and SHA-256
of each; it is written under another name and renamed when all of it is on the disk.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mixlab.checkpoint.store import save_tensors
from mixlab.errors import DiskError, WeightsError
from mixlab.files import remove, sha256, written_whole

PARTS_INDEX = ".metadata"  # in a checkpoint whose tensors `sharded` reads


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
        (temporary / "state.json").write_text(json.dumps({"step": checkpoint.step} | checkpoint.state))
        manifest = {
            file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(temporary.iterdir())
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        remove(path)  # a damaged one
    if not _is_whole(path):
        raise DiskError("what was written cannot be read back", where=str(path), hint="is the disk failing?")
    for old in sorted(_checkpoint_paths(folder))[:-keep]:
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WeightsError):
        return False
    return True


def sweep(folder: Path) -> None:
    """Remove what a killed save left behind: files and folders that never got their name."""
    for leftover in folder.glob(".*.tmp"):
        remove(leftover)


def load_newest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was passed over. WeightsError if none does."""
    rejected: list[str] = []
    for path in sorted(_checkpoint_paths(folder), reverse=True):
        try:
            return _load_checkpoint(path), rejected
        except WeightsError as error:
            rejected.append(f"{path.name}: {error.message}")
    raise WeightsError(
        "there is no checkpoint to resume from" + "".join(f"; {reason}" for reason in rejected),
        where=str(folder),
    )


def _checkpoint_paths(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name))


def _verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; WeightsError names the first file that is not what it says."""
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    for name, facts in manifest.items():
        file = path / Path(name).name
        if file.stat().st_size != facts["size"] or sha256(file) != facts["sha256"]:
            raise WeightsError(
                f"{name} is damaged: size or SHA-256 differ from the manifest", where=str(path)
            )
    return manifest


def _load_checkpoint(path: Path) -> Checkpoint:
    try:
        manifest = _verify(path)
        state = json.loads((path / "state.json").read_text())
        tensors = {
            name.removesuffix(".safetensors"): load_file(path / name)
            for name in manifest
            if name.endswith(".safetensors")
        }
        parts = path if PARTS_INDEX in manifest else None
        return Checkpoint(step=state.pop("step"), tensors=tensors, state=state, parts=parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise WeightsError(f"it cannot be read: {error}", where=str(path)) from error

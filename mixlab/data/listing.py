"""Which files below a folder are examples: the one answer for check, train, evaluate, predict and shard.

A file is one by its name's ending or, where that says nothing, by its first bytes. Links are followed, each
folder once. Everything else is counted with a reason.
"""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlab.data.modality import MODALITIES, Modality
from mixlab.errors import DataError
from mixlab.escape import readable
from mixlab.language import tell, word

_MEDIA_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".wav", ".mp3", ".flac", ".ogg", ".pdf")
_TABLE_SUFFIXES = (".npy", ".npz", ".h5", ".pkl", ".pt", ".parquet", ".db")
_OTHER_SUFFIXES = {".zip", ".tar", ".gz", ".7z", *_MEDIA_SUFFIXES, *_TABLE_SUFFIXES}
_SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "__macosx", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "lost+found", "__pycache__",
     "system volume information", "@recently-snapshot")
)  # fmt: skip
# What a folder that mixlab wrote has inside: a run, weights, a study.
_OWN = (
    {"recipe.toml", "environment.json"},
    {"weights.safetensors", "config.json"},
    {"report.html", "figures"},
)
_SNIFFED_BYTES = 512
NUM_EXAMPLES = 5
# Reasons, in the words a person reads.
HIDDEN, SYSTEM, OWN = "hidden", "of the system or another program", "written by mixlab"
TEXT, UNKNOWN = "text", "of no known kind"
LOOSE = "outside the class folders"
SEEN, GONE, ODD = "a link to a folder that is read already", "a link to a missing file", "not a regular file"
LOSSES = frozenset((UNKNOWN, LOOSE))  # may well be examples, so they count as unreadable
NUM_COUNTED = 2000  # files by which it is told what is in a folder


@dataclass(frozen=True)
class Skipped:
    """Files or folders that are left out for one reason. paths: all of them, if they may be examples, else some."""

    reason: str
    count: int
    paths: tuple[str, ...]

    @property
    def examples(self) -> list[str]:
        """Some of the paths."""
        return list(self.paths[:NUM_EXAMPLES])

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.reason, "count": self.count, "examples": self.examples}

    @property
    def is_loss(self) -> bool:
        """Whether these may be examples, and count as unreadable ones."""
        return self.reason in LOSSES


@dataclass
class Skips:
    """Collects what is left out: how many files or folders for each reason, and paths of them."""

    counts: dict[str, int] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str | Path) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.paths.setdefault(reason, [])
        if reason in LOSSES or len(kept) < NUM_EXAMPLES:
            kept.append(readable(str(path)))

    def update(self, other: "Skips") -> None:
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            kept = self.paths.setdefault(reason, [])
            kept += (
                other.paths[reason] if reason in LOSSES else other.paths[reason][: NUM_EXAMPLES - len(kept)]
            )

    def result(self) -> tuple[Skipped, ...]:
        """Most first."""
        reasons = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
        return tuple(Skipped(reason, self.counts[reason], tuple(self.paths[reason])) for reason in reasons)


def is_left_out(name: str) -> bool:
    """Whether a file or folder of this name is hidden, the system's or another program's."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS or name.lower() in _SYSTEM_FILES


def is_own(folder: Path) -> bool:
    """Whether mixlab wrote this folder: a run, weights, a study."""
    return _has_own({entry.name for entry in _entries(folder)})


def subfolders(folder: Path, skips: Skips | None = None) -> list[Path]:
    """The folders in `folder`, links to folders included, by name; others than data go to `skips`."""
    skips = skips or Skips()
    found = []
    for entry in _entries(folder):
        if _is_folder(entry):
            path = folder / entry.name
            if reason := _why_left_out(entry.name) or (OWN if is_own(path) else None):
                skips.add(reason, entry.path + os.sep)
            else:
                found.append(path)
    return sorted(found)


def modality_in(folder: Path) -> Modality:
    """What kind of example most of the first files below a folder are, by their names; the first kind, if none."""
    counts = dict.fromkeys(MODALITIES, 0)
    if len(counts) == 1:
        return next(iter(MODALITIES.values()))
    num_seen = 0
    for _, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            for modality in MODALITIES.values():
                counts[modality.name] += suffix in modality.suffixes
        num_seen += len(names)
        if num_seen >= NUM_COUNTED:
            break
    return MODALITIES[max(counts, key=lambda name: counts[name])]


def files_in(folder: Path, modality: Modality, skips: Skips | None = None) -> list[str]:
    """Paths of the examples directly in `folder`, sorted; other files go to `skips`, subfolders are passed over."""
    skips = skips or Skips()
    entries = _entries(folder)
    return sorted(e.path for e in entries if not _is_folder(e) and _is_example(e, modality, skips))


def files_below(folder: Path, modality: Modality, skips: Skips | None = None) -> list[str]:
    """Paths of the examples in `folder` and all folders below, sorted; what is left out goes to `skips`.

    DataError for a folder that cannot be read.
    """
    skips = skips or Skips()
    resolved = folder.resolve()
    # A link to a folder above would bring in everything again, and itself.
    seen = {_identity(above) for above in resolved.parents}
    found: list[str] = []
    waiting = [str(folder)]
    while waiting:
        path = waiting.pop()
        identity = _identity(path)
        if identity in seen:
            skips.add(SEEN, path + os.sep)
            continue
        seen.add(identity)
        entries = _entries(path)
        if _has_own({entry.name for entry in entries}):
            skips.add(OWN, path + os.sep)
            continue
        for entry in entries:
            if not _is_folder(entry):
                if _is_example(entry, modality, skips):
                    found.append(entry.path)
            elif reason := _why_left_out(entry.name):
                skips.add(reason, entry.path + os.sep)
            else:
                waiting.append(entry.path)
    return sorted(found)


def describe_skipped(skipped: Iterable[Skipped]) -> str:
    """`left out: 3 text (cat/notes.txt), 1 hidden (...)`; empty for nothing."""
    parts = [
        tell("{n:,} {reason} ({path})", n=one.count, reason=_reason(one.reason), path=one.examples[0])
        for one in skipped
    ]
    return tell("left out: {parts}", parts=", ".join(parts)) if parts else ""


def _reason(english: str) -> str:
    """The reason in the language of now."""
    other = re.fullmatch(r"no (.+) \((\..+)\)", english)
    return tell("no {one} ({suffix})", one=other[1], suffix=other[2]) if other else word(english)


def _has_own(names: set[str]) -> bool:
    return any(own <= names for own in _OWN)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder cannot be read: {error.strerror}", where=str(folder)) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"the folder cannot be read: {error.strerror}", where=str(path)) from None
    return status.st_dev, status.st_ino


def _why_left_out(name: str) -> str | None:
    if not is_left_out(name):
        return None
    return HIDDEN if name.startswith(".") else SYSTEM


def _is_example(entry: os.DirEntry[str], modality: Modality, skips: Skips) -> bool:
    """Whether a file is to be read as an example; if not, why goes to `skips`."""
    reason = _why_left_out(entry.name)
    if reason is None:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in modality.suffixes or suffix in modality.foreign_suffixes:
            return True  # if it cannot be read, that is listed
        reason = _why_none(entry, modality, suffix)
    if reason is not None:
        skips.add(reason, entry.path)
    return reason is None


def _why_none(entry: os.DirEntry[str], modality: Modality, suffix: str) -> str | None:
    """Why the file is no example, judged by its first bytes; None for one."""
    try:
        if not stat.S_ISREG(os.stat(entry.path).st_mode):  # opening a FIFO would wait for ever
            return ODD
        with open(entry.path, "rb") as file:
            start = file.read(_SNIFFED_BYTES)
    except FileNotFoundError:
        return GONE
    except OSError:
        return UNKNOWN
    if modality.claims(start):
        return None
    if suffix in _OTHER_SUFFIXES:
        return f"no {modality.one} ({suffix})"
    return TEXT if _is_text(start) else UNKNOWN


def _is_text(start: bytes) -> bool:
    """Whether a file begins like text, in UTF-8 or any other coding that has no control characters."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        return True
    return not any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in start)

"""Where labelled examples come from: class folders, a CSV file, digits, or a set that torchvision knows."""

import difflib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mixlab.data.csv_files import read_rows
from mixlab.data.dataset import SPLIT_NAMES, Source, Split, clean_name
from mixlab.data.images.known import TORCHVISION_NAMES, open_torchvision
from mixlab.data.listing import (
    HIDDEN,
    LOOSE,
    OWN,
    SYSTEM,
    Skips,
    files_below,
    files_in,
    is_own,
    modality_in,
    subfolders,
)
from mixlab.data.modality import MODALITIES, SETS, Modality
from mixlab.data.shards import open_shards
from mixlab.errors import DataError, UsageError, path_text
from mixlab.escape import readable
from mixlab.files import near_paths
from mixlab.records import MAX_TABLE_BYTES, read_bytes

_LAYOUT = "lay it out as FOLDER/CLASS/FILE, or as FOLDER/train/CLASS/FILE with val and test beside train"
SOURCE_NAMES: tuple[str, ...] = (*SETS, *TORCHVISION_NAMES)
BESIDE = "no class of this kind of data set"
Row = tuple[str, str, str]  # path, class, split


def open_source(
    data: str | os.PathLike[str],
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    streaming: bool = False,
    for_evaluation: bool = False,
) -> Source:
    """The data set that `data` names: `wds:FOLDER` of shards, `hf:NAME`, a folder, a CSV file or one of SOURCE_NAMES.

    `data_dir` (default ./data) is where the files of the torchvision sets are, or are downloaded to. for_evaluation:
    nothing is learnt from it, so that one class is enough.
    """
    data = path_text(data, "data", "a folder, a CSV file or the name of a data set")
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
        return _open_folder(path, for_evaluation)
    if os.path.isfile(path):
        if path.suffix.lower() in (".csv", ".tsv"):
            rows = read_rows(path)
            modality = _modality_of(rows)
            return _source_of_files(path.stem, path, modality, rows, Skips(), for_evaluation)
        raise UsageError("a data set is a folder, a .csv file or a known name", where=data)
    name = data.lower()
    if name in SETS:
        return SETS[name]()
    if name in TORCHVISION_NAMES:
        return open_torchvision(name, Path(os.path.expanduser(data_dir or "data")), download)
    known = "a source is a folder with a folder for each class, a .csv file, or one of " + ", ".join(
        SOURCE_NAMES
    )
    if near_here := near_paths(path):
        hint = f"did you mean {' or '.join(map(readable, near_here))}?"
        raise UsageError("no such folder or file", where=data, hint=hint)
    if not data or data.startswith((".", "~")) or "/" in data or os.sep in data or path.suffix:
        raise UsageError("no such folder or file", where=data or "an empty name", hint=known)
    near = difflib.get_close_matches(name.replace("-", "").replace("_", ""), SOURCE_NAMES, n=1)
    hint = f"did you mean {near[0]}? {known}" if near else known
    raise UsageError(f"no folder here and no data set is called '{data}'", hint=hint)


def _open_folder(root: Path, for_evaluation: bool) -> Source:
    if is_own(root):
        hint = "name the folder of the data; `mixlab evaluate RUN` measures a run on its own data"
        raise DataError("this folder was written by mixlab, it is no data set", where=str(root), hint=hint)
    skips, modality = Skips(), modality_in(root)
    splits = _split_folders(root, modality, skips)
    rows: list[Row] = []
    empty: list[str] = []
    for split, folder in (splits or {"all": root}).items():
        # While the root's own folders were looked at, `skips` had them already.
        classes = subfolders(folder, skips if splits else None)
        for path in [path for path in classes if path.name in modality.beside]:
            skips.add(BESIDE, path)
            classes.remove(path)
        loose = files_in(folder, modality, skips)
        looked_at = {path: _files_of(path, modality, skips) for path in classes}
        found = {path: files for path, files in looked_at.items() if files is not None}
        if not found:
            many = modality.many
            text = (
                f"{len(loose)} {many} without class folders" if loose else f"no class folders and no {many}"
            )
            raise DataError(text, where=str(folder), hint=_LAYOUT)
        for file in loose:
            skips.add(LOOSE, file)
        _refuse_one_name_for_two(found, folder)
        rows += [
            (file, unicodedata.normalize("NFC", path.name), split)
            for path, files in found.items()
            for file in files
        ]
        if not (for_evaluation or split in ("val", "test")):
            empty += [os.path.relpath(path, root) for path, files in found.items() if not files]
    if not rows:
        raise DataError(f"no {modality.many} in any class folder", where=str(root), hint=_LAYOUT)
    if not splits:
        rows = _split_by_lists(rows, root, modality)
    if empty:
        raise DataError(
            f"class folders without {modality.many}: {_some(empty)}",
            where=str(root),
            hint="remove them or fill them",
        )
    return _source_of_files(root.resolve().name, root, modality, rows, skips, for_evaluation)


def _split_by_lists(rows: list[Row], root: Path, modality: Modality) -> list[Row]:
    """The rows with the splits that lists in the root name, all others in train; as they are where there is no list.

    DataError for a list that names no file of the folder.
    """
    split_of: dict[str, str] = {}
    for name, split in modality.split_lists.items():
        if not (root / name).is_file():
            continue
        text = read_bytes(root / name, MAX_TABLE_BYTES, follow=True).decode("utf-8", errors="replace")
        listed = {os.path.normpath(root / line.strip()): split for line in text.splitlines() if line.strip()}
        if not any(os.path.normpath(path) in listed for path, _, _ in rows):
            raise DataError("none of the files that it lists is here", where=str(root / name))
        split_of |= listed
    if not split_of:
        return rows
    return [(path, label, split_of.get(os.path.normpath(path), "train")) for path, label, _ in rows]


def _split_folders(root: Path, modality: Modality, skips: Skips) -> dict[str, Path]:
    """The folders that are splits, by split; empty where the folders are classes. DataError where it is unclear.

    A folder called train that holds files and no folders is a class, if there are other classes.
    """
    folders = subfolders(root, skips)
    named = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    if not named:
        return {}
    others = [f for f in folders if f not in named and files_below(f, modality)]
    if others and not any(subfolders(folder) for folder in named):
        return {}
    splits: dict[str, Path] = {}
    for folder in named:
        split = SPLIT_NAMES[folder.name.lower()]
        if split in splits:
            raise DataError(
                f"{splits[split].name} and {folder.name} are both the {split} split", where=str(root)
            )
        splits[split] = folder
    if splits and others:
        classes = _some(dict.fromkeys(path.name for folder in named for path in subfolders(folder)))
        raise DataError(
            f"both split folders ({_some(f.name for f in named)}) and others ({_some(f.name for f in others)})",
            where=str(root),
            hint=f"if they are splits, of the classes {classes}, move the others away; if all are classes, list the "
            "files in a CSV file (path,label)",
        )
    return splits


def _files_of(folder: Path, modality: Modality, skips: Skips) -> list[str] | None:
    """The examples of a class folder; None if there is nothing in it but what mixlab or a system wrote."""
    inside = Skips()
    files = files_below(folder, modality, inside)
    skips.update(inside)
    is_others = bool(inside.counts) and inside.counts.keys() <= {OWN, SYSTEM, HIDDEN}
    return None if not files and is_others else files


def _refuse_one_name_for_two(folders: Iterable[Path], where: Path) -> None:
    """Class folders whose names differ only in the coding of accents; also checks each name."""
    seen: dict[str, Path] = {}
    for folder in folders:
        name = clean_name(folder.name, where=str(where))
        if seen.setdefault(name, folder) != folder:
            raise DataError(
                f"two folders are called '{name}', in two codings of accents",
                where=str(where),
                hint="join them",
            )


def _source_of_files(
    name: str, root: Path, modality: Modality, rows: Sequence[Row], skips: Skips, for_evaluation: bool
) -> Source:
    """A source from (path, class, split), once its classes make sense."""
    if not rows:
        raise DataError(f"no {modality.many}", where=str(root))
    class_names = tuple(sorted({label for _, label, _ in rows}))
    if len(class_names) == 1 and not for_evaluation:
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
        if trained and unknown and not for_evaluation:
            raise DataError(f"classes in {split} that are not in train: {_some(unknown)}", where=str(root))
    index = {label: i for i, label in enumerate(class_names)}
    splits = {}
    for split, part in by_split.items():
        if part:
            paths = tuple(path for path, _, _ in part)
            names = tuple(readable(path) for path in paths)
            labels = np.array([index[label] for _, label, _ in part], dtype=np.int64)
            splits[split] = Split(names=names, labels=labels, paths=None if names == paths else paths)
    return Source(
        name=name,
        class_names=class_names,
        splits=splits,
        modality=modality,
        root=root,
        skipped=skips.result(),
    )


def _modality_of(rows: Sequence[Row]) -> Modality:
    """What kind of example most of the files in a CSV file are, by their names; the first kind, if none."""
    suffixes = [os.path.splitext(path)[1].lower() for path, _, _ in rows]
    return max(MODALITIES.values(), key=lambda one: sum(suffix in one.suffixes for suffix in suffixes))


def _some(names: Iterable[str]) -> str:
    shown = [readable(name) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")

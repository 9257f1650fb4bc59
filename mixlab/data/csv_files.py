"""CSV files: a data set as path,label[,split] in whatever dialect and coding, and the record of a run's splits."""

import csv
import io
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mixlab.data.dataset import SPLIT_NAMES, Split
from mixlab.errors import DataError, WeightsError
from mixlab.escape import is_plain, readable, restored
from mixlab.files import write_atomically
from mixlab.records import MAX_TABLE_BYTES, read_bytes

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_rows(path: Path) -> list[tuple[str, str, str]]:
    """(path of the image, label, split or `all`) of every row of a data set's CSV file; a repeated row counts once.

    Paths are relative to the file. DataError names the line of what cannot be used.
    """
    rows: dict[str, tuple[str, str]] = {}
    lines: dict[str, int] = {}
    for line, row in csv_rows(path, ("path", "label")):
        where = f"{path}, line {line}"
        label = row["label"].strip()
        if not row["path"].strip() or not label:
            raise DataError("the path or the label is empty", where=where)
        if not is_plain(label):
            raise DataError(f"a control character or line break in {readable(label)}", where=where)
        split = row.get("split", "all").strip().lower()
        if split not in SPLIT_NAMES and split != "all":
            raise DataError(f"unknown split '{split}'", where=where, hint="use train, val or test")
        image = _image_path(path.parent, row["path"])
        entry = (unicodedata.normalize("NFC", label), SPLIT_NAMES.get(split, split))
        if rows.setdefault(image, entry) != entry:
            raise DataError(f"{row['path']} has another label or split in line {lines[image]}", where=where)
        lines.setdefault(image, line)
    splits = {split for _, split in rows.values()}
    if len(splits) > 1 and "all" in splits:
        raise DataError(
            "the split 'all' stands beside others", where=str(path), hint="use train, val or test"
        )
    return [(image, *entry) for image, entry in rows.items()]


def _image_path(folder: Path, written: str) -> str:
    """Spaces round a path are the table's, and escapes are its writer's, unless a file has them in its name."""
    exact = os.path.normpath(os.path.join(folder, written))
    if (written == written.strip() and "\\" not in written) or os.path.exists(exact):
        return exact
    stripped = os.path.normpath(os.path.join(folder, written.strip()))
    plain = restored(stripped)
    return plain if plain != stripped and os.path.exists(plain) else stripped


def csv_rows(
    path: Path, columns: Sequence[str], *, keeps_bytes: bool = False
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of each row, by lower-case column name.

    The separator is the one by which the first line has `columns`; UTF-8 and UTF-16 are read. DataError for others.
    keeps_bytes: what is no UTF-8 comes as surrogates, as in names of files.
    """
    try:
        # Of a run's own record no link is followed; a person may name one.
        data = read_bytes(path, MAX_TABLE_BYTES, follow=not keeps_bytes)
    except WeightsError as error:
        raise DataError(f"the CSV file cannot be read: {error.message}", where=str(path)) from None
    text = _decoded(data, path, keeps_bytes)
    skipped = 0
    if text[:4].lower() == "sep=":  # Excel's own first line
        text, skipped = text.partition("\n")[2], 1
    separator, header = _header(text, columns, path)
    reader = csv.reader(
        io.StringIO(text), delimiter=separator, strict=True, skipinitialspace=separator != "\t"
    )
    try:
        next(reader, None)
        for fields in reader:
            if not fields or fields == [""]:
                continue
            line = reader.line_num + skipped
            if len(fields) != len(header):
                raise DataError(
                    f"{len(fields)} fields, but the header has {len(header)}",
                    where=f"{path}, line {line}",
                    hint=f"put a text with {_SEPARATORS[separator]} in quotes",
                )
            yield line, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(
            f"the CSV file cannot be read: {error}", where=f"{path}, line {reader.line_num + skipped}"
        ) from None


def _header(text: str, columns: Sequence[str], path: Path) -> tuple[str, list[str]]:
    """The separator of a table and the names of its columns, in lower case."""
    names: list[str] = []
    for separator in _SEPARATORS:
        reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        found = [name.strip().lower() for name in next(reader, [])]
        if set(columns) <= set(found):
            return separator, found
        names = max(names, found, key=lambda found: len(set(columns) & set(found)))
    missing = next(name for name in columns if name not in names)
    raise DataError(
        f"no column '{missing}'",
        where=f"{path}, line 1",
        hint="the first line must be path,label or path,label,split; commas, semicolons, tabs and bars are known",
    )


def _decoded(data: bytes, path: Path, keeps_bytes: bool) -> str:
    """The text of a CSV file in UTF-8 or UTF-16. DataError with line and bytes for other codings."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        coding = "utf-16"
    else:
        coding = "utf-8-sig"
    try:
        return data.decode(coding, "surrogateescape" if keeps_bytes else "strict")
    except UnicodeDecodeError as error:
        if coding == "utf-16":
            raise DataError("the CSV file is no whole UTF-16 text", where=str(path)) from None
        line = data.count(b"\n", 0, error.start) + 1
        row = data[data.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0].strip()
        raise DataError(
            f"not in UTF-8: {readable(row[:80].decode('utf-8', 'surrogateescape'))}",
            where=f"{path}, line {line}",
            hint="save it as UTF-8 (Excel: CSV UTF-8), or run `iconv -f WINDOWS-1252 -t UTF-8`, or from what it is",
        ) from None


# The record of a run's splits


def write_split_csv(
    splits: Mapping[str, Split],
    class_names: Sequence[str],
    path: str | Path,
    digests: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write `path,label,split,digest` for every image; file paths are absolute, so that it is a source too.

    digests: of each split's images (`copies.array_digest`), empty where one is not known.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "split", "digest"))
    for name, split in splits.items():
        known = digests[name] if digests is not None else [""] * len(split)
        for image, label, digest in zip(split.names, split.labels, known, strict=True):
            writer.writerow(
                (os.path.abspath(image) if split.has_files else image, class_names[label], name, digest)
            )
    write_atomically(Path(path), text.getvalue().encode("utf-8", errors="surrogateescape"))


def read_split_csv(path: str | Path) -> dict[str, list[str]]:
    """The image names of each split, as `write_split_csv` wrote them."""
    return {split: [name for name, _ in rows] for split, rows in read_record(path).items()}


def read_record(path: str | Path) -> dict[str, list[tuple[str, str]]]:
    """Name and digest of each split's images; the digest is empty where the run did not know it (older versions).

    DataError if there is no training split.
    """
    record: dict[str, list[tuple[str, str]]] = {}
    for _, row in csv_rows(Path(path), ("path", "label", "split"), keeps_bytes=True):
        record.setdefault(row["split"], []).append((row["path"], row.get("digest", "")))
    if "train" not in record:
        raise DataError(
            "it names no image of the train split, and a run has some",
            where=str(path),
            hint="bring the file back as the run wrote it",
        )
    return record

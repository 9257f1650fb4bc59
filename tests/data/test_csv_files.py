"""CSV files of other programs: separators, codings, spaces, and what is refused with line and bytes."""

from pathlib import Path

import pytest

from mixlab.data.csv_files import read_rows
from mixlab.data.sources import open_source
from mixlab.errors import DataError
from mixlab.escape import is_plain

ROWS = [("1.png", "a"), ("2.png", "b"), ("sub folder/3.png", "c, d")]
PLAIN = "path,label\n" + "".join(f'{path},"{label}"\n' for path, label in ROWS)


def found(path: Path) -> list[tuple[str, str]]:
    return [(str(Path(image).relative_to(path.parent)), label) for image, label, _ in read_rows(path)]


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        PLAIN.replace("\n", "\r\n").encode("utf-16-le").join([b"\xff\xfe", b""]),
        PLAIN.replace("\n", "\r\n").encode(),
        ("path, label\n" + "".join(f' {path} , "{label}"\n' for path, label in ROWS)).encode(),
        ("path;label\n" + "".join(f"{path};{label}\n" for path, label in ROWS)).encode(),
        ("sep=;\npath;label\n" + "".join(f"{path};{label}\n" for path, label in ROWS)).encode(),
        ("path\tlabel\n" + "".join(f"{path}\t{label}\n" for path, label in ROWS)).encode(),
        ("label|path\n" + "".join(f"{label}|{path}\n" for path, label in ROWS)).encode(),
    ],
    ids=["plain", "bom", "utf-16", "utf-16-le", "crlf", "spaces", "semicolons", "excel-sep", "tabs", "bars"],
)
def test_the_same_rows_are_read_from_every_dialect(tmp_path, content):
    (tmp_path / "set.csv").write_bytes(content)
    assert found(tmp_path / "set.csv") == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "path,label\n1.png,a\n2.png,café\n".encode("cp1252"),
            r"not in UTF-8: 2.png,caf\\xe9 .*line 3.*save it as UTF-8",
        ),
        ("path,label\n1.png,강아지\n".encode("cp949"), r"not in UTF-8.*line 2"),
        (b"\xff\xfep\0a\0t", "no whole UTF-16 text"),
        (b"path:label\n1.png:a\n", "no column 'path'.*commas, semicolons, tabs and bars are known"),
        (b"path;label\n1.png;a;b\n", "3 fields, but the header has 2.*text with semicolons in quotes"),
        (b'path,label\n1.png,"a\nb"\n', r"line break in a\\x0ab.*line 3"),
    ],
)
def test_a_table_that_cannot_be_read_says_where_and_what(tmp_path, content, message):
    (tmp_path / "set.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / "set.csv")
    assert is_plain(caught.value.message)


def test_a_file_with_spaces_in_its_name_is_still_found(tmp_path):
    (tmp_path / " 1.png").touch()
    (tmp_path / "set.csv").write_text('path,label\n" 1.png",a\n 2.png ,b\n')
    assert [path for path, _ in found(tmp_path / "set.csv")] == [" 1.png", "2.png"]
    (tmp_path / "set.csv").write_text("path\tlabel\n 1.png\ta\n 2.png \tb\n")
    assert [path for path, _ in found(tmp_path / "set.csv")] == [" 1.png", "2.png"]


def test_labels_in_two_codings_of_accents_are_one_class(tmp_path):
    (tmp_path / "set.tsv").write_text("path\tlabel\n1.png\tcaf\u00e9\n2.png\tcafe\u0301\n3.png\tthe\n")
    assert open_source(str(tmp_path / "set.tsv")).class_names == ("café", "the")

"""Records out of hostile files: refused with file and key, never hung on, never taken into memory whole."""

import os
import time

import pytest

from mixlab.errors import WeightsError
from mixlab.records import MAX_JSON_BYTES, read_json, read_table, read_toml, take, take_list


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": {"b": 1e999}}', r"a\.b is inf"),
        (b'{"a": 1' + b"0" * 30 + b"}", "a is larger than any number"),
        (b'{"a": 1' + b"0" * 9000 + b"}", "cannot be read"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than 32 deep"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"a": [' + b"[]," * 2_100_000 + b"0]}", "too many values"),
        (b" " * (MAX_JSON_BYTES + 1), "more than the"),
    ],
)
def test_json_beyond_the_limits_is_refused_with_the_file_and_the_key(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        read_json(tmp_path / "a.json")
    assert "a.json" in error.value.where


@pytest.mark.parametrize(
    "content",
    [
        b"a = nan",
        b"a = 1" + b"0" * 50,
        b"a = " + b"[" * 5000,
        b"a" + b".a" * 20_000 + b" = 1",
        b"a = 1979-05-27",
        b"a = ",
    ],
)
def test_toml_beyond_the_limits_is_refused_soon(content, tmp_path):
    (tmp_path / "a.toml").write_bytes(content)
    began = time.monotonic()
    with pytest.raises(WeightsError, match=r"a\.toml"):
        read_toml(tmp_path / "a.toml")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "content", [b"label\na\n", b"path,label\na\n", b"path,label\n" + b"x" * 200_000 + b",b\n", b""]
)
def test_a_table_without_its_columns_or_fields_is_refused(content, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(WeightsError, match=r"a\.csv"):
        read_table(tmp_path / "a.csv", ("path", "label"))


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "long\0name").name  # noqa: B018
    for name in ("pipe", "folder", "link", "nothing", "long\0name"):
        with pytest.raises(WeightsError):
            read_json(tmp_path / name)
    with pytest.raises(WeightsError, match="no regular file"):
        read_json(tmp_path / "link", follow=True)


def test_a_value_of_another_type_is_named_with_its_key():
    record = {"a": 1, "b": True, "c": "x", "d": [1, "y"], "e": None}
    assert take(record, "a", float, "f") == 1.0
    assert take(record, "e", int, "f", optional=True) is None
    for key, kind, message in (
        ("b", int, "b must be a whole number, got True"),
        ("c", dict, "c must be an object, got 'x'"),
        ("z", int, "'z' is missing"),
        ("e", str, "e must be text, got None"),
    ):
        with pytest.raises(WeightsError, match=message):
            take(record, key, kind, "f")
    with pytest.raises(WeightsError, match="a is 1, not between 2 and 3"):
        take(record, "a", int, "f", low=2, high=3)
    with pytest.raises(WeightsError, match="d must be a whole number, got 'y'"):
        take_list(record, "d", int, "f")

import json

import numpy as np
import pytest
from PIL import Image

from mixlab.data import check as check_module
from mixlab.data.check import check
from mixlab.data.sources import open_source


def save(path, color, size=(8, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "train/a/1.png", (1, 2, 3))
    save(tmp_path / "train/a/2.png", (4, 5, 6), size=(20, 10))
    save(tmp_path / "train/a/copy.bmp", (1, 2, 3))
    save(tmp_path / "train/b/1.png", (7, 8, 9))
    save(tmp_path / "train/b/grey.png", 50, mode="L")
    save(tmp_path / "test/a/leak.tif", (4, 5, 6), size=(20, 10))
    save(tmp_path / "test/b/wrong.png", (1, 2, 3))
    save(tmp_path / "test/b/other_shape.png", (1, 2, 3), size=(6, 8))
    (tmp_path / "train/b/empty.jpg").touch()
    (tmp_path / "test/b/gone.jpg").symlink_to("nowhere.jpg")
    return tmp_path


def test_everything_that_is_wrong_is_found(folder):
    result = check(open_source(str(folder)))
    assert (result.num_ok, result.num_bad) == (8, 2)
    assert {row["path"]: row["reason"] for row in result.bad} == {
        str(folder / "train/b/empty.jpg"): "the file is empty",
        str(folder / "test/b/gone.jpg"): "a link to a missing file",
    }
    assert result.classes == {"a": {"train": 3, "test": 1}, "b": {"train": 2, "test": 2}}
    assert result.facts["sizes"] == {
        "width": {"min": 6, "median": 8.0, "max": 20},
        "height": {"min": 6, "median": 6.0, "max": 10},
        "most_common": [8, 6],
    }
    assert result.facts["modes"] == {"RGB": 7, "L": 1}
    assert result.facts["formats"] == {"PNG": 6, "BMP": 1, "TIFF": 1}
    one = [str(folder / p) for p in ("train/a/1.png", "train/a/copy.bmp", "test/b/wrong.png")]
    two = [str(folder / p) for p in ("train/a/2.png", "test/a/leak.tif")]
    assert result.duplicates == [
        {"paths": one, "splits": ["train", "train", "test"]},
        {"paths": two, "splits": ["train", "test"]},
    ]
    assert result.duplicates_within == [{"paths": one[:2], "split": "train"}]
    assert result.num_duplicates_within == 1
    assert result.conflicts == [{"paths": one, "labels": ["a", "a", "b"]}]


def test_the_report_is_plain_json_and_starts_with_the_counts(folder):
    report = check(open_source(str(folder))).to_json()
    assert list(report)[:4] == ["num_ok", "num_bad", "bad", "classes"]
    assert json.loads(json.dumps(report)) == report


def test_progress_is_told_and_ends_at_the_total(folder, monkeypatch):
    monkeypatch.setattr(check_module, "_BATCH", 3)
    calls = []
    whole = check(open_source(str(folder)), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 10), (6, 10), (9, 10), (10, 10)]
    monkeypatch.undo()
    assert check(open_source(str(folder))) == whole


def test_pixels_in_memory_are_checked_too():
    result = check(open_source("digits"))
    assert (result.num_ok, result.num_bad) == (1797, 0)
    assert result.facts["modes"] == {"L": 1797}
    assert result.facts["formats"] == {"memory": 1797}
    assert result.facts["sizes"]["most_common"] == [8, 8]
    assert sum(sum(counts.values()) for counts in result.classes.values()) == 1797


def test_identical_pixels_in_two_splits_name_split_and_index():
    source = open_source("digits")
    train, test = source.splits["train"], source.splits["test"]
    test.arrays[0] = train.arrays[0]
    result = check(source)
    assert result.duplicates[0]["paths"] == [f"train {train.names[0]}", f"test {test.names[0]}"]


def test_a_source_without_a_readable_image_is_reported_and_not_an_error(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(np.random.default_rng(0).bytes(100))
    result = check(open_source(str(tmp_path)))
    assert (result.num_ok, result.num_bad, result.facts["sizes"]) == (0, 2, {})

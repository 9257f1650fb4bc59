import csv
import os

import numpy as np
import pytest
from PIL import Image

from mixlab.data.csv_files import read_split_csv, write_split_csv
from mixlab.data.dataset import Split
from mixlab.data.sources import SOURCE_NAMES, open_source
from mixlab.errors import DataError, DiskError, MixlabError, UsageError


def fill(root, *paths):
    """Files with these paths below root; what they hold does not matter to a source."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return str(root)


def names_below(root, split):
    return [os.path.relpath(name, root) for name in split.names]


def test_class_folders_give_one_split(tmp_path):
    data = fill(
        tmp_path, "dog/2.jpg", "cat/b.PNG", "cat/a.webp", "dog/notes.txt", "cat/._a.jpg", "cat/Thumbs.db"
    )
    source = open_source(data)
    assert source.class_names == ("cat", "dog")
    assert list(source.splits) == ["all"]
    assert names_below(tmp_path, source.splits["all"]) == ["cat/a.webp", "cat/b.PNG", "dog/2.jpg"]
    assert source.splits["all"].labels.tolist() == [0, 0, 1]
    assert source.splits["all"].labels.dtype == np.int64
    assert source.root == tmp_path
    assert source.name == tmp_path.name


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Train", "VALIDATION"), ("TRAIN", "valid")])
def test_split_folders_are_found_under_any_of_their_names(tmp_path, train, val):
    data = fill(tmp_path, *(f"{s}/{c}/1.jpg" for s in (train, val, "Test") for c in "ab"), "extra/readme.txt")
    assert list(open_source(data).splits) == ["train", "val", "test"]


def test_a_test_folder_alone_is_a_source(tmp_path):
    assert list(open_source(fill(tmp_path, "test/a/1.jpg", "test/b/1.jpg")).splits) == ["test"]


def test_subfolders_are_walked_in_order_and_link_loops_end(tmp_path):
    data = fill(tmp_path, "a/z/1.jpg", "a/b/2.jpg", "a/.cache/3.jpg", "b/1.jpg")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "folder.jpg").mkdir()
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    split = open_source(data).splits["all"]
    assert names_below(tmp_path, split) == ["a/b/2.jpg", "a/gone.jpg", "a/z/1.jpg", "b/1.jpg"]


def test_a_class_folder_may_be_a_link(tmp_path):
    fill(tmp_path, "elsewhere/1.jpg", "set/a/1.jpg")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    assert open_source(str(tmp_path / "set")).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "no class folders and no images.*FOLDER/CLASS/FILE"),
        (["1.jpg", "2.jpg"], "2 images without class folders.*FOLDER/CLASS/FILE"),
        (["a/1.txt", "b/2.txt"], "no images in any class folder"),
        (["a/1.jpg"], "only one class, a"),
        (["a/1.jpg", "A/1.jpg"], "'A' and 'a' differ only in case"),
        (["caf\u00e9/1.jpg", "cafe\u0301/1.jpg"], "accents"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg"], "in val that are not in train: c"),
        (["a/1.jpg", "b/1.txt", "c/1.txt", "d/1.jpg"], "without images: b, c"),
        (["train/a/1.jpg", "train/b/1.txt", "test/a/1.jpg"], "without images: train/b"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg"], "1 images without class folders"),
        (["train/a/1.jpg", "Train/b/1.jpg"], "both the train split"),
        (["test/a/1.jpg", "test/b/1.jpg", "cat/1.jpg"], r"both split folders \(test\) and others \(cat\)"),
        (["Testing/a/1.jpg", "cat/1.jpg"], "if they are splits, of the classes a.*if all are classes, list"),
        (["recipe.toml", "environment.json", "a/1.jpg"], "written by mixlab, it is no data set"),
    ],
)
def test_a_folder_that_is_no_data_set_is_explained(tmp_path, paths, message):
    with pytest.raises(DataError, match=message):
        open_source(fill(tmp_path, *paths))


def write_rows(path, *lines, encoding="utf-8"):
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return str(path)


def test_a_csv_file_names_images_relative_to_itself(tmp_path):
    data = write_rows(
        tmp_path / "set.csv", "path,label", "x/1.jpg,dog", "", '"a,b.jpg", cat', "/abs/3.jpg,dog"
    )
    source = open_source(data)
    assert source.class_names == ("cat", "dog")
    assert source.splits["all"].names == (str(tmp_path / "x/1.jpg"), str(tmp_path / "a,b.jpg"), "/abs/3.jpg")
    assert source.splits["all"].labels.tolist() == [1, 0, 1]
    assert source.name == "set"


def test_a_csv_file_of_a_spreadsheet_with_splits_is_read(tmp_path):
    lines = [
        "Path,Label,Split,note",
        "1.jpg,a,Train,x",
        "2.jpg,b,train,",
        "3.jpg,a,validation,",
        "4.jpg,b,test,",
    ]
    data = write_rows(tmp_path / "set.CSV", *lines, encoding="utf-8-sig")
    assert {name: len(split) for name, split in open_source(data).splits.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }


def test_a_row_that_is_repeated_counts_once(tmp_path):
    data = write_rows(tmp_path / "set.csv", "path,label", "1.jpg,a", "./1.jpg,a", "2.jpg,b")
    assert len(open_source(data).splits["all"]) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "1.jpg,a"], "no column 'path'.*line 1"),
        (["path,class", "1.jpg,a"], "no column 'label'.*line 1"),
        ([""], "no column"),
        (["path,label"], "no images"),
        (["path,label", "1.jpg,a", "2.jpg"], "1 fields, but the header has 2.*line 3"),
        (["path,label", "1.jpg,a", "2.jpg, "], "empty.*line 3"),
        (["path,label,split", "1.jpg,a,train", "2.jpg,b,devel"], "unknown split 'devel'.*line 3"),
        (["path,label", "1.jpg,a", "2.jpg,b", "1.jpg,b"], "another label or split in line 2.*line 4"),
        (["path,label,split", "1.jpg,a,train", "1.jpg,a,test"], "another label or split in line 2"),
        (["path,label,split", "1.jpg,a,train", "2.jpg,b,all"], "'all' stands beside others"),
        (["path,label", "1.jpg,a", "2.jpg,a"], "only one class"),
        (["path,label", "1.jpg,a", "2.jpg,A"], "differ only in case"),
        (["path,label", '1.jpg,"a'], "cannot be read"),
    ],
)
def test_a_csv_file_that_is_no_data_set_is_explained(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        open_source(write_rows(tmp_path / "set.csv", *lines))


@pytest.mark.parametrize(
    "data", ["./missing", "~/missing-folder", "a/b", "photos.v2", "/no/such", "x.csv", ""]
)
def test_a_missing_path_is_a_usage_error(data):
    with pytest.raises(UsageError, match="no such folder or file"):
        open_source(data)


@pytest.mark.parametrize(
    ("data", "near"), [("cifar-10", "cifar10"), ("fashion-mnist", "fashionmnist"), ("digit", "digits")]
)
def test_a_misspelt_name_is_answered_with_the_nearest_one(data, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"did you mean {near}") as caught:
        open_source(data)
    assert all(name in str(caught.value) for name in SOURCE_NAMES)


def test_a_file_that_is_no_csv_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"a folder, a \.csv file or a known name"):
        open_source(fill(tmp_path, "a.txt") + "/a.txt")


ODD_NAMES = [
    " two  spaces.png",
    "line\nbreak.png",
    "a,\"b\";'c'\t.png",
    "-rf *.png",
    "caf\u00e9.png",
    "cr\r.png",
]


def test_a_written_split_is_a_source_with_the_same_images(tmp_path, monkeypatch):
    names = [*ODD_NAMES, os.fsdecode(b"latin1_\xe9.png")]
    fill(tmp_path, *(f"set/{c}/{name}" for c in ("a", "b") for name in names))
    monkeypatch.chdir(tmp_path)
    source = open_source("set")
    everything = source.splits["all"]
    parts = {"train": everything.take(np.arange(1, 14)), "test": everything.take(np.array([0]))}
    write_split_csv(parts, source.class_names, "split.csv")
    monkeypatch.chdir("/")
    again = open_source(str(tmp_path / "split.csv"))
    assert again.class_names == ("a", "b")
    for name, part in parts.items():
        assert again.splits[name].names == tuple(str(tmp_path / path) for path in part.names)
        opened = again.splits[name].paths or again.splits[name].names
        assert all(os.path.exists(path) for path in opened)
        assert again.splits[name].labels.tolist() == part.labels.tolist()
    assert read_split_csv(tmp_path / "split.csv") == {n: list(s.names) for n, s in again.splits.items()}


def test_a_written_split_of_pixels_keeps_its_names(tmp_path):
    split = Split(
        names=("index 3", "index 1"), labels=np.array([1, 0]), arrays=np.zeros((2, 1, 1, 1), np.uint8)
    )
    write_split_csv({"train": split}, ("no", "yes"), tmp_path / "split.csv")
    with open(tmp_path / "split.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["index 3", "yes", "train", ""], ["index 1", "no", "train", ""]]
    assert read_split_csv(tmp_path / "split.csv") == {"train": ["index 3", "index 1"]}


def test_a_split_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    split = Split(names=("index 0",), labels=np.array([0]), arrays=np.zeros((1, 1, 1, 1), np.uint8))
    write_split_csv({"train": split}, ("a",), tmp_path / "split.csv")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="No space left"):
        write_split_csv({"test": split}, ("a",), tmp_path / "split.csv")
    assert list(read_split_csv(tmp_path / "split.csv")) == ["train"]
    assert os.listdir(tmp_path) == ["split.csv"]
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(DiskError):
        write_split_csv({"test": split}, ("a",), tmp_path / "file" / "split.csv")
    with pytest.raises(MixlabError, match="cannot be read"):
        read_split_csv(tmp_path / "none.csv")


def test_an_unreadable_class_folder_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    data = fill(tmp_path, "a/1.jpg", "b/1.jpg")
    Image.new("RGB", (1, 1)).save(tmp_path / "a" / "2.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        open_source(data)


def test_a_mistyped_folder_is_answered_with_what_lies_beside(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=r"did you mean .*/photos"):
        open_source(tmp_path / "fotos")

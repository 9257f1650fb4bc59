import gzip
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mixlab.data.images import known
from mixlab.data.images.known import TORCHVISION_NAMES, open_torchvision
from mixlab.data.sources import open_source
from mixlab.errors import DataError


def test_digits_are_pixels_split_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_source("digits")
    assert source.class_names == tuple("0123456789")
    assert source.root is None
    sizes = {name: len(split) for name, split in source.splits.items()}
    assert sum(sizes.values()) == 1797
    assert all(abs(sizes[n] - f * 1797) < 5 for n, f in (("train", 0.6), ("val", 0.2), ("test", 0.2)))
    assert len({name for split in source.splits.values() for name in split.names}) == 1797
    pixels = source.splits["train"].arrays
    assert (pixels.dtype, pixels.shape[1:], pixels.max()) == (np.uint8, (8, 8, 1), 255)
    assert open_source("Digits").splits["test"].names == source.splits["test"].names


def test_digits_are_those_that_scikit_learn_gives(monkeypatch):
    table = known._digits_table()
    digits = load_digits()
    np.testing.assert_array_equal(table[:, :-1], digits.data)
    np.testing.assert_array_equal(table[:, -1], digits.target)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as if another version kept the file elsewhere
    np.testing.assert_array_equal(known._digits_table(), table)


def write_mnist(root):
    root.mkdir(parents=True)
    for part, n in (("train", 6), ("t10k", 4)):
        pixels = np.arange(n * 4, dtype=np.uint8).tobytes()
        (root / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 2, 2) + pixels)
        labels = bytes(i % 10 for i in range(n))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels)


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_mnist_and_its_kin_are_read_from_their_files(tmp_path, name, folder):
    write_mnist(tmp_path / folder / "raw")
    source = open_source(name, data_dir=tmp_path)
    assert len(source.class_names) == 10
    train = source.splits["train"]
    assert (train.arrays.shape, train.arrays.dtype, train.labels.dtype) == ((6, 2, 2, 1), np.uint8, np.int64)
    assert train.arrays[1].ravel().tolist() == [4, 5, 6, 7]
    assert source.splits["test"].names == tuple(f"test index {i}" for i in range(4))


def test_sets_of_other_axes_and_attributes_become_the_same(tmp_path, monkeypatch):
    planes = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    made = {
        "CIFAR10": lambda root, **_: SimpleNamespace(
            data=planes.transpose(0, 2, 3, 1), targets=[1, 0], classes=["a", "b"]
        ),
        "SVHN": lambda root, **_: SimpleNamespace(data=planes, labels=np.array([3, 0])),
        "STL10": lambda root, **_: SimpleNamespace(
            data=planes, labels=np.array([1, 0], np.uint8), classes=["a", "b"]
        ),
    }
    for name, make in made.items():
        monkeypatch.setattr(f"torchvision.datasets.{name}", make)
        source = open_source(name.lower(), data_dir=tmp_path)
        assert np.array_equal(source.splits["train"].arrays, planes.transpose(0, 2, 3, 1))
        assert source.splits["test"].labels[1] == 0
        assert source.class_names == (("0", "1", "2", "3") if name == "SVHN" else ("a", "b"))


def test_sets_of_files_give_paths(tmp_path, monkeypatch):
    for path in ("Forest/1.jpg", "River/2.jpg"):
        (tmp_path / "eurosat/2750" / path).parent.mkdir(parents=True)
        (tmp_path / "eurosat/2750" / path).touch()
    source = open_source("eurosat", data_dir=tmp_path)
    assert source.class_names == ("Forest", "River")
    assert source.splits["all"].names[1].endswith("eurosat/2750/River/2.jpg")
    assert source.splits["all"].labels.tolist() == [0, 1]

    meta = tmp_path / "food-101" / "meta"
    meta.mkdir(parents=True)
    (tmp_path / "food-101" / "images").mkdir()
    for part in ("train", "test"):
        (meta / f"{part}.json").write_text(json.dumps({"pie": ["pie/1"], "cake": [f"cake/{part}", "cake/2"]}))
    source = open_source("food101", data_dir=tmp_path)
    assert source.class_names == ("cake", "pie")
    assert source.splits["test"].labels.tolist() == [1, 0, 0]
    assert source.splits["test"].names[1] == str(tmp_path / "food-101/images/cake/test.jpg")

    pets = tmp_path / "oxford-iiit-pet" / "annotations"
    pets.mkdir(parents=True)
    (tmp_path / "oxford-iiit-pet" / "images").mkdir()
    for part in ("trainval", "test"):
        (pets / f"{part}.txt").write_text("Abyssinian_100 1 1 1\nbasset_hound_3 2 2 1\n")
    source = open_source("oxfordiiitpet", data_dir=tmp_path)
    assert source.class_names == ("Abyssinian", "Basset Hound")
    assert source.splits["train"].names[1] == str(tmp_path / "oxford-iiit-pet/images/basset_hound_3.jpg")

    from scipy.io import savemat

    flowers = tmp_path / "flowers-102"
    (flowers / "jpg").mkdir(parents=True)
    savemat(flowers / "imagelabels.mat", {"labels": np.array([5, 102, 1, 2, 3, 4])})
    savemat(
        flowers / "setid.mat",
        {"trnid": np.array([2, 1]), "valid": np.array([3, 4]), "tstid": np.array([5, 6])},
    )
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    source = open_source("flowers102", data_dir=tmp_path)
    assert len(source.class_names) == 102
    assert source.splits["train"].labels.tolist() == [101, 4]
    assert source.splits["val"].names[0] == str(flowers / "jpg/image_00003.jpg")


def write_packed(folder):
    write_mnist(folder)
    for path in list(folder.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


@pytest.mark.parametrize("place", ["debian", "data_dir"])
def test_fashion_mnist_is_found_packed_as_debian_installs_it_and_equals_torchvisions(place, tmp_path):
    write_packed(tmp_path / place / "fashion-mnist")
    found = open_torchvision("fashionmnist", tmp_path / "data_dir", False, tmp_path / "debian")
    write_mnist(tmp_path / "plain" / "FashionMNIST" / "raw")
    expected = open_source("fashionmnist", data_dir=tmp_path / "plain")
    assert found.class_names == expected.class_names
    assert found.class_names[9] == "Ankle boot"
    for part, split in expected.splits.items():
        assert np.array_equal(found.splits[part].arrays, split.arrays)
        assert np.array_equal(found.splits[part].labels, split.labels)
        assert found.splits[part].names == split.names


def test_torchvisions_own_files_come_before_debians(tmp_path):
    write_packed(tmp_path / "fashion-mnist")
    (tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"broken")
    write_mnist(tmp_path / "sets" / "FashionMNIST" / "raw")
    found = open_torchvision("fashionmnist", tmp_path / "sets", False, tmp_path)
    assert len(found.splits["train"]) == 6
    with pytest.raises(DataError, match="cannot be read"):
        open_torchvision("fashionmnist", tmp_path / "nothing", False, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", gzip.compress(b"")[:-4], "cannot be read"),
        ("train-images-idx3-ubyte.gz", gzip.compress(struct.pack(">IIII", 0x803, 6, 2, 2)), "no whole IDX"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"ab"), "no whole IDX"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(struct.pack(">II", 0x803, 4) + b"1234"), "no whole IDX"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(struct.pack(">II", 0x801, 3) + b"123"), "4 images and 3"),
    ],
    ids=[
        "cut",
        "no pixels",
        "no header",
        "too few labels",
        "fewer labels than images",
    ],  # packed bytes hold the time
)
def test_a_damaged_packed_file_is_named(file, content, message, tmp_path):
    write_packed(tmp_path / "fashion-mnist")
    (tmp_path / "fashion-mnist" / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_source("fashionmnist", data_dir=tmp_path)
    assert file in caught.value.where


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_a_set_that_is_not_there_says_where_it_belongs_and_how_to_get_it(name, tmp_path):
    with pytest.raises(DataError, match="add --download") as caught:
        open_torchvision(name, tmp_path / "sets", False, tmp_path / "debian")
    assert str(tmp_path / "sets") in caught.value.where
    assert "download=True" not in str(caught.value)
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("name", ["cifar10", "mnist", "svhn", "food101"])
def test_a_download_without_network_says_where_to_put_the_files(name, tmp_path, monkeypatch):
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(DataError, match=r"could not be downloaded.*by hand") as caught:
        open_source(name, data_dir=tmp_path, download=True)
    assert "\n" not in str(caught.value)

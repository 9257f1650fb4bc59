"""What below a folder is an image, and what is left out with which reason."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixlab.data.images.formats import image_format
from mixlab.data.images.modality import IMAGES
from mixlab.data.listing import Skips, files_below, files_in
from mixlab.data.sources import open_source
from mixlab.errors import DataError
from mixlab.escape import is_plain, readable, restored
from mixlab.serving.predict import find_examples


def image(path: Path, format: str = "PNG", value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path)) + value).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format=format)


def listed(root: Path) -> tuple[list[str], dict[str, int]]:
    skips = Skips()
    return [os.path.relpath(path, root) for path in files_below(root, IMAGES, skips)], skips.counts


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_picture_is_found_by_its_content_whatever_its_name(tmp_path, format):
    for name in ("no_suffix", "photo.HEIC", "scan.dat", "IMG_1.JPG_original", "a.txt"):
        image(tmp_path / "a" / name, format)
    assert listed(tmp_path)[0] == [
        "a/IMG_1.JPG_original",
        "a/a.txt",
        "a/no_suffix",
        "a/photo.HEIC",
        "a/scan.dat",
    ]
    assert image_format((tmp_path / "a" / "no_suffix").read_bytes()[:16]) == format


def test_everything_else_is_counted_with_its_reason(tmp_path):
    image(tmp_path / "a" / "1.png")
    for name, content in {
        "notes.md": b"some words",
        "labels_utf16.csv": "é".encode("utf-16"),
        "clip.mp4": b"\0\0\0\x18ftypmp42",
        "model.pt": b"PK\3\4",
        "unknown": b"\0\1\2\3",
        ".DS_Store": b"x",
        "Thumbs.db": b"x",
        "desktop.ini": b"x",
    }.items():
        (tmp_path / "a" / name).write_bytes(content)
    os.mkfifo(tmp_path / "a" / "pipe")
    (tmp_path / "a" / "gone").symlink_to("nowhere")
    for folder in ("@eaDir", "__MACOSX", ".ipynb_checkpoints"):
        image(tmp_path / "a" / folder / "x.png")
    found, counts = listed(tmp_path)
    assert found == ["a/1.png"]
    assert counts == {
        "text": 2,
        "no image (.mp4)": 1,
        "no image (.pt)": 1,
        "of no known kind": 1,
        "hidden": 2,
        "of the system or another program": 4,
        "not a regular file": 1,
        "a link to a missing file": 1,
    }


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    image(tmp_path / "set" / "a" / "1.png")
    image(tmp_path / "more" / "2.png")
    (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "set" / "a" / "again").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "self").symlink_to(".")
    (tmp_path / "set" / "a" / "x.png").symlink_to("y.png")
    (tmp_path / "set" / "a" / "y.png").symlink_to("x.png")
    found, counts = listed(tmp_path / "set" / "a")
    assert [name for name in found if name not in ("x.png", "y.png")] == ["1.png", "more/2.png"]
    assert counts == {"a link to a folder that is read already": 3}


def test_check_train_evaluate_and_predict_see_the_same_pictures(tmp_path):
    for name in ("cat/1.png", "cat/deep/2", "dog/3.png", "dog/@eaDir/4.png", "cat/.hidden/5.png"):
        image(tmp_path / "set" / name)
    image(tmp_path / "elsewhere" / "6.png")
    (tmp_path / "set" / "dog" / "link").symlink_to(tmp_path / "elsewhere")
    split = open_source(str(tmp_path / "set")).splits["all"]
    assert list(split.names) == find_examples([str(tmp_path / "set")], IMAGES)
    assert len(split) == 4


def test_what_mixlab_wrote_is_never_data(tmp_path):
    for name in "ab":
        image(tmp_path / name / "1.png")
    image(tmp_path / "runs" / "one" / "figures" / "curves.png")
    for name in ("recipe.toml", "environment.json"):
        (tmp_path / "runs" / "one" / name).touch()
    image(tmp_path / "study" / "figures" / "curves.png")
    (tmp_path / "study" / "report.html").touch()
    image(tmp_path / "a" / "weights" / "card.png")
    for name in ("weights.safetensors", "config.json"):
        (tmp_path / "a" / "weights" / name).touch()
    source = open_source(str(tmp_path))
    assert source.class_names == ("a", "b")
    assert len(source) == 2
    assert {one.reason: one.count for one in source.skipped} == {"written by mixlab": 3}


def test_pictures_outside_the_class_folders_count_as_lost(tmp_path):
    for name in ("a/1.png", "b/1.png", "overview.png"):
        image(tmp_path / name)
    (tmp_path / "README.txt").write_text("words")
    source = open_source(str(tmp_path))
    assert source.lost == [(str(tmp_path / "overview.png"), "outside the class folders")]
    assert files_in(tmp_path, IMAGES) == [str(tmp_path / "overview.png")]


ODD_NAMES = ["a\nb.png", "tab\t.png", "\x1b[31mred.png", "\x85.png", "\u2028.png", b"lat\xe9\x85.png"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_file_name_is_shown_in_plain_text_and_the_file_is_still_read(tmp_path, name):
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    for folder in "ab":
        image(tmp_path / folder / "1.png")
        image(tmp_path / folder / name)
    split = open_source(str(tmp_path)).splits["all"]
    assert len(split) == 4
    assert all(is_plain(shown) for shown in split.names)
    assert all(split.read(i).startswith(b"\x89PNG") for i in range(4))
    assert restored(readable(name)) == name
    part = split.take(np.array([3, 0]))
    assert part.read(0) == split.read(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("狗".encode("gbk"), "is not in UTF-8.*rename it"),
        (b"a\nb", "has a control character"),
        (b"a\x1b", "control"),
    ],
)
def test_a_class_folder_whose_name_is_no_text_is_refused_with_its_bytes(tmp_path, name, message):
    image(tmp_path / "a" / "1.png")
    image(tmp_path / os.fsdecode(name) / "1.png")
    with pytest.raises(DataError, match=message) as caught:
        open_source(str(tmp_path))
    assert is_plain(caught.value.message)


def test_class_names_are_in_nfc_and_the_same_name_in_two_codings_is_refused(tmp_path):
    image(tmp_path / "train" / "cafe\u0301" / "1.png")
    image(tmp_path / "train" / "the\u0301" / "1.png")
    image(tmp_path / "test" / "caf\u00e9" / "1.png")
    source = open_source(str(tmp_path))
    assert source.class_names == ("caf\u00e9", "th\u00e9")
    assert source.splits["test"].labels.tolist() == [0]
    image(tmp_path / "train" / "caf\u00e9" / "1.png")
    with pytest.raises(DataError, match="two codings of accents"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (("bus", "car", "train"), ("bus", "car", "train")),
        (("exam", "Test"), ("Test", "exam")),
        (("dev", "production"), ("dev", "production")),
    ],
)
def test_a_class_may_be_called_like_a_split_where_it_is_clear(tmp_path, folders, classes):
    for folder in folders:
        image(tmp_path / folder / "1.png")
    assert open_source(str(tmp_path)).class_names == classes


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("Training", "dev", "Testing"), ("TRAIN", "Validation", "eval"), ("training", "valid", "Evaluation")],
)
def test_splits_are_known_by_the_hubs_words_in_any_case(tmp_path, train, val, test):
    for split in (train, val, test):
        for name in "ab":
            image(tmp_path / split / name / "1.png")
    source = open_source(str(tmp_path))
    assert source.class_names == ("a", "b")
    assert list(source.splits) == ["train", "val", "test"]


def test_one_class_and_an_empty_one_are_enough_to_evaluate_on(tmp_path):
    image(tmp_path / "b" / "1.png")
    (tmp_path / "c").mkdir()
    assert open_source(str(tmp_path), for_evaluation=True).class_names == ("b",)
    with pytest.raises(DataError, match="without images: c"):
        open_source(str(tmp_path))


def test_a_class_without_images_in_val_is_no_fault(tmp_path):
    for name in ("train/a", "train/b", "val/a"):
        image(tmp_path / name / "1.png")
    (tmp_path / "val" / "b").mkdir()
    assert len(open_source(str(tmp_path)).splits["val"]) == 1


def test_heic_is_read_where_its_package_is_and_named_where_it_is_not(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    from mixlab.data.images.decode import decode
    from mixlab.errors import ExampleError

    heic = pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30)))
    heic.save(tmp_path / "photo.jpg")
    pixels = decode(tmp_path / "photo.jpg")
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (200, 30, 30)).max() < 6
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(ExampleError, match=r"pillow-heif; .*pip install '\.\[heic\]'"):
        decode(tmp_path / "photo.jpg")


def test_a_picture_of_another_format_is_refused_by_name(tmp_path):
    from mixlab.data.images.decode import decode
    from mixlab.errors import ExampleError

    Image.new("RGB", (16, 16)).save(tmp_path / "a.avif")
    with pytest.raises(ExampleError, match="AVIF is not read here; save it as JPEG or PNG"):
        decode(tmp_path / "a.avif")

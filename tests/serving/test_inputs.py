"""What programs hand over in Python: any kind of image, and one error for all else; nobody's files are touched."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mixlab
from mixlab.checkpoint.store import Weights, save_weights
from mixlab.data.images.decode import decode, decode_opened
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.modality import read_example_file
from mixlab.errors import ExampleError, MixlabError, UsageError, UsageTypeError
from mixlab.models.catalog import create_model
from mixlab.recipes import digits
from mixlab.serving.predict import Classifier, load


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Classifier:
    torch.manual_seed(0)
    settings = {"name": "mixer_pico2", "num_classes": 3, "image_size": (8, 8), "in_channels": 3}
    model = create_model(**settings)
    torch.nn.init.normal_(model.head.weight)
    weights = Weights(
        model=model,
        model_settings=settings,
        preprocess=ImagePreprocess(image_size=(8, 8)),
        class_names=("a", "b", "c"),
        provenance={},
    )
    folder = tmp_path_factory.mktemp("weights") / "weights"
    save_weights(folder, weights)
    return load(folder)


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    path = tmp_path / "pictures" / "one.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    return path


class OwnPath:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def forms(path: Path) -> list:
    raw, array = path.read_bytes(), np.asarray(Image.open(path))
    return [
        str(path), path, OwnPath(path), path.parent, raw, bytearray(raw), memoryview(raw), Image.open(path),
        path.open("rb"), path.open("rb", buffering=0), io.BytesIO(raw), array, array[None],
    ]  # fmt: skip


def test_every_form_of_a_picture_has_the_same_answer_alone_and_in_one_list(classifier, picture):
    wanted = classifier.predict(picture)[0]["predictions"]
    given = forms(picture)
    for one in given:
        (row,) = classifier.predict(one)
        assert row["predictions"] == wanted, type(one)
        if hasattr(one, "read"):
            assert not one.closed
            one.seek(0)
    rows = classifier.predict(given)
    assert len(rows) == 13
    for row in rows:
        for guess, other in zip(row["predictions"], wanted, strict=True):
            assert guess["label"] == other["label"]
            assert guess["probability"] == pytest.approx(other["probability"], abs=1e-5)
    assert [row["path"] for row in rows] == [str(picture)] * 4 + [str(i) for i in range(4, 13)]
    for one in given:
        if hasattr(one, "close"):
            one.close()


def test_generators_grey_arrays_and_batches_are_taken(classifier, picture):
    grey = np.random.default_rng(1).integers(0, 256, (3, 9, 9), dtype=np.uint8)
    one = [row["predictions"] for row in classifier.predict(list(grey))]
    assert [row["predictions"] for row in classifier.predict(grey[..., None])] == one
    assert [row["path"] for row in classifier.predict([picture, grey[..., None]])] == [
        str(picture),
        "1",
        "2",
        "3",
    ]
    assert len(classifier.predict(path for path in [picture, picture])) == 2
    assert classifier.predict([]) == []
    assert len(classifier.predict(np.array([str(picture)] * 2))) == 2


def test_a_file_in_an_archive_is_read_to_its_end(classifier, picture, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(picture, "one.png")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("one.png") as file:
        assert classifier.predict(file)[0]["predictions"] == classifier.predict(picture)[0]["predictions"]


REFUSED = [
    7, 7.5, True, None, [7], [None], [True], range(3), list(b"\x00\x01\xff"), {"a.png": 1}, object(), [["x.png"]],
    np.zeros((4, 4, 3), np.float32), [np.zeros((4, 4), np.int64)], np.array([b"a.png"]), np.int64(3),
    torch.zeros(3, 4, 4, dtype=torch.uint8), io.StringIO("text"), ["missing.png", 0], {1, 2},
]  # fmt: skip


@pytest.mark.parametrize("given", REFUSED, ids=lambda given: repr(given)[:20])
def test_anything_else_is_one_error_that_says_what_is_taken(given, classifier):
    with pytest.raises(UsageTypeError, match=r"predict takes a path of a file or folder.*got ") as found:
        classifier.predict(given)
    assert isinstance(found.value, TypeError)
    assert isinstance(found.value, MixlabError)
    assert "\n" not in str(found.value)


def test_a_file_opened_as_text_is_refused_unread(classifier, picture):
    with picture.open(encoding="latin-1") as file:
        with pytest.raises(UsageTypeError, match="TextIOWrapper"):
            classifier.predict([file])
        assert file.tell() == 0

    class Odd:
        def read(self, size: int) -> str:
            return "text"

    with pytest.raises(UsageTypeError, match="binary mode"):
        classifier.predict(Odd())


def test_no_number_is_ever_opened_as_a_file(classifier, tmp_path):
    """Files that the caller has open, under all numbers that bytes can have."""
    files = [(tmp_path / f"{i}.log").open("w+") for i in range(20)]
    opened = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for given in (
        list(range(256)),
        list(bytes(range(256))),
        3,
        [files[0].fileno()],
        bytearray(range(256)),
        iter(b"abc"),
    ):
        try:
            rows = classifier.predict(given)
        except UsageTypeError:
            continue
        assert "error" in rows[0]  # a bytearray is the content of one file
    for number in (files[0].fileno(), True, 0):
        with pytest.raises(UsageTypeError):
            read_example_file(number)  # type: ignore[arg-type]
        with pytest.raises(UsageTypeError):
            decode(number)  # type: ignore[arg-type]
    if opened is not None:
        assert set(os.listdir("/proc/self/fd")) == opened
    for file in files:
        file.write("still there")
        file.flush()
        assert Path(file.name).read_text() == "still there"
        file.close()


def test_what_cannot_be_read_is_a_row_of_its_own(classifier, picture):
    closed = picture.open("rb")
    closed.close()
    image = Image.open(picture)
    image.close()
    half = Image.open(io.BytesIO(picture.read_bytes()[:-60]))

    class Broken:
        def read(self, size: int) -> bytes:
            raise OSError("the network is gone")

    wrong = np.zeros((4, 4, 4), np.uint8)
    rows = classifier.predict(
        [closed, image, half, Broken(), b"", io.BytesIO(b"text"), wrong, wrong[0, :0], picture]
    )
    assert ["error" in row for row in rows] == [True] * 8 + [False]
    assert "closed" in rows[0]["error"]
    assert "the network is gone" in rows[3]["error"]


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def odd_pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (6, 9)).astype(np.uint16))
    palette = colour.quantize(8)
    return {f"orientation {i}": turned(colour, i) for i in range(1, 9)} | {
        "alpha": encoded(alpha, "PNG"),
        "grey and alpha": encoded(alpha.convert("LA"), "PNG"),
        "16 bits": encoded(deep, "PNG"),
        "16 bits tiff": encoded(deep, "TIFF"),
        "palette": encoded(palette, "PNG"),
        "transparent palette": encoded(palette, "PNG", transparency=2),
        "cmyk": encoded(colour.convert("CMYK"), "JPEG"),
        "black and white": encoded(colour.convert("1"), "PNG"),
        "animation": encoded(colour, "GIF", save_all=True, append_images=[alpha.convert("RGB")]),
        "turned tiff": encoded(colour, "TIFF", tiffinfo={0x0112: 6}),
    }


@pytest.mark.parametrize(("name", "data"), odd_pictures().items(), ids=odd_pictures())
def test_a_picture_that_pillow_has_opened_becomes_what_its_file_becomes(name, data):
    image = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode_opened(image), decode(data))
    np.testing.assert_array_equal(decode_opened(image), decode(data))  # it is the caller's, and as it was


def test_an_image_made_in_pillow_is_taken_and_floats_are_refused_with_the_reason():
    assert decode_opened(Image.new("RGBA", (3, 2), (0, 0, 0, 0))).min() == 255
    with pytest.raises(ExampleError, match="floating-point"):
        decode_opened(Image.new("F", (3, 2)))
    with pytest.raises(ExampleError, match="without pixels"):
        decode_opened(Image.new("RGB", (0, 2)))


@pytest.mark.parametrize("given", [7, None, True, b"weights", ["weights"], 1.5])
def test_load_and_create_model_take_names_and_paths_only(given):
    with pytest.raises(UsageTypeError, match="weights takes a run, a path or a published name, not "):
        mixlab.load(given)
    with pytest.raises(UsageTypeError, match="name takes the name of a model"):
        mixlab.create_model(given)


@pytest.mark.parametrize("size", ["224", (1, 2.5), True, [None, 3], 3.0])
def test_an_image_size_is_a_number_or_two(size):
    with pytest.raises(UsageTypeError, match="image_size takes a side"):
        mixlab.create_model("mixer_pico2", image_size=size)
    with pytest.raises(UsageTypeError, match="image_size takes a side"):
        mixlab.load("mixer_cifar:cifar10", size)
    for wrong in ((1, 2, 3), (), 0, -8):
        with pytest.raises(UsageError):
            mixlab.create_model("mixer_pico2", image_size=wrong)


@pytest.mark.parametrize("top", ["5", 2.5, None, True])
def test_top_is_a_number(top, classifier, picture):
    with pytest.raises(UsageTypeError, match="top takes a number of labels"):
        classifier.predict(picture, top=top)
    assert len(classifier.predict(picture, top=np.int64(2))[0]["predictions"]) == 2


TRAININGS = {
    "recipe": (("digits", 7), {}),
    "data": ((7, "digits"), {}),
    "data in bytes": ((b"digits", "digits"), {}),
    "data in a list": ((["digits"], "digits"), {}),
    "budget": (("digits", "digits"), {"budget": 60}),
    "run": (("digits", "digits"), {"run": 3}),
    "device": (("digits", "digits"), {"device": 0}),
    "download": (("digits", "digits"), {"download": "no"}),
    "tracker": (("digits", "digits"), {"tracker": True}),
    "screen": (("digits", "digits"), {"screen": print}),
    "lr_grid": (("digits", "digits"), {"lr_grid": [0.1]}),
}


@pytest.mark.parametrize(("arguments", "options"), TRAININGS.values(), ids=TRAININGS)
def test_train_says_in_one_sentence_what_an_argument_takes(arguments, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageTypeError, match=r"^\w+ takes .*, not \w+"):
        mixlab.train(*arguments, **options)
    assert not list(tmp_path.iterdir())


def test_finetune_says_so_too():
    with pytest.raises(UsageTypeError, match="weights takes"):
        mixlab.finetune("digits", None)  # type: ignore[arg-type]
    with pytest.raises(UsageTypeError, match="data takes"):
        mixlab.finetune(3, "x")  # type: ignore[arg-type]
    with pytest.raises(UsageTypeError, match="lr_grid takes"):
        mixlab.finetune("digits", "x", lr_grid="0.1")
    with pytest.raises(UsageTypeError, match="lr_grid takes"):
        mixlab.finetune("digits", "x", lr_grid=["0.1"])  # type: ignore[list-item]


def test_paths_of_any_kind_are_taken_by_train(tmp_path, monkeypatch):
    for name in "ab":
        for i in range(3):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (80 * i, 90, 5)).save(path)
    from mixlab.report.screen import Screen
    from mixlab.training.keys import to_toml

    (tmp_path / "own.toml").write_text(to_toml(digits()))
    options = {"steps": 1, "epochs": None, "threads": 1, "screen": Screen(quiet=True), "with_pictures": False}
    run = OwnPath(tmp_path / "run")
    result = mixlab.train(
        OwnPath(tmp_path / "data"), OwnPath(tmp_path / "own.toml"), run=run, figures=False, **options
    )
    assert Path(result["report"]).is_file()
    assert mixlab.load(OwnPath(tmp_path / "run")).class_names == ("a", "b")

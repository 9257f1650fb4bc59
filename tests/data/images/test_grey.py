"""Grey of 10, 12 and 14 bits in images of 16: the range is measured, said, and travels with the weights."""

import numpy as np
import pytest
from PIL import Image

import mixlab
from mixlab.data.check import check
from mixlab.data.images.decode import decode, decode_deep, grey_range
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.sources import open_source
from mixlab.report.screen import Screen

OPTIONS = {"steps": 2, "threads": 1, "batch_size": 8, "data__val_fraction": 0.2, "screen": Screen(quiet=True)}


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path)


@pytest.fixture
def microscope(tmp_path):
    """Two classes of 12-bit grey in 16-bit files, as TIFF and PNG, 10 images each."""
    draw = np.random.default_rng(0)
    for number, name in enumerate(("low", "high")):
        for k in range(10):
            values = draw.integers(1500 * number, 1500 * number + 2500, (16, 16))
            save(tmp_path / "set" / name / f"{k}.{('tif', 'png')[k % 2]}", values)
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("peak", "white"),
    [
        (0, 255),
        (255, 255),
        (256, 1023),
        (1023, 1023),
        (4000, 4095),
        (16383, 16383),
        (16384, 65535),
        (65535, 65535),
    ],
)
def test_white_is_the_largest_value_of_the_bits_that_are_used(peak, white):
    assert grey_range(peak) == white


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_full_range_becomes_all_grey_levels(tmp_path, bits):
    values = np.linspace(0, 2**bits - 1, 256).round().reshape(16, 16)
    save(tmp_path / "a.png", values)
    pixels, deep = decode_deep(tmp_path / "a.png", grey_max=2**bits - 1)
    assert np.array_equal(deep, values)
    assert np.abs(pixels[..., 0].astype(int) - np.arange(256).reshape(16, 16)).max() <= (0 if bits > 8 else 1)
    assert len(np.unique(decode(tmp_path / "a.png"))) == {8: 2, 10: 5, 12: 17, 14: 65, 16: 256}[bits]


def test_without_a_range_the_scale_is_the_old_one(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    save(tmp_path / "a.png", values)
    assert np.array_equal(decode(tmp_path / "a.png")[..., 0], ((values.astype(np.int64) + 128) // 257))
    old = {
        key: value for key, value in ImagePreprocess(image_size=(8, 8)).to_json().items() if key != "grey_max"
    }
    assert ImagePreprocess.from_json(old).grey_max == 65535


def test_check_says_the_range_and_tells_pictures_apart_that_8_bits_make_the_same(microscope):
    result = check(open_source(str(microscope)))
    assert (result.facts["grey_max"], result.num_duplicates_within) == (4095, 0)
    assert 3900 < result.facts["grey_peak"] <= 3999
    assert check(open_source("digits")).facts["grey_max"] is None


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_training_measures_the_range_and_its_weights_keep_it(microscope, tmp_path, in_memory):
    result = mixlab.train(
        str(microscope),
        "small_data",
        run=tmp_path / "run",
        data__in_memory=in_memory,
        figures=False,
        **OPTIONS,
    )
    assert result["grey_max"] == 4095
    assert "grey_max = 4095" in (tmp_path / "run" / "recipe.toml").read_text()
    classifier = mixlab.load(tmp_path / "run")
    assert classifier.preprocess.grey_max == 4095
    path = microscope / "high" / "0.tif"
    expected = classifier.preprocess.keep(decode(path, grey_max=4095))
    assert np.array_equal(classifier.preprocess.read(path), expected)
    assert len(np.unique(expected)) > 60
    assert "4,095 is white" in (tmp_path / "run" / "report.html").read_text()


def test_the_range_can_be_set_by_hand(microscope, tmp_path):
    result = mixlab.train(
        str(microscope), "small_data", run=tmp_path / "run", data__grey_max=65535, figures=False, **OPTIONS
    )
    assert result["grey_max"] == 65535
    assert mixlab.load(tmp_path / "run").preprocess.grey_max == 65535


def test_the_packages_own_reader_scales_alike(microscope):
    pytest.importorskip("onnxruntime")
    from mixlab.exports.standalone import read_picture

    preprocess = ImagePreprocess(image_size=(8, 8), channels=1, mean=(0.5,), std=(0.5,), grey_max=4095)
    for path in sorted((microscope / "high").iterdir()):
        ours = preprocess.read(path).transpose(1, 2, 0)
        assert np.array_equal(read_picture(str(path), preprocess.to_json()), ours)

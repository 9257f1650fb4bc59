"""Prediction: any kind of image in, one row each out, the same as evaluation says."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from mixlab.checkpoint.store import Weights, save_weights
from mixlab.data.images.modality import IMAGES
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model
from mixlab.serving.predict import find_examples, load, write_csv


@pytest.fixture
def weights_folder(tmp_path):
    torch.manual_seed(0)
    settings = {"name": "mixer_pico2", "num_classes": 6, "image_size": (8, 8), "in_channels": 3}
    model = create_model(**settings)
    torch.nn.init.normal_(model.head.weight)
    names = ("a", "b", "c", "d", "e", "f")
    preprocess = ImagePreprocess(image_size=(8, 8))
    weights = Weights(
        model=model, model_settings=settings, preprocess=preprocess, class_names=names, provenance={}
    )
    save_weights(tmp_path / "weights", weights)
    return tmp_path / "weights"


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for i in range(70):
        place = folder / "deep" if i % 2 else folder
        Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).save(place / f"{i:02}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_paths_bytes_and_arrays_give_the_same_answer(weights_folder, pictures):
    classifier = load(weights_folder)
    path = pictures / "00.png"
    array = np.asarray(Image.open(path))
    rows = classifier.predict([path, path.read_bytes(), array], top=6)
    assert rows[0]["predictions"] == rows[1]["predictions"] == rows[2]["predictions"]
    probabilities = [guess["probability"] for guess in rows[0]["predictions"]]
    assert sum(probabilities) == pytest.approx(1)
    assert probabilities == sorted(probabilities, reverse=True)
    assert rows[0]["path"] == str(path)
    assert rows[2]["path"] == "2"
    pixels = torch.from_numpy(classifier.preprocess.keep(array))[None]
    logits = classifier.model(classifier.preprocess.to_input(pixels))
    assert rows[0]["predictions"][0]["label"] == "abcdef"[int(logits.argmax())]


def test_a_picture_gets_the_same_answer_alone_and_among_many(weights_folder, pictures):
    classifier = load(weights_folder)
    paths = find_examples([str(pictures)], IMAGES)
    rows = classifier.predict(paths)
    assert len(rows) == 71
    alone = classifier.predict(paths[40])
    assert alone[0]["path"] == rows[40]["path"]
    for a, b in zip(alone[0]["predictions"], rows[40]["predictions"], strict=True):
        assert a["label"] == b["label"]
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


def test_what_cannot_be_read_becomes_an_error_row(weights_folder, pictures):
    rows = load(weights_folder).predict(
        [
            pictures / "broken.jpg",
            pictures / "missing.png",
            np.zeros((4, 4, 4), np.uint8),
            pictures / "00.png",
        ]
    )
    assert ["error" in row for row in rows] == [True, True, True, False]
    assert all(row["error"] for row in rows[:3])


def test_images_are_found_by_path_folder_and_glob(pictures):
    assert len(find_examples([str(pictures)], IMAGES)) == 71
    assert find_examples([str(pictures / "0*.png")], IMAGES) == [
        str(pictures / f"0{i}.png") for i in (0, 2, 4, 6, 8)
    ]
    assert find_examples([str(pictures / "notes.txt")], IMAGES) == [str(pictures / "notes.txt")]
    for nothing in ("nowhere.png", str(pictures / "*.bmp")):
        with pytest.raises(UsageError, match="no such image"):
            find_examples([nothing], IMAGES)
    (pictures / "empty").mkdir()
    with pytest.raises(UsageError, match="no images in this folder"):
        find_examples([str(pictures / "empty")], IMAGES)


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(pictures):
    odd = pictures / "a[1].png"
    (pictures / "00.png").rename(odd)
    assert find_examples([str(odd)], IMAGES) == [str(odd)]


def test_top_is_bounded_by_the_classes_and_by_reason(weights_folder, pictures):
    classifier = load(weights_folder)
    assert len(classifier.predict(pictures / "00.png", top=50)[0]["predictions"]) == 6
    with pytest.raises(UsageError, match="at least 1"):
        classifier.predict(pictures / "00.png", top=0)


def test_the_csv_has_a_line_for_each_label_and_each_failure(weights_folder, pictures, tmp_path):
    rows = load(weights_folder).predict([pictures / "00.png", pictures / "broken.jpg"], top=3)
    write_csv(rows, tmp_path / "out.csv")
    with open(tmp_path / "out.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["rank"] for line in lines] == ["1", "2", "3", ""]
    assert lines[3]["error"]

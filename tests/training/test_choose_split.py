"""A run's data elsewhere: moved, linked, copied, laid out anew, in part; and images that it was trained on."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import mixlab
from mixlab.data.csv_files import read_record
from mixlab.data.sources import open_source
from mixlab.errors import DataError, UsageError
from mixlab.report.screen import Screen
from mixlab.training.evaluate import evaluate

QUIET = Screen(quiet=True)
OPTIONS = {"steps": 4, "threads": 1, "batch_size": 16, "screen": QUIET, "data__num_workers": 0}


def noise(root: Path, count: int = 20, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    for name in "ab":
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                root / name / f"{k:03d}.png"
            )
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run and its data: 40 images, of which 32 are for training and 4 for the test."""
    root = tmp_path_factory.mktemp("elsewhere")
    mixlab.train(str(noise(root / "set")), "small_data", run=root / "run", figures=False, **OPTIONS)
    return root / "run", root / "set"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A run of its own, whose data may be moved."""
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.copytree(trained[1], tmp_path / "set")
    for name in ("recipe.toml", "split.csv"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(str(trained[1]), str(tmp_path / "set")))
    return tmp_path / "run"


def renamed(source: Path, target: Path) -> Path:
    for folder in sorted(source.iterdir()):
        (target / folder.name).mkdir(parents=True)
        for number, path in enumerate(sorted(folder.iterdir())):
            shutil.copy(path, target / folder.name / f"x{number * 7 % 20}.png")
    return target


@pytest.mark.parametrize("way", ["here", "linked", "copied", "renamed", "moved"])
def test_the_same_pictures_anywhere_are_measured_on_the_runs_own_test_split(run, way):
    own, _ = evaluate(run, screen=QUIET)
    assert (own.num_images, own.num_trained_on) == (4, 0)
    data, other = run.parent / "set", run.parent / "other"
    if way == "here":
        other = data
    elif way == "linked":
        other.symlink_to(data)
    elif way == "copied":
        shutil.copytree(data, other)
    elif way == "renamed":
        renamed(data, other)
    else:
        os.rename(data, other)
    found, _ = evaluate(run, str(other), screen=QUIET)
    assert (found.num_images, found.num_correct, found.num_trained_on) == (4, own.num_correct, 0)
    assert found.loss == pytest.approx(own.loss, rel=1e-6)


def test_moved_data_is_found_by_its_new_place_and_by_that_only(run):
    own, _ = evaluate(run, screen=QUIET)
    whole = load_file(run / "weights.safetensors")
    os.rename(run.parent / "set", run.parent / "moved")
    for call in (
        lambda: evaluate(run, screen=QUIET),
        lambda: mixlab.resume(run, screen=QUIET, figures=False),
    ):
        with pytest.raises(DataError, match=r"not there any more.*--data PATH"):
            call()
    found, _ = evaluate(run, moved_to=str(run.parent / "moved"), screen=QUIET)
    assert found.loss == own.loss
    result = mixlab.resume(run, data=str(run.parent / "moved"), screen=QUIET, figures=False)
    assert result["test"]["num_images"] == 4
    again = load_file(run / "weights.safetensors")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_other_pictures_under_the_same_names_are_not_taken_for_the_runs(run):
    other = noise(run.parent / "other", seed=1)
    found, _ = evaluate(run, str(other), screen=QUIET)
    assert (found.num_images, found.num_trained_on) == (40, 0)
    with pytest.raises(DataError, match="same names as the run's, but are others"):
        evaluate(run, moved_to=str(other), screen=QUIET)
    os.rename(run.parent / "set", run.parent / "gone")
    os.rename(other, run.parent / "set")
    with pytest.raises(DataError, match="are not what they were, the first is"):
        mixlab.resume(run, screen=QUIET, figures=False)


@pytest.mark.parametrize("name", ["tra\u0131n", "val"])
def test_a_record_without_a_training_split_is_refused(run, name):
    record = (run / "split.csv").read_text()
    (run / "split.csv").write_text(record.replace(",train,", f",{name},"))
    for call in (
        lambda: mixlab.resume(run, screen=QUIET, figures=False),
        lambda: evaluate(run, screen=QUIET),
    ):
        with pytest.raises(DataError, match=r"no image of the train split.*split\.csv"):
            call()


def test_pictures_that_were_trained_on_are_counted_in_a_part_of_the_data(run, capsys):
    part = run.parent / "part"
    record = read_record(run / "split.csv")
    for split, count in (("train", 5), ("test", 2)):
        for path, _ in record[split][:count]:
            target = part / Path(path).parent.name / Path(path).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    found, _ = evaluate(run, str(part), screen=Screen())
    assert (found.num_images, found.num_trained_on) == (7, 5)
    assert "trained on 5 of these 7 images" in capsys.readouterr().out
    tested, _ = evaluate(run, split="train", screen=QUIET)
    assert tested.num_trained_on == tested.num_images == 32


def test_a_run_of_an_older_version_works_and_says_what_cannot_be_known(run, capsys):
    with open(run / "split.csv", newline="") as file:
        rows = [row[:3] for row in csv.reader(file)]
    with open(run / "split.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    shutil.copytree(run.parent / "set", run.parent / "copied")
    for data in (None, str(run.parent / "copied")):
        found, _ = evaluate(run, data, screen=Screen())
        assert (found.num_images, found.num_trained_on) == (4, None)
        assert "cannot be known" in capsys.readouterr().out
    assert mixlab.resume(run, screen=QUIET, figures=False)["test"]["num_images"] == 4


def test_copies_in_the_data_are_kept_together_and_said(tmp_path, capsys):
    data = noise(tmp_path / "set")
    for path in sorted(data.rglob("*.png")):
        shutil.copy(path, path.with_stem(path.stem + "_copy"))
    shutil.copy(data / "a" / "000.png", data / "b" / "wrong.png")
    result = mixlab.train(
        str(data), "small_data", run=tmp_path / "run", figures=False, **(OPTIONS | {"screen": Screen()})
    )
    record = read_record(tmp_path / "run" / "split.csv")
    sides = {}
    for split, rows in record.items():
        for _, digest in rows:
            sides.setdefault(digest, set()).add(split)
    assert all(len(splits) == 1 for splits in sides.values())
    assert result["copies"]["num_in_train"] == {"val": 0, "test": 0}
    assert (result["copies"]["num_within"], result["copies"]["num_conflicts"]) == (41, 3)
    assert "under more than one label: 3 images" in capsys.readouterr().out
    report = (tmp_path / "run" / "report.html").read_text()
    assert "more than one label: 3 images" in report
    assert "41 images are exact copies" in report


def test_copies_across_given_splits_are_said_before_training(tmp_path, capsys):
    for split in ("train", "test"):
        noise(tmp_path / "set" / split, seed=len(split))
    shutil.copy(tmp_path / "set/train/a/000.png", tmp_path / "set/test/a/leak.png")
    options = OPTIONS | {"screen": Screen()}
    result = mixlab.train(str(tmp_path / "set"), "small_data", run=tmp_path / "run", figures=False, **options)
    assert result["copies"]["num_in_train"]["test"] == result["test"]["num_trained_on"] == 1
    said = capsys.readouterr().out
    assert said.index("also in train: 1 image of the test split") < said.index("test accuracy")


@pytest.mark.parametrize("given", [7, True, b"set", ["set"], 1.5])
def test_what_is_no_path_is_a_type_error_before_anything_is_opened(run, given):
    for call in (lambda: evaluate(run, given, screen=QUIET), lambda: open_source(given)):
        with pytest.raises(
            UsageError, match="data takes a folder, a CSV file or the name of a data set"
        ) as caught:
            call()
        assert isinstance(caught.value, TypeError)

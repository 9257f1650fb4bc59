"""The table of trainings that studies fill: each cell once, whatever happens on the way."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from PIL import Image

from mixlab import studies
from mixlab.cpu.describe import describe_settings
from mixlab.errors import DataError, DiskError, UsageError
from mixlab.models.catalog import create_model
from mixlab.recipes import compose
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from mixlab.studies import trainings
from mixlab.studies.harness import Options
from mixlab.studies.presets import CPU_MODELS, SOUND_MODELS, Preset
from mixlab.studies.rows import read_rows, write_rows
from mixlab.studies.trainings import TIMED, Cell, fill, train_cell
from mixlab.training.keys import from_toml
from mixlab.training.recipe import Recipe
from mixlab.training.signals import Interrupted
from tests.training.seams import StopAfter

TINY = {"model.hidden_dim": 8, "model.channel_mlp_dim": 16, "model.token_mlp_dim": 8, "model.num_blocks": 1}
PRESET = Preset(
    models={"Mixer": {"model.name": "mixer_pico"} | TINY},
    seeds={"Mixer": 2},
    recipe="small_images_flat",
    shared={},
    minutes=1.0,
    scale="Tiny",
    likeness="One model",
)
CELLS = [
    Cell(model="Mixer", setting=setting, seed=seed, changes=PRESET.models["Mixer"] | changes)
    for seed in range(2)
    for setting, changes in (("as it is", {}), ("mixup", {"augment.mixup_alpha": 0.2}))
]


def options(tmp_path, **changes):
    return Options(out=tmp_path / "out", smoke=True, threads=1, screen=Screen(quiet=True), **changes)


def refuse(*_):
    raise AssertionError("this was trained already")


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def test_every_cell_becomes_a_row_and_a_second_call_trains_nothing(tmp_path):
    rows, curves = fill(options(tmp_path), PRESET, CELLS, extra_columns=("twice",), measure=lambda run, cell: {
        "twice": 2 * cell.seed
    })  # fmt: skip
    assert [(row["setting"], row["seed"], row["twice"]) for row in rows] == [
        ("as it is", "0", "0"), ("mixup", "0", "0"), ("as it is", "1", "2"), ("mixup", "1", "2"),
    ]  # fmt: skip
    for row, cell in zip(rows, CELLS, strict=True):
        (end,) = [
            r
            for r in read_run_log(tmp_path / "out/runs" / cell.folder_name / "metrics.jsonl")
            if r["event"] == "end"
        ]
        assert int(row["num_correct"]) == end["test"]["num_correct"]
        assert float(row["top1"]) == int(row["num_correct"]) / int(row["num_images"])
        assert int(row["steps"]) == 3
        settings = {"name": "mixer_pico2", "num_classes": 10, "image_size": (8, 8), "in_channels": 1}
        tiny = {key.removeprefix("model."): value for key, value in TINY.items()}
        assert int(row["macs"]) == describe_settings(settings | tiny, batch_size=1)["macs"]
    assert {row["seed"] for row in curves} == {"0", "1"}
    again, same_curves = fill(options(tmp_path), PRESET, CELLS, extra_columns=("twice",), train=refuse)
    assert (again, same_curves) == (rows, curves)


def test_a_call_that_is_interrupted_anywhere_goes_on_to_the_same_table(tmp_path):
    expected, expected_curves = fill(options(tmp_path / "a"), PRESET, CELLS)
    place = options(tmp_path / "b")

    def stop(*_):
        raise KeyboardInterrupt

    def train_and_stop(*arguments):
        train_cell(*arguments)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(place, PRESET, CELLS, train=stop)
    with pytest.raises(Interrupted):
        fill(replace(place, screen=StopAfter(2)), PRESET, CELLS)
    with pytest.raises(KeyboardInterrupt):
        fill(place, PRESET, CELLS, train=train_and_stop)
    with pytest.raises(KeyboardInterrupt):
        fill(place, PRESET, CELLS, measure=stop)
    fill(place, PRESET, CELLS[:2])
    before = read_rows(place.out / trainings.RESULTS)[:-1]  # as if it had ended between the two tables
    write_rows(place.out / trainings.RESULTS, trainings.COLUMNS, before)
    rows, curves = fill(place, PRESET, CELLS)
    assert without_times(rows) == without_times(expected)
    assert curves == expected_curves


def test_cells_of_a_model_take_the_steps_of_its_first_one(tmp_path):
    seen = []

    def train_four(recipe, run, minutes, options):
        seen.append((recipe.steps, minutes))
        recipe = replace(recipe, steps=recipe.steps or 4, batch_size=16)
        return train_cell(recipe, run, minutes, replace(options, smoke=True))  # no figures

    place = replace(options(tmp_path, subject="digits"), smoke=False, minutes=0.5)
    fill(place, PRESET, CELLS[:3], train=train_four)
    assert seen == [(None, 0.5), (4, 0.5), (4, 0.5)]


def test_results_of_another_recipe_are_not_mixed_with_these(tmp_path):
    fill(options(tmp_path), PRESET, CELLS[:1])
    other = replace(CELLS[0], changes=CELLS[0].changes | {"optimizer.lr": 0.5})
    with pytest.raises(UsageError, match="by another recipe, data set or --minutes") as error:
        fill(options(tmp_path), PRESET, [other])
    assert "--out" in error.value.hint


def test_results_of_other_minutes_are_not_mixed_but_threads_and_spelling_may_differ(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for number, name in enumerate(("blue", "red")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for image in range(10):
                color = (200 * number + image, 0, 200 - 200 * number)
                Image.new("RGB", (8, 8), color).save(folder / f"{image}.png")
    first = options(tmp_path, subject=str(tmp_path / "data"))
    fill(first, PRESET, CELLS[:1])
    monkeypatch.chdir(tmp_path)
    fill(replace(first, subject="data", threads=2), PRESET, CELLS[:1], train=refuse)
    recipe = Recipe()
    assert not set(trainings._digests(recipe, 6.0)) & set(trainings._digests(recipe, 1.0))
    with pytest.raises(UsageError, match="or --minutes"):
        fill(replace(first, smoke=False, minutes=2.0), PRESET, CELLS[:1])


def test_curves_are_of_the_cells_that_are_asked_for(tmp_path):
    fill(options(tmp_path), PRESET, CELLS)
    _, curves = fill(options(tmp_path), PRESET, CELLS[:2])
    assert {row["seed"] for row in curves} == {"0"}


def test_data_must_be_named_and_a_folder_must_be_possible(tmp_path):
    with pytest.raises(UsageError, match="trains on a data set") as error:
        fill(replace(options(tmp_path), smoke=False), PRESET, CELLS)
    assert error.value.where == "DATA"
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DiskError, match="cannot be made"):
        fill(options(tmp_path), PRESET, CELLS)


@pytest.mark.slow
def test_the_first_training_of_a_model_takes_the_steps_that_were_planned_at_first(tmp_path):
    run = tmp_path / "run"
    overrides = TINY | {"model.name": "mixer_pico", "threads": 1}
    recipe = compose("digits", recipe="small_images_flat", overrides=overrides, has_budget=True)
    result = train_cell(recipe, run, 0.5, options(tmp_path))
    assert not (run / "pace.json").exists()
    assert result["steps"] == from_toml(run / "recipe.toml")["steps"]


def test_a_set_without_a_test_split_is_refused_before_any_training(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(("blue", "red")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (200 * number, 0, 200 - 200 * number)).save(folder / "0.png")
    with pytest.raises(DataError, match="test split"):
        fill(options(tmp_path, subject=str(tmp_path / "data")), PRESET, CELLS)
    assert not (tmp_path / "out").exists()


def test_the_models_of_the_small_preset_cost_the_same():
    counts = {}
    for model, changes in CPU_MODELS.items():
        name = changes["model.name"]
        name = {"mixer_micro": "mixer_micro4", "mixer_pyramid_micro": "mixer_pyramid_micro2"}.get(name, name)
        settings = {"name": name, "num_classes": 10, "image_size": (32, 32)}
        counts[model] = describe_settings(settings, batch_size=1)["macs"]
        create_model(**settings)
    assert counts["Mixer"] == pytest.approx(12.9e6, rel=0.01)
    assert all(count == pytest.approx(counts["Mixer"], rel=0.15) for count in counts.values())


def test_the_models_for_sounds_cost_the_same():
    counts = {}
    for model, changes in SOUND_MODELS.items():
        size, channels = ((40, 96), 1) if "audio.tokens" in changes else ((1, 96), 40)
        settings = {
            "name": changes["model.name"],
            "num_classes": 10,
            "image_size": size,
            "in_channels": channels,
        }
        counts[model] = describe_settings(settings, batch_size=1)["macs"]
    assert counts["Mixer"] == pytest.approx(35.6e6, rel=0.01)
    assert all(count == pytest.approx(counts["Mixer"], rel=0.07) for count in counts.values())


def test_studies_are_found_by_their_files():
    assert {"compare", "filters", "shuffle", "throughput"} <= set(studies.study_names())
    for name in studies.study_names():
        assert studies.open_study(name).name == name
    with pytest.raises(UsageError) as error:
        studies.open_study("shufle")
    assert error.value.hint == "did you mean 'shuffle'?"


@pytest.mark.slow  # a whole study twice, in processes that are killed
def test_a_study_killed_in_every_cell_ends_with_the_same_table(tmp_path):
    command = [sys.executable, "-m", "mixlab", "study", "compare", "--smoke", "--out"]  # with every core
    subprocess.run([*command, str(tmp_path / "a")], check=True, capture_output=True)
    draws = random.Random(0)
    results, kills = tmp_path / "b" / "results.csv", 0

    def num_rows() -> int:
        return len(read_rows(results)) if results.exists() else 0

    while True:
        process = subprocess.Popen(
            [*command, str(tmp_path / "b")], stdout=subprocess.DEVNULL, start_new_session=True
        )
        before = num_rows()
        while process.poll() is None and num_rows() == before:
            time.sleep(0.05)
        time.sleep(draws.uniform(0.0, 1.5))  # in the middle of the next one, or between two, or of the report
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills >= 3
    tables = [without_times(read_rows(tmp_path / side / "results.csv")) for side in "ab"]
    assert tables[0] == tables[1]
    assert (tmp_path / "a/curves.csv").read_bytes() == (tmp_path / "b/curves.csv").read_bytes()
    assert (tmp_path / "b/report.html").stat().st_size > 10_000

"""What commit e2cad5a wrote still opens: a run stopped in mid-epoch, weights of each family, a recipe with every key.

tests/fixtures/e2cad5a/README.md says how it was made.
"""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mixlab
from mixlab.errors import UsageError
from mixlab.models.catalog import ModelConfig, create_model, mixer_config
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from mixlab.studies.trainings import as_older, before_sounds
from mixlab.training.evaluate import evaluate
from mixlab.training.keys import RETIRED, from_toml, override, recipe_keys, to_toml
from mixlab.training.recipe import Recipe

OLD = Path(__file__).parents[1] / "fixtures" / "e2cad5a"
QUIET = Screen(quiet=True)


def test_a_run_that_was_stopped_in_mid_epoch_goes_on_to_where_it_would_have_come(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLD / "stopped", run)
    before = [row for row in read_run_log(run / "metrics.jsonl") if row["event"] == "train"]
    result = mixlab.resume(run, screen=QUIET, figures=False)
    recipe = override(Recipe(), from_toml(run / "recipe.toml"))
    assert result["steps"] == recipe.steps > 14
    rows = [row for row in read_run_log(run / "metrics.jsonl") if row["event"] == "train"]
    assert rows[: len(before)] == before
    whole = mixlab.train(recipe=recipe, run=tmp_path / "whole", screen=QUIET, figures=False)
    assert whole["steps"] == result["steps"]
    ours, theirs = (load_file(place / "weights.safetensors") for place in (run, tmp_path / "whole"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # on another processor the last bits are others
        assert torch.allclose(ours[name].float(), tensor.float(), atol=1e-3), name


@pytest.mark.parametrize("family", ["mixer", "pyramid", "variant"])
def test_weights_of_each_family_say_what_they_said(family):
    expected = json.loads((OLD / family / "predicted.json").read_text())
    expected = {guess["label"]: guess["probability"] for guess in expected["images"][0]["predictions"]}
    (found,) = mixlab.load(OLD / family).predict([OLD / "zero.png"], top=10)
    found = {guess["label"]: guess["probability"] for guess in found["predictions"]}
    assert len(found) == 10
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["stopped/recipe.toml", "every_key.toml"])
def test_a_study_knows_its_older_results_by_the_text_of_their_recipes(name):
    text = (OLD / name).read_text()
    recipe = override(Recipe(), from_toml(OLD / name))
    assert as_older(to_toml(recipe)) == text


def test_models_are_made_by_the_names_that_their_settings_had():
    made = create_model("mixer_pyramid_micro2", num_classes=4, image_size=16, token_mix="full")
    assert made.config.stage_mixing == "full"
    made = create_model("mixer_pico2", num_classes=4, image_size=8, token_mixing="pyramid", token_groups=2)
    assert made.config.token_mixing == "shrinking"
    with pytest.raises(UsageError, match="no token mixing 'pyramid'") as found:
        mixer_config(
            ModelConfig(name="mixer_pico2", token_mixing="pyramid"), num_classes=4, image_size=(8, 8)
        )
    assert "shrinking" in str(found.value.hint)


def test_a_run_that_a_retired_key_trained_is_measured_and_not_resumed(tmp_path):
    run = tmp_path / "run"
    mixlab.train(
        "digits",
        "digits",
        run=run,
        steps=2,
        epochs=None,
        threads=1,
        screen=QUIET,
        figures=False,
        with_pictures=False,
    )
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(re.sub(r"(?m)^(skip_nonfinite = .*)$", r"\1\ncoarse_share = 0.4", text))
    assert evaluate(str(run), screen=QUIET)[0].num_images == 357
    with pytest.raises(UsageError, match="coarse_share is no longer there"):
        mixlab.resume(run, screen=QUIET, figures=False)


def test_every_key_of_a_recipe_is_read_and_written_again():
    values = from_toml(OLD / "every_key.toml")
    assert values.keys() - recipe_keys().keys() == RETIRED.keys() | {"model.token_mix"}
    assert len(values) > 95
    recipe = override(Recipe(), values)
    written = (OLD / "every_key.toml").read_text().replace("token_mix =", "stage_mixing =")
    gone = [f"{key.split('.')[-1]} =" for key in RETIRED]
    kept = [line for line in written.splitlines() if not any(line.startswith(start) for start in gone)]
    assert tomllib.loads(before_sounds(to_toml(recipe))) == tomllib.loads("\n".join(kept))

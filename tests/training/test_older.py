"""What commit e2cad5a wrote still opens: a run stopped in mid-epoch, weights of each family, a recipe with every key.

tests/fixtures/e2cad5a/README.md says how it was made.
"""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mixlab
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from mixlab.training.keys import from_toml, override, recipe_keys, to_toml
from mixlab.training.recipe import Recipe

OLD = Path(__file__).parents[1] / "fixtures" / "e2cad5a"
QUIET = Screen(quiet=True)


def test_a_run_that_was_stopped_in_mid_epoch_goes_on_to_where_it_would_have_come(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLD / "stopped", run)
    before = [row for row in read_run_log(run / "metrics.jsonl") if row["event"] == "train"]
    result = mixlab.resume(run, screen=QUIET)
    recipe = override(Recipe(), from_toml(run / "recipe.toml"))
    assert result["steps"] == recipe.steps > 14
    rows = [row for row in read_run_log(run / "metrics.jsonl") if row["event"] == "train"]
    assert rows[: len(before)] == before
    whole = mixlab.train(recipe, run=tmp_path / "whole", screen=QUIET)
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


def test_every_key_of_a_recipe_is_read_and_written_again():
    values = from_toml(OLD / "every_key.toml")
    assert values.keys() <= recipe_keys().keys()
    assert len(values) > 95
    recipe = override(Recipe(), values)
    assert tomllib.loads(to_toml(recipe)) == tomllib.loads((OLD / "every_key.toml").read_text())

"""What a program finds at the top of mixlab."""

import os

import numpy as np
import pytest
from PIL import Image

import mixlab
from mixlab.errors import UsageTypeError
from mixlab.models.catalog import ModelConfig
from mixlab.recipes import RECIPES
from mixlab.report.screen import Screen
from mixlab.training.recipe import Recipe

OPTIONS = {"screen": Screen(quiet=True), "threads": 1, "steps": 4, "figures": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return mixlab.train("digits", run=tmp_path_factory.mktemp("runs") / "<run>", **OPTIONS)


def test_a_run_is_its_result_and_its_folder(run):
    assert run.path == run.report.parent
    assert run.report.is_file()
    assert run["steps"] == run.result["steps"] == 4
    assert run.test["num_correct"] == round(run.accuracy * 357)
    assert os.fspath(run) == run["run"]
    assert "95 % interval" in repr(run)
    shown = run._repr_html_()
    assert "<b>&lt;run&gt;</b>: test accuracy" in shown
    assert f'href="{run.report.absolute().as_uri()}"' in shown


def test_a_run_is_taken_where_a_run_is(run):
    classifier = run.load()
    assert repr(classifier) == "Classifier(Mixer, 10 classes (0, 1, 2, 3, 4, ...), input 8 x 8 x 1)"
    assert mixlab.evaluate(run, screen=Screen(quiet=True)).num_correct == run.test["num_correct"]
    with pytest.raises(mixlab.MixlabError, match="there is no target 'x'"):
        mixlab.export(run, to="x")


@pytest.mark.parametrize("given", ["auto", "small_data", Recipe()], ids=str)
def test_a_recipe_in_the_place_of_the_data_is_told(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageTypeError, match="is a recipe, and the data comes first"):
        mixlab.train(given, "digits", **OPTIONS)


def test_a_folder_may_be_called_like_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"dark": 0, "light": 200}.items():
        (tmp_path / "small_data" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((8, 8, 3), value + i, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "small_data" / name / f"{i}.png")
    found = mixlab.check("small_data")
    assert (found.num_ok, found.num_bad) == (16, 0)
    assert len(mixlab.train("small_data", **OPTIONS)["test"]["per_class"]) == 2


def test_the_repr_of_a_recipe_is_what_differs():
    assert repr(Recipe()) == "Recipe()"
    recipe = Recipe(seed=3, model=ModelConfig(name="mixer_b16"))
    assert repr(recipe) in (
        "Recipe(seed=3, model__name='mixer_b16')",
        "Recipe(model__name='mixer_b16', seed=3)",
    )


def test_models_and_recipes_are_listed():
    assert {row["name"] for row in mixlab.list_recipes()} == set(RECIPES)
    assert "mixer_b16" in {row["model"] for row in mixlab.list_models()}
    assert dir(mixlab) == sorted(mixlab.__all__)

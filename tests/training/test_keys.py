"""The table of a recipe's keys, and what is made of it."""

from pathlib import Path

import pytest

from mixlab.errors import UsageError
from mixlab.recipes import RECIPES, find_recipe
from mixlab.training import keys
from mixlab.training.keys import from_toml, keys_as_markdown, override, recipe_keys, to_toml
from mixlab.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_has_a_sentence_a_level_and_the_default_of_a_new_recipe():
    values = {}
    for name in recipe_keys():
        value = Recipe()
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    for name, key in recipe_keys().items():
        assert key.sentence.endswith("."), name
        assert key.level in ("common", "more", "expert")
        assert key.default == values[name]
    assert 15 < sum(key.level == "common" for key in recipe_keys().values()) < 45


def test_the_page_of_the_settings_is_made_of_the_table():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == keys_as_markdown()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_with_comments_reads_back_equal(name, tmp_path):
    recipe = find_recipe(name)
    text = to_toml(recipe, with_comments=True)
    (tmp_path / "recipe.toml").write_text(text)
    assert override(Recipe(), from_toml(tmp_path / "recipe.toml")) == recipe
    assert f"# {recipe_keys()['optimizer.lr'].sentence}\nlr = " in text


def test_a_key_that_is_gone_is_taken_at_its_default_and_else_named(monkeypatch, tmp_path):
    monkeypatch.setattr(
        keys, "RETIRED", {"optimizer.nesterov": (False, "use sgd"), "lookahead": (0, "use ema")}
    )
    (tmp_path / "old.toml").write_text("seed = 3\nlookahead = 0\n[optimizer]\nnesterov = false\n")
    assert override(Recipe(), from_toml(tmp_path / "old.toml")) == Recipe(seed=3)
    with pytest.raises(UsageError, match="nesterov is no longer there, and this recipe sets it to True"):
        override(Recipe(), {"optimizer.nesterov": True})


def test_the_curriculum_of_an_older_recipe_is_named_with_what_to_use_instead():
    for off in (
        {"coarse_share": "0"},
        {"coarse_share": "0.0", "coarse_factor": 4},
        {"optimizer.sam_from": 0.0},
    ):
        assert override(Recipe(), off) == Recipe()
    for name in ("sam_from", "optimizer.sam_from"):
        with pytest.raises(UsageError, match="sam_from is no longer there"):
            override(Recipe(), {name: "0.2"})
    with pytest.raises(UsageError, match="coarse_share is no longer there") as found:
        override(Recipe(), {"coarse_share": "0.4"})
    assert "--model.patch-size" in str(found.value.hint)

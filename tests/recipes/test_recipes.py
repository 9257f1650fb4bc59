"""What the list of recipes says, and that it says it once."""

import tomllib

import pytest

from mixlab.commands import learning
from mixlab.commands.context import Context
from mixlab.recipes import RECIPES, describe_recipe, find_recipe
from mixlab.training.keys import from_toml, override
from mixlab.training.recipe import Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_for_and_what_it_gave(name):
    row = describe_recipe(name)
    text = " ".join(RECIPES[name].__doc__.split())
    assert row["purpose"] in text
    assert 10 < len(row["purpose"]) < 120
    assert row["result"]
    assert all(part in text for part in row["result"].split(". "))
    assert row["is_measured"] == ("(n=" in text)


def test_purpose_and_result_may_share_a_sentence_or_not(monkeypatch):
    def one():
        """Dots: 98.4 +- 0.6 % (n=5), 2 cores, commit abc. It is quick."""

    def several():
        """Cats, and dogs.

        Not yet measured here: Lee et al. 2020 give 71.0 % (Table 3).

        Cats at 64 pixels: 71.2 % (n=3:
        71, 72). Source: a book. Dogs not yet measured.
        """

    monkeypatch.setitem(RECIPES, "one", one)
    monkeypatch.setitem(RECIPES, "several", several)
    assert describe_recipe("one") == {
        "name": "one", "purpose": "Dots", "result": "98.4 +- 0.6 % (n=5), 2 cores, commit abc.", "is_measured": True,
    }  # fmt: skip
    assert describe_recipe("several") == {
        "name": "several",
        "purpose": "Cats, and dogs",
        "result": "Not yet measured here: Lee et al. 2020 give 71.0 % (Table 3). "
        "Cats at 64 pixels: 71.2 % (n=3: 71, 72). Dogs not yet measured.",
        "is_measured": True,
    }


def test_what_is_expected_only_is_not_called_measured():
    row = describe_recipe("pretrain_imagenet1k")
    assert row["is_measured"] is False
    assert row["result"].startswith("Not yet measured here: the paper gives 76.44 %")


def test_the_command_lists_all_and_prints_one_that_can_be_trained_with(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Context, "json", False)
    learning.recipes()
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    learning.recipes("pretrain_imagenet1k_gsam")
    text = capsys.readouterr().out
    assert tomllib.loads(text)["optimizer"]["sam_rho"] == 0.5
    (tmp_path / "printed.toml").write_text(text)
    assert override(Recipe(), from_toml(tmp_path / "printed.toml")) == find_recipe("pretrain_imagenet1k_gsam")

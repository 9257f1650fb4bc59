"""What the list of recipes says, and that it says it once."""

import re
import tomllib

import pytest

from benchmarks.pages import read_results
from mixlab.commands import learning
from mixlab.commands.context import Context
from mixlab.recipes import QUICK, RECIPES, SLOW, describe_recipe, find_recipe
from mixlab.training.keys import from_toml, override
from mixlab.training.recipe import Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_for_and_what_it_gave(name):
    row = describe_recipe(name)
    assert list(row) == ["name", "purpose", "result", "is_measured"]
    assert 10 < len(row["purpose"]) < 120
    assert row["result"].startswith("Not yet measured here: ") != row["is_measured"]
    figure = re.search(r"\d\d\.\d+( \+- [\d.]+)? %", row["result"])[0]
    assert figure in " ".join(RECIPES[name].build.__doc__.split()), "the docstring has another figure"


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].is_measured])
def test_what_a_recipe_gave_is_a_row_of_the_results(name):
    rows = [row for row in read_results("accuracy") if row["recipe"] == name]
    machines = {"A": SLOW, "C": QUICK}
    said = [
        f"{row['accuracy']} +- {row['sd']} % (n={row['n']}), {machines[row['machine']]}, commit {row['commit']}"
        for row in rows
        if row["machine"] in machines
    ]
    assert RECIPES[name].result.split(": ")[-1] in said


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

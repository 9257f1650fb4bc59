"""Help at the command line: groups, examples, keys of a recipe, and what a shell completes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixlab.cli import COMMANDS, run_command
from mixlab.errors import UsageError
from mixlab.recipes import RECIPES, compose, find_recipe
from mixlab.training.keys import ALIASES, full_key, override, recipe_keys
from mixlab.training.recipe import Recipe
from tests.forked import mixlab


def said(capsys, *words):
    """What a command prints, in one line, without the frames of its tables."""
    assert run_command(list(words)) == 0
    return " ".join(re.sub(r"[│┃╭╮╰╯─━]", " ", capsys.readouterr().out).split())


def test_the_first_help_has_every_command_in_its_group_with_a_sentence(capsys):
    assert list(COMMANDS) == ["Start", "Use", "Share", "Research", "Machine"]
    assert run_command([]) == 0
    lines = capsys.readouterr().out.splitlines()
    title, found = "", {}
    for line in lines:
        if line.startswith("╭"):
            title = line.strip("╭─╮ ")
        elif entry := re.match(r"│ ([a-z]+) +(\S.*?) *│$", line):
            found.setdefault(title, {})[entry[1]] = entry[2]
    assert {group: list(names) for group, names in found.items()} == {
        group: list(names) for group, names in COMMANDS.items()
    }
    examples = [line.split("#")[0].split() for line in lines if line.startswith("mixlab ")]
    assert [example[1] for example in examples] == ["train", "train", "predict"]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_the_help_of_a_training_has_the_common_keys_with_default_and_sentence(command, capsys):
    short, whole = said(capsys, command, "--help"), said(capsys, command, "--help-all")
    for key in recipe_keys().values():
        if command == "finetune" and key.name == "init_from":
            assert f"{key.option} " not in whole  # it is --weights
            continue
        assert f"{key.option} " in whole
        assert (f"{key.option} " in short) == (key.level == "common"), key.name
    assert "--optimizer.lr --lr" in short
    assert "Highest learning rate. [default: 0.001]" in short
    assert "[choices: adamw, sgd, muon]" in short
    assert "--help-all" in short
    assert "--recipe" in short


def test_a_key_is_explained_with_its_names_its_default_and_what_recipes_have(capsys):
    text = said(capsys, "keys", "lr")
    key = recipe_keys()["optimizer.lr"]
    assert key.sentence in text
    assert "--optimizer.lr, --lr, --learning-rate" in text
    assert "takes a number; default 0.001" in text
    for name in RECIPES:
        lr = find_recipe(name).optimizer.lr
        assert (f"the recipe {name} has {lr}" in text) == (lr != key.default)
    assert "under [optimizer]" in text
    assert said(capsys, "keys", "optimizer.lr") == said(capsys, "keys", "learning-rate") == text


def test_keys_are_listed_common_all_or_of_a_part():
    known = recipe_keys()

    def listed(*words):
        done = mixlab("keys", *words, "--json", cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        return [row["key"] for row in json.loads(done.stdout)["keys"]]

    assert listed() == [name for name, key in known.items() if key.level == "common"]
    assert listed("--all") == list(known)
    assert listed("schedule") == [name for name in known if name.startswith("schedule.")]
    with pytest.raises(UsageError) as error:
        run_command(["keys", "optimiser"])
    assert error.value.hint == "did you mean 'optimizer'?"


def test_what_a_key_is_called_elsewhere_is_taken_for_it():
    values = {"learning_rate": "0.5", "epoch": "3", "batch": "16", "workers": "2"}
    assert set(values) == set(ALIASES)
    assert not set(values) & {name.split(".")[-1] for name in recipe_keys()}
    found = override(Recipe(), values)
    assert (found.optimizer.lr, found.epochs, found.batch_size, found.data.num_workers) == (0.5, 3.0, 16, 2)
    assert compose("digits", overrides={"epoch": 2}).epochs == 2.0
    for name in ("learning_rat", "work"):
        with pytest.raises(UsageError) as error:
            full_key(name)
        assert "did you mean" in error.value.hint


def test_a_grid_of_learning_rates_and_a_rate_by_any_name_are_one_too_many():
    for option in ("--lr", "--optimizer.lr", "--learning-rate"):
        words = ["finetune", "digits", "--weights", "x", "--lr-grid", "0.1,0.2", option, "0.1"]
        with pytest.raises(UsageError, match="--lr-grid sets"):
            run_command(words)


@pytest.fixture
def script(tmp_path, capsys):
    path = tmp_path / "new" / "mixlab.bash"
    assert run_command(["--install-completion", "--shell", "bash", "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out.replace("\n", "")
    assert [found.name for found in tmp_path.iterdir()] == ["new"]
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pred"], {"predict"}),
        (["train", "--optimizer.l"], {"--optimizer.lr", "--optimizer.layer-decay"}),
        (["train", "--learning"], {"--learning-rate"}),
        (["finetune", "--lr-"], {"--lr-grid", "--lr-share"}),
        (["train", "--optimizer.name", "m"], {"muon"}),
        (["keys", "--a"], {"--all"}),
    ],
)
def test_bash_completes_commands_options_keys_and_choices(words, expected, script):
    code = (
        f"source {script}; COMP_WORDS=(mixlab {' '.join(words)}); COMP_CWORD={len(words)}; _mixlab; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_completion_that_cannot_be_written_is_an_error_that_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "mixlab", "--install-completion", "--shell", "bash", "--output"]
    done = subprocess.run(
        [*command, str(tmp_path / "file" / "x")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "could not write" in done.stderr
    assert "--output" in done.stderr
    assert "Traceback" not in done.stderr

"""benchmarks/transfer.py: the two starts of a cell differ in nothing else, and finished cells stay."""

from dataclasses import replace
from pathlib import Path

import pytest

import mixlab
from benchmarks import transfer
from mixlab.checkpoint.open import open_weights
from mixlab.report.screen import Screen
from mixlab.training.keys import from_toml


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A run of two steps on digits, of a size that no name has."""
    run = tmp_path_factory.mktemp("start") / "run"
    mixlab.train("digits", "digits", run=run, steps=2, threads=1, screen=Screen(quiet=True), figures=False,
                 image_size=(12, 12), model__name="mixer_custom4", model__num_blocks=1, model__hidden_dim=8,
                 model__token_mlp_dim=4, model__channel_mlp_dim=12)  # fmt: skip
    return run


def test_cells_become_rows_once_and_differ_in_their_start_only(weights, tmp_path, capsys):
    arguments = [
        str(weights), "--targets", "digits", "--fractions", "0.1", "--seeds", "1", "--steps", "2",
        "--batch-size", "16", "--threads", "1", "--lr-grid", "0.01,0.03",
        "--csv", str(tmp_path / "t.csv"), "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip
    transfer.main(arguments)
    rows = transfer.read_rows(tmp_path / "t.csv")
    assert [(row["start"], row["recipe"]) for row in rows] == [
        ("weights", "finetune"),
        ("scratch", "small_images_flat"),
    ]
    assert [row["num_train"] for row in rows] == ["109", "109"]
    assert all(float(row["lr"]) in (0.01, 0.03) for row in rows)
    assert "| digits | 10% | 2 |" in capsys.readouterr().out
    runs = [tmp_path / "runs" / f"digits-0.1-0-{start}-2" for start in ("weights", "scratch")]
    assert (runs[0] / "split.csv").read_text() == (runs[1] / "split.csv").read_text()
    one, other = (from_toml(run / "recipe.toml") for run in runs)
    kept = ("optimizer.", "schedule.", "loss.", "name", "init_from", "model.branch_init_scale", "ema_decay")
    differing = {key for key in one | other if one.get(key) != other.get(key)}
    assert not [key for key in differing if not key.startswith(kept)]
    assert other["model.hidden_dim"] == 8
    assert open_weights(runs[1]).preprocess == open_weights(runs[0]).preprocess
    before = (tmp_path / "t.csv").read_text()
    transfer.main(arguments)  # the folders of the runs exist: to train again would be an error
    assert (tmp_path / "t.csv").read_text() == before


def test_the_table_compares_seeds_that_both_starts_have():
    row = dict.fromkeys(transfer.COLUMNS, "") | {"target": "t", "fraction": "0.1", "steps": "20"}
    rows = [
        row | {"start": start, "seed": seed, "top1": top1}
        for start, seed, top1 in (
            ("scratch", "0", "0.5"), ("weights", "0", "0.7"), ("scratch", "1", "0.6"), ("weights", "1", "0.7"),
            ("weights", "2", "0.1"),
        )
    ]  # fmt: skip
    line = transfer.table(rows).splitlines()[-1]
    assert "55.00 +- 7.07 % (n=2)" in line
    assert "70.00 +- 0.00 % (n=2)" in line
    assert "+15.00 (+10.00 to +20.00)" in line


def test_a_grey_target_meets_colour_weights_in_both_starts(weights):
    opened = open_weights(weights)
    colour = replace(
        opened, preprocess=replace(opened.preprocess, channels=3, mean=(0.4,) * 3, std=(0.2,) * 3)
    )
    cell = dict(zip(transfer.CELL, ("digits", 1.0, 0, "scratch", 5), strict=True))
    for start in transfer.STARTS:
        recipe = transfer.recipe_of(cell | {"start": start}, colour, "w", batch_size=8)
        assert (recipe.data.channels, recipe.data.mean, recipe.data.image_size) == (3, (0.4,) * 3, (12, 12))
        assert (recipe.steps, recipe.batch_size, recipe.augment.flip) == (5, 8, False)
        assert recipe.init_from == ("w" if start == "weights" else None)

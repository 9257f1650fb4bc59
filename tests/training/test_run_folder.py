"""Runs as they stand in a folder."""

import json
from pathlib import Path

from mixlab.training.run_folder import list_runs


def write_run(folder: Path, *rows: dict) -> None:
    folder.mkdir()
    (folder / "recipe.toml").touch()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_test_split_does_not_decide_which_run_is_best(tmp_path):
    validation, end = {"event": "validation", "step": 5}, {"event": "end", "step": 9, "seconds": 3.0}
    write_run(tmp_path / "lucky", validation | {"top1": 0.70}, end | {"test": {"top1": 0.80}})
    write_run(tmp_path / "better", validation | {"top1": 0.72}, end | {"test": {"top1": 0.75}})
    write_run(tmp_path / "all-images", end | {"test": {"top1": 0.90}})
    write_run(tmp_path / "fewer-images", end | {"test": {"top1": 0.60}})
    write_run(tmp_path / "begun")
    order = ["better", "lucky", "all-images", "fewer-images", "begun"]
    assert [Path(row["run"]).name for row in list_runs(tmp_path)] == order

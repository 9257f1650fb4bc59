"""benchmarks/recipes.py: every cell is a recipe, finished cells stay, and what is chosen on sees no test split."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import recipes as groups
from benchmarks.cells import read_rows
from mixlab.cpu.describe import describe_settings
from mixlab.models.catalog import create_model
from mixlab.recipes import compose


@pytest.fixture
def data(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for number, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 150, (16, 16, 3))
                pixels[..., number] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g, group in groups.GROUPS.items() for n in group.names]
)
def test_every_cell_is_a_recipe(group, name):
    options = groups.options_of(groups.GROUPS[group], name, seed=3)
    kind = options.pop("recipe")
    recipe = compose("somewhere", recipe=kind, overrides=options, has_budget=True)
    assert recipe.seed == 3
    assert (recipe.data.val_fraction == 0) == (groups.GROUPS[group].split == "test")


def test_the_models_compared_at_equal_cost_cost_the_same():
    flat = {key.removeprefix("model."): value for key, value in groups.EQUAL_FLAT.items()}
    wanted = describe_settings({"name": "mixer_pyramid_mini2", "num_classes": 10}, batch_size=1)["macs"]
    size = {"num_classes": 10, "image_size": (32, 32)}
    for settings in (flat, *({"name": found["model.name"]} for found in groups.TIMM.values())):
        assert describe_settings(settings | size, batch_size=1)["macs"] == pytest.approx(wanted, rel=0.03)
    ours, theirs = create_model(**flat, **size), create_model("timm/baseline_mixer_mini", **size)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


class Commands:
    """In place of commands that train: `given` has them, with the splits of their data. A run has eight answers."""

    def __init__(self) -> None:
        self.given: list[tuple[list[str], list[str]]] = []

    def __call__(self, command: list[str]) -> str:
        place, run = Path(command[4]), Path(command[-1].removeprefix("--run="))
        self.given.append((command, sorted(path.name for path in place.iterdir())))
        run.mkdir(parents=True)
        (run / "split.csv").write_text(
            "path,label,split\nx,a,train\n" + "".join(f"{i},a,val\n" for i in range(8))
        )
        tops = enumerate((0.25, 0.75, 0.5), start=1)
        rows = [{"event": "validation", "step": step, "top1": top} for step, top in tops]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        environment = {"commit": "abc", "cores": 2, "cpu": "x", "cpu_capability": "y"}
        (run / "environment.json").write_text(json.dumps(environment))
        result = {"steps": 7, "epochs": 1.0, "images_per_second": 10.0, "num_parameters": 5}
        return json.dumps(result | {"test": {"num_images": 30, "num_correct": 21}})


def test_cells_become_rows_once_and_followers_take_the_steps_of_the_first(data, tmp_path):
    names = {"first": {}, "other": {"augment.cutmix_alpha": 1.0}}
    group = groups.Group("30s", "test", 1, names, {"recipe": "small_images_flat"}, "first")
    file, commands = tmp_path / "rows.csv", Commands()

    def measure():
        groups.main([str(data), "g", "--csv", str(file)], {"g": group}, commands)

    measure()
    first, other = read_rows(file)
    assert (first["name"], other["name"]) == ("first", "other")
    assert (first["accuracy"], first["num_images"], first["steps"]) == ("0.7", "30", "7")
    assert "--budget=30s" in first["options"]
    assert "--augment.cutmix_alpha=1.0" in other["options"]
    assert "--steps=7" in other["options"]
    assert [splits for _, splits in commands.given] == 2 * [["test", "train"]]
    measure()
    assert len(commands.given) == 2
    assert "70.00 % (n=1)" in groups.table(read_rows(file))
    # what a slower machine reaches in the same minutes is another row
    file.write_text(file.read_text().replace(first["machine"], "elsewhere"))
    measure()
    assert len(commands.given) == 4


def test_what_is_chosen_on_does_not_see_the_test_split(data, tmp_path):
    commands = Commands()
    tiny = {"recipe": "small_images_flat", "model.name": "mixer_pico4", "batch_size": 16}
    group = groups.Group("9s", "val", 1, {"a": {}}, tiny)
    groups.main([str(data), "g", "--csv", str(tmp_path / "rows.csv")], {"g": group}, commands)
    (row,) = read_rows(tmp_path / "rows.csv")
    ((_, splits),) = commands.given
    assert splits == ["train"]
    assert (row["num_correct"], row["num_images"]) == ("6", "8")


def test_a_teacher_is_a_run_that_was_kept(data, tmp_path, monkeypatch):
    names = {"plain": {}, "distilled": {"distill.teacher": "teacher-a-0"}}
    group, commands = groups.Group("9s", "val", 1, names, {"recipe": "small_images"}), Commands()
    monkeypatch.chdir(tmp_path)
    groups.main([str(data), "g", "--csv", "rows.csv", "--runs", "runs"], {"g": group}, commands)
    plain, distilled = (command for command, _ in commands.given)
    assert not [word for word in plain if "teacher" in word]
    assert f"--distill.teacher={tmp_path / 'runs' / 'teacher-a-0'}" in distilled
    with pytest.raises(SystemExit, match="--runs"):
        groups.main([str(data), "g", "--csv", "other.csv"], {"g": group}, commands)
    assert len(commands.given) == 2  # refused before anything was trained

"""The real command, as a person types it: results, `--json`, exit statuses, and errors without tracebacks."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixlab.cli import _guarded
from tests.forked import ENVIRONMENT, MIXLAB, mixlab


def answer(result: subprocess.CompletedProcess) -> dict:
    """The one JSON object on standard output."""
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 1, result.stdout + result.stderr
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a finished run `runs/first`, of digits, and what it printed."""
    folder = tmp_path_factory.mktemp("place")
    result = mixlab(
        "train", "digits", "--steps", "30", "--run", "first", "--threads", "1", "--json", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    (folder / "train.json").write_text(result.stdout)
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / f"picture{i}.png")
    return folder


def test_memory_that_runs_out_anywhere_is_no_fault_of_mixlab(capsys):
    assert _guarded(lambda: torch.empty(1 << 48).size(0)) == 1
    said = capsys.readouterr().err
    assert "memory ran out" in said
    assert "--batch-size" in said
    assert "fault of mixlab" not in said


def test_train_prints_one_json_object_with_the_promised_names(place):
    values = json.loads((place / "train.json").read_text())
    assert {"run", "num_parameters", "epochs", "steps", "seconds", "images_per_second", "test"} <= set(values)
    assert values["steps"] == 30
    assert {"num_images", "num_correct", "top1", "top5", "loss", "ece", "per_class"} <= set(values["test"])
    assert 0 < values["test"]["top1"] < 1
    assert (place / values["report"]).is_file()


def test_evaluate_repeats_the_test_result_of_training(place):
    values = answer(mixlab("evaluate", "first", "--threads", "1", "--json", cwd=place))
    trained = json.loads((place / "train.json").read_text())["test"]
    assert values["num_correct"] == trained["num_correct"]
    assert values["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    assert [row["label"] for row in values["per_class"]] == list("0123456789")
    other = answer(mixlab("evaluate", "runs/first", "--split", "val", "--json", cwd=place))
    assert other["num_images"] != values["num_images"]


def test_evaluate_names_the_nearest_split(place):
    result = mixlab("evaluate", "first", "--split", "tset", cwd=place)
    assert result.returncode == 2
    assert "did you mean 'test'" in result.stderr


def test_predict_answers_for_files_folders_and_failures(place):
    values = answer(
        mixlab("predict", "first", "picture0.png", "picture*.png", "--top", "3", "--json", cwd=place)
    )
    assert values["num_ok"] == 4
    assert values["num_bad"] == 0
    assert [len(image["predictions"]) for image in values["images"]] == [3, 3, 3, 3]
    assert {"label", "probability"} == set(values["images"][0]["predictions"][0])
    (place / "bad").mkdir()
    (place / "bad" / "broken.png").write_bytes(b"broken")
    result = mixlab("predict", "first", "picture1.png", "bad", "--csv", "out.csv", "--json", cwd=place)
    assert result.returncode == 1
    values = answer(result)
    assert (values["num_ok"], values["num_bad"]) == (1, 1)
    assert values["images"][1]["error"]
    assert len((place / "out.csv").read_text().splitlines()) == 1 + 5 + 1


def test_predict_prints_a_table_for_a_person(place):
    result = mixlab("predict", "first", "picture0.png", cwd=place)
    assert result.returncode == 0
    assert "picture0.png" in result.stdout
    assert "%" in result.stdout


def test_info_runs_models_recipes_and_doctor_speak_json(place):
    facts = answer(mixlab("info", "mixer_b16", "--json", cwd=place))
    assert facts["num_parameters"] == 59_880_472
    assert facts["macs"] == 12_601_933_824 or facts["macs"] == pytest.approx(12.60e9, rel=1e-3)
    assert facts["num_patches"] == 196
    assert facts["flops"] == 2 * facts["macs"]
    assert answer(mixlab("info", "first", "--json", cwd=place))["num_classes"] == 10
    larger = answer(mixlab("info", "mixer_b16", "--batch-size", "64", "--json", cwd=place))
    assert larger["training_bytes"] > 2 * facts["training_bytes"]
    assert 3e8 < facts["process_bytes"] < 3e9
    runs = answer(mixlab("runs", "--json", cwd=place))["runs"]
    assert [row["run"] for row in runs] == ["runs/first"]
    assert runs[0]["finished"] is True
    names = [row["model"] for row in answer(mixlab("models", "--json", cwd=place))["models"]]
    assert "mixer_h14" in names
    recipes = answer(mixlab("recipes", "--json", cwd=place))["recipes"]
    assert {"digits", "finetune", "pretrain_imagenet1k"} <= {row["name"] for row in recipes}
    one = answer(mixlab("recipes", "finetune", "--json", cwd=place))
    assert one["recipe"]["optimizer"]["lr"] == 0.03
    assert answer(mixlab("doctor", "--json", cwd=place))["versions"]["torch"]


def test_check_counts_names_bad_files_and_fails_if_there_are_any(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8 + i, 9), (40 * i, 10, len(name) * 20)).save(
                tmp_path / "data" / name / f"{i}.png"
            )
    assert answer(mixlab("check", "data", "--json", cwd=tmp_path))["num_ok"] == 6
    (tmp_path / "data" / "cat" / "1.png").write_bytes(b"")
    result = mixlab("check", "data", "--json", cwd=tmp_path)
    assert result.returncode == 1
    values = answer(result)
    assert (values["num_ok"], values["num_bad"]) == (5, 1)
    assert set(values["classes"]) == {"cat", "dog"}
    assert values["bad"][0]["path"].endswith("1.png")
    assert values["bad"][0]["reason"]
    assert "1.png" in mixlab("check", "data", cwd=tmp_path).stdout


def picture_folder(root: Path, *classes: str, number: int = 12, side: int = 8) -> None:
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.new("RGB", (side, side), (20 * i % 256, 90 * k % 256, 5)).save(root / name / f"{i}.png")


def bad_uses(root: Path) -> dict[str, tuple[list[str], int, str]]:
    """name -> (arguments, exit status, what the message must hold)."""
    picture_folder(root / "good", "a", "b")
    picture_folder(root / "lonely", "only")
    picture_folder(root / "twins", "Cat", "cat")
    picture_folder(root / "flat", "x")
    for path in (root / "flat" / "x").iterdir():
        path.rename(root / "flat" / path.name)
    (root / "flat" / "x").rmdir()
    (root / "empty").mkdir()
    (root / "table.csv").write_text("file,class\nx.png,a\n")
    train = ["train", "good", "--steps", "1"]
    return {
        "no command": (["trian"], 2, "train"),
        "no data": (["train"], 2, "no data set is named"),
        "missing path": (["train", "nowhere/at/all"], 2, "no such folder"),
        "unknown set": (["train", "digit"], 2, "digits"),
        "empty folder": (["train", "empty"], 1, "no images"),
        "no class folders": (["train", "flat"], 1, "without class folders"),
        "one class": (["train", "lonely"], 1, "only one class"),
        "same name in other case": (["train", "twins"], 1, "differ only in case"),
        "wrong csv": (["train", "table.csv"], 1, "no column 'path'"),
        "image smaller than a patch": (
            [*train, "--model", "mixer_micro16", "--image-size", "8"],
            2,
            "smaller than one patch",
        ),
        "no multiple of the patch": (
            [*train, "--model", "mixer_micro4", "--image-size", "30"],
            2,
            "28 or 32",
        ),
        "unknown recipe": ([*train, "--recipe", "small_image"], 2, "small_images"),
        "unknown model": ([*train, "--model", "mixer_b61x"], 2, "mixer_b16"),
        "unknown timm model": ([*train, "--model", "timm/resnet81"], 2, "resnet18"),
        "unknown key": ([*train, "--optimizer.lrr", "1"], 2, "optimizer.lr"),
        "wrong value": ([*train, "--optimizer.lr", "fast"], 2, "takes a number"),
        "one argument too many": ([*train, "more"], 2, "more"),
        "wrong budget": (["train", "good", "--budget", "soon"], 2, "length of time"),
        "budget too small": (["train", "good", "--budget", "1s"], 2, "no time to train"),
        "budget and steps": ([*train, "--budget", "1m"], 2, "sets the steps itself"),
        "unknown device": ([*train, "--device", "gpu"], 2, "auto, cpu"),
        "no such recipe file": ([*train, "--config", "missing.toml"], 2, "no such recipe file"),
        "unknown tracker": ([*train, "--tracker", "paper"], 2, "tensorboard or wandb"),
        "cifar10 that is not there": (["train", "cifar10"], 1, "--download"),
        "evaluate what is no run": (["evaluate", "good"], 1, "config.json is missing"),
        "predict with a run that is not there": (["predict", "nothing", "x.png"], 1, "no such run"),
        "predict without images": (["predict", "good"], 2, "no image"),
        "resume what is no run": (["train", "--resume", "nothing"], 2, "no run to resume"),
        "resume with other settings": (
            ["train", "--resume", "nothing", "--lr", "1"],
            2,
            "takes no other setting",
        ),
        "info on nothing": (["info", "mixer_q16"], 2, "no model called"),
    }


def test_bad_use_is_answered_clearly_and_leaves_nothing_behind(tmp_path):
    cases = bad_uses(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, (arguments, status, words) in cases.items():
        # One process for all: each would spend seconds importing torch.
        result = in_process(arguments, tmp_path)
        assert result["status"] == status, (name, result)
        assert words in result["stderr"], (name, result["stderr"])
        assert "Traceback" not in result["stderr"], name
        assert result["stdout"] == "", (name, result["stdout"])
        as_json = in_process([*arguments, "--json"], tmp_path)
        error = json.loads(as_json["stdout"])["error"]
        assert set(error) == {"kind", "message", "where", "hint"}, name
        assert as_json["status"] == status, name
    assert sorted(tmp_path.rglob("*")) == before


def in_process(arguments: list[str], cwd: Path) -> dict:
    import contextlib
    import io

    from mixlab.cli import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main(arguments)
        except SystemExit as stop:
            return {"status": stop.code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    raise AssertionError("main returned")


def test_a_run_that_exists_and_weights_of_another_model_are_refused(place):
    result = in_process(["train", "digits", "--steps", "1", "--run", "first"], place)
    assert result["status"] == 2
    assert "exists already" in result["stderr"]
    import shutil

    shutil.copytree(place / "runs" / "first", place / "runs" / "mixed")
    config = json.loads((place / "runs" / "mixed" / "config.json").read_text())
    config["model"]["num_blocks"] = 7
    (place / "runs" / "mixed" / "config.json").write_text(json.dumps(config))
    result = in_process(["evaluate", "mixed"], place)
    shutil.rmtree(place / "runs" / "mixed")
    assert result["status"] == 1
    assert "not what was written with these weights" in result["stderr"]


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_file(tmp_path):
    """A limit on file size stands in for the disk: writing past it fails as a full disk does."""
    result = mixlab(
        "train",
        "digits",
        "--steps",
        "3",
        "--run",
        "full",
        "--threads",
        "1",
        cwd=tmp_path,
        max_file_bytes=200_000,
    )
    assert result.returncode == 1
    assert "could not write" in result.stderr
    assert "Traceback" not in result.stderr
    left = [path for path in (tmp_path / "runs" / "full").rglob("*") if path.is_file()]
    assert left
    assert not [path for path in left if path.name.endswith(".tmp") or path.suffix == ".safetensors"]


def wait_until_it_trains(process: subprocess.Popen, run: Path) -> None:
    log = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size > 500):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def test_ctrl_c_saves_the_state_exits_130_and_resume_goes_on(tmp_path):
    command = [*MIXLAB, "train", "digits", "--epochs", "2000", "--run", "cut", "--threads", "1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    wait_until_it_trains(process, tmp_path / "runs" / "cut")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in stderr
    recipe = tmp_path / "runs" / "cut" / "recipe.toml"
    checkpoints = sorted((tmp_path / "runs" / "cut" / "checkpoints").iterdir())
    step = int(checkpoints[-1].name.split("_")[1])
    recipe.write_text(
        recipe.read_text()
        .replace("steps = 34000", f"steps = {step + 3}")
        .replace("steps = 32000", f"steps = {step + 3}")
    )
    result = mixlab("train", "--resume", "cut", "--without-figures", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert answer(result)["steps"] == step + 3


def test_sigterm_to_the_whole_group_with_workers_saves_and_exits_143(tmp_path):
    picture_folder(tmp_path / "data", "a", "b", number=20)
    options = [
        "--in-memory",
        "false",
        "--num-workers",
        "2",
        "--threads",
        "1",
        "--epochs",
        "100000",
        "--run",
        "cut",
    ]
    process = subprocess.Popen(
        [*MIXLAB, "train", "data", *options],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip
    wait_until_it_trains(process, tmp_path / "runs" / "cut")
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert list((tmp_path / "runs" / "cut" / "checkpoints").glob("step_*"))


def test_the_same_folder_is_split_the_same_way_and_evaluated_on_its_own_test_part(tmp_path):
    picture_folder(tmp_path / "data", "a", "b", number=20)
    for run in ("one", "two"):
        result = in_process(
            ["train", "data", "--steps", "2", "--run", run, "--threads", "1", "--without-figures", "--json"],
            tmp_path,
        )
        assert result["status"] == 0, result["stderr"]
    assert (tmp_path / "runs/one/split.csv").read_bytes() == (tmp_path / "runs/two/split.csv").read_bytes()
    own = json.loads(in_process(["evaluate", "one", "--json"], tmp_path)["stdout"])
    named = json.loads(in_process(["evaluate", "one", "data", "--json"], tmp_path)["stdout"])
    assert own["num_images"] == named["num_images"] == 4


def test_a_recipe_file_repeats_a_run_to_the_bit(tmp_path):
    picture_folder(tmp_path / "data", "a", "b", number=20)
    base = ["train", "data", "--steps", "3", "--lr", "0.002", "--threads", "1", "--without-figures", "--run"]
    assert in_process([*base, "one"], tmp_path)["status"] == 0
    repeat = ["train", "--config", "runs/one/recipe.toml", "--without-figures", "--run", "two"]
    assert in_process(repeat, tmp_path)["status"] == 0
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    assert (one / "recipe.toml").read_text() == (two / "recipe.toml").read_text()
    assert (one / "weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()


def test_of_several_processes_the_first_speaks_and_others_say_only_what_is_their_own(monkeypatch, capsys):
    from mixlab import cli
    from mixlab.commands.context import emit
    from mixlab.errors import UsageError
    from mixlab.training.signals import Interrupted

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.Context, "json", True)
    emit({"a": 1})
    assert cli._fail(Interrupted(15, Path("run"), 3)) == 143
    assert capsys.readouterr() == ("", "")
    assert cli._fail(UsageError("no such folder", where="/data")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mixlab: rank 1: no such folder")
    monkeypatch.setenv("RANK", "0")
    emit({"a": 1})
    assert capsys.readouterr().out == '{"a": 1}\n'

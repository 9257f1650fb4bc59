"""What people do to image classifiers, by the real command on inputs drawn elsewhere, where these are at hand.

The same kinds are tested with inputs of our own in tests/data, tests/training and tests/serving.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import mixlab

MAKE_CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "make_cases.py"
SHORT = (
    "--steps",
    "3",
    "--threads",
    "1",
    "--without-pictures",
    "--without-figures",
    "--batch-size",
    "8",
    "--model.name",
    "mixer_pico",
)


@pytest.fixture
def case(tmp_path, request) -> Path:
    """The folder of one case, the current one of its commands."""
    if not MAKE_CASES.is_file():
        pytest.skip(f"{MAKE_CASES} is not here")
    draw = f"import sys\nsys.path.insert(0, {str(MAKE_CASES.parent)!r})\n"
    draw += "from pathlib import Path\nimport make_cases\n"
    draw += f"make_cases.{request.param}(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", draw], check=True)
    return tmp_path


def of(name: str):
    return pytest.mark.parametrize("case", [name], indirect=True)


def run(case: Path, *arguments: str, status: int = 0) -> dict:
    result = mixlab(*arguments, "--json", cwd=case)
    assert result.returncode == status, result.stdout + result.stderr
    return json.loads(result.stdout.strip().splitlines()[-1])


@of("split_folder_names")
def test_the_splits_of_kaggle_and_of_the_hub_are_seen(case):
    assert run(case, "check", "kaggle")["classes"]["glioma"] == {"train": 10, "test": 10}
    assert run(case, "check", "hub")["classes"]["cat"] == {"train": 10, "val": 10}


@of("copies_across_drawn_splits")
def test_copies_are_on_one_side(case):
    copies = run(case, "train", "rand", *SHORT, "--run", "run")["copies"]
    assert copies["num_in_train"] == {"val": 0, "test": 0}
    assert copies["num_within"] == 80


@of("moved_data")
def test_moved_data_is_found_again(case):
    own = run(case, "train", "rand", *SHORT, "--run", "run")["test"]
    linked = run(case, "evaluate", "run", "link")
    assert (linked["num_images"], linked["num_correct"], linked["num_trained_on"]) == (
        8,
        own["num_correct"],
        0,
    )
    os.rename(case / "rand", case / "there")
    assert "--data PATH" in run(case, "evaluate", "run", status=1)["error"]["hint"]
    assert run(case, "evaluate", "run", "--data", "there")["num_correct"] == own["num_correct"]
    assert (
        run(case, "train", "--resume", "run", "--data", "there", "--without-figures")["test"]["num_images"]
        == 8
    )


@of("own_runs_folder")
def test_a_run_among_the_data_is_no_class(case):
    for _ in range(2):
        trained = run(case / "data", "train", ".", *SHORT)
        assert len(trained["test"]["per_class"]) == 2
    assert trained["skipped"][0]["reason"] == "written by mixlab"
    assert run(case / "data", "evaluate", trained["run"])["num_images"] == 2
    assert (
        run(case / "data", "train", "--resume", trained["run"], "--without-figures")["test"]
        == trained["test"]
    )


@of("skipped_files")
def test_files_are_read_by_content_and_the_rest_is_counted(case):
    assert run(case, "check", "data")["num_ok"] == 20
    for path in (case / "data").rglob("*.HEIC"):
        path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    checked = run(case, "check", "data", status=1)
    assert checked["num_ok"] + checked["num_bad"] == 20
    assert checked["num_bad"] > 4
    assert (
        "cannot be read, more than the 5% allowed" in run(case, "train", "data", status=1)["error"]["message"]
    )
    for path in (case / "data").rglob("*.HEIC"):
        path.rename(path.with_suffix(".xyz"))
        path.with_suffix(".xyz").write_bytes(bytes(range(256)))
    checked = run(case, "check", "data", status=1)
    assert checked["skipped"][0]["reason"] == "of no known kind"
    assert checked["num_ok"] + checked["skipped"][0]["count"] == 20
    assert "more than the 5% allowed" in run(case, "train", "data", status=1)["error"]["message"]


@of("foreign_text")
def test_text_in_other_codings_is_refused_at_the_door(case):
    error = run(case, "train", "csv/labels_cp1252.csv", status=1)["error"]
    assert "caf\\xe9" in error["message"]
    assert error["where"].endswith("line 2")
    assert "\\xb9\\xb7 is not in UTF-8" in run(case, "train", "gbk", status=1)["error"]["message"]


@of("nfc_nfd")
def test_a_macs_names_are_linuxs(case):
    run(case, "train", "nfc", *SHORT, "--run", "run")
    assert run(case, "evaluate", "run", "nfd")["num_images"] == 20


@of("linked_folders")
def test_links_are_followed_alike_by_all(case):
    assert run(case, "check", "data")["num_ok"] == 20
    run(case, "train", "deep", *SHORT, "--run", "run")
    record = (case / "runs" / "run" / "split.csv").read_text().splitlines()
    assert len(record) == 1 + 24
    assert run(case, "predict", "run", "data")["num_ok"] == 20
    assert run(case, "evaluate", "run", "data")["num_images"] == 20


@of("hidden_folders")
def test_what_other_programs_wrote_is_left_out_by_all(case):
    checked = run(case, "check", "data")
    assert checked["num_ok"] == 6
    assert sum(one["count"] for one in checked["skipped"]) == 3
    run(case, "train", "data", *SHORT, "--run", "run")
    assert run(case, "predict", "run", "data")["num_ok"] == 6


@of("class_called_train")
def test_a_class_of_trains_is_a_class(case):
    assert list(run(case, "check", "data")["classes"]) == ["bus", "car", "train"]


@of("evaluated_sets")
def test_what_training_refuses_can_be_measured(case):
    trained = run(case, "train", "empty_in_val", *SHORT, "--run", "run", "--val-fraction", "0.2")
    assert trained["skipped"] == []
    assert run(case, "evaluate", "run", "one_known_class")["num_images"] == 5


@of("twelve_bit")
def test_twelve_bits_are_seen(case):
    assert run(case, "check", "data")["grey_max"] == 4095
    assert run(case, "train", "data", *SHORT, "--run", "run")["grey_max"] == 4095


@of("csv_dialects")
@pytest.mark.parametrize("name", ["spaces", "semicolons", "tabs", "utf16"])
def test_every_dialect_is_read(case, name):
    assert run(case, "check", f"{name}.csv")["num_ok"] == 6

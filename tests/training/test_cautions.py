"""What a training warns of: where it is said, and where it is not."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import mixlab
from mixlab.report.run_log import RunLog, read_run_log
from mixlab.report.screen import Screen
from mixlab.training.cautions import class_cautions, overfitting


def test_small_and_uneven_classes_are_named_with_their_counts():
    labels = np.repeat([0, 1, 2], [200, 4, 30])
    small, uneven = class_cautions(("cat", "owl", "dog"), labels)
    assert small.startswith("1 class has fewer than 10 training images: owl (4).")
    assert "cat has 200 training images, owl has 4" in uneven
    assert class_cautions(("cat", "owl", "dog"), np.repeat([0, 1, 2], [100, 10, 30])) == []


def log(path, train, validation, steps=4):
    file = RunLog(path / "metrics.jsonl")
    for step in range(1, steps + 1):
        file.write("train", step=step, accuracy=train)
        file.write("validation", step=step, top1=validation)
    return path


@pytest.mark.parametrize(
    ("train", "validation", "num_val", "is_said"),
    [
        (1.0, 0.5, 1000, True),
        (1.0, 0.5, 2, False),  # of two examples half says nothing
        (0.9, 0.85, 1000, False),
        (0.5, 0.9, 1000, False),
        (1.0, 0.5, 0, False),
    ],
)
def test_learning_by_heart_is_what_chance_in_validation_does_not_explain(
    train, validation, num_val, is_said, tmp_path
):
    said = overfitting(read_run_log(log(tmp_path, train, validation) / "metrics.jsonl"), num_val)
    assert (said is not None) == is_said
    if said:
        assert "100 % in training, 50 % on validation. Try more images" in said


def test_a_warning_stands_on_the_screen_in_the_report_and_in_the_object(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in {"many": 60, "few": 4}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    screen = Screen()
    screen.console.file = io.StringIO()
    options = {"recipe": "small_data", "data": str(tmp_path / "data"), "steps": 2, "threads": 1}
    result = mixlab.train(run=tmp_path / "run", screen=screen, **options)
    assert any("few (2)" in text for text in result["warnings"])
    told, report = screen.console.file.getvalue(), (tmp_path / "run" / "report.html").read_text()
    for text in json.loads(json.dumps(result["warnings"])):
        assert f"warning: {text}" in told
        assert text[1:].split(" `")[0] in report
    lines = told.splitlines()
    assert lines[0].startswith("data: data, 2 classes; ")
    assert lines[1].startswith("model: Mixer-Pyramid")
    assert "steps of" in lines[2]
    assert lines[3].startswith("kept: the best weights")
    assert any("validation accuracy" in line and "(best)  validation loss" in line for line in lines)
    assert lines[-2:] == [f"next: mixlab predict {tmp_path}/run FILE", f"      mixlab serve {tmp_path}/run"]

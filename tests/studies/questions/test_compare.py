"""`mixlab study compare`: verdicts from planted results, and the whole of it in small."""

import json
from dataclasses import replace

import pytest

from mixlab.errors import UsageError
from mixlab.report.screen import Screen
from mixlab.studies.harness import Options, conduct
from mixlab.studies.questions import compare, shuffle


def planted(mixer, vit, resnet):
    tops = {"Mixer": mixer, "ViT": vit, "ResNet": resnet}
    return {name: {str(seed): value for seed, value in enumerate(values)} for name, values in tops.items()}


PRESET = compare.PRESETS["cpu"]


def test_verdicts_follow_from_paired_differences_and_speeds():
    fast = {"Mixer": {"plain": "160.0", "fast": "200.0"}, "ViT": {"plain": "100.0", "fast": "100.0"}}
    tops = planted([0.70, 0.71, 0.70], [0.75, 0.76, 0.755], [0.70, 0.72, 0.69])
    assert [finding.verdict for finding in compare._findings(tops, fast, PRESET)] == [
        "holds",
        "open",
        "holds",
    ]
    mixed = {"Mixer": {"plain": "90.0", "fast": "200.0"}, "ViT": {"plain": "100.0", "fast": "100.0"}}
    assert compare._findings(tops, mixed, PRESET)[-1].verdict == "open"


@pytest.mark.slow  # four small trainings
def test_the_whole_study_on_digits(tmp_path):
    result = conduct(compare.STUDY, Options(out=tmp_path, smoke=True, threads=1, screen=Screen(quiet=True)))
    assert [row["model"] for row in result["tables"][0]["rows"]] == ["Mixer", "ResNet", "ViT", "pyramid"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "accuracy.png",
        "frontier.png",
        "paper.png",
        "paper_best.png",
    }
    json.dumps(result, allow_nan=False)


@pytest.mark.slow  # three small trainings
def test_the_whole_study_on_sounds(tmp_path):
    options = Options(subject="tones", out=tmp_path, smoke=True, threads=1, screen=Screen(quiet=True))
    result = conduct(compare.STUDY, options)
    rows = result["tables"][0]["rows"]
    assert [row["model"] for row in rows] == ["Mixer", "ResNet", "ViT"]
    assert all("sounds/s and core, as mixlab runs it" in row for row in rows)
    assert {len(row) for row in rows} == {8}


def test_studies_of_images_and_the_papers_models_refuse_sounds(tmp_path):
    options = Options(subject="tones", out=tmp_path / "out", smoke=True, threads=1, screen=Screen(quiet=True))
    with pytest.raises(UsageError, match="this study is for images, and the data has sounds"):
        conduct(shuffle.STUDY, options)
    with pytest.raises(UsageError, match="paper's models are for images"):
        conduct(compare.STUDY, replace(options, preset="paper"))
    assert not (tmp_path / "out").exists()

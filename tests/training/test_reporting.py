"""`mixlab report`: drawn again of the run folder alone, in either language; and what it makes of damaged folders."""

import json
import re
import shutil

import pytest
from PIL import Image

import mixlab
from mixlab.commands.learning import report
from mixlab.errors import UsageError, WeightsError
from mixlab.language import speaking
from mixlab.report.screen import Screen
from mixlab.training.conclusions import gain_at_end
from mixlab.training.reporting import draw_report, read_answers
from tests.training.seams import QUIET, TINY, Listening


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on 50 images of two colours, one more unreadable, whose data set is gone."""
    folder = tmp_path_factory.mktemp("report")
    for number in range(50):
        name = ("빨강", "blue")[number % 2]
        place = folder / "colours" / name / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200 + number, 0, 0) if name == "빨강" else (0, 0, 200 + number)).save(place)
    (folder / "colours" / "blue" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    screen = Listening()
    options = dict(steps=6, epochs=None, threads=1, **TINY)
    mixlab.train(
        str(folder / "colours"), "digits", run=folder / "run", screen=screen, language="en", **options
    )
    shutil.rmtree(folder / "colours")
    return folder / "run", screen.said


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


def test_a_report_drawn_again_is_the_same_without_the_data(run):
    first, figures = (run / "report.html").read_bytes(), sorted((run / "figures").iterdir())
    (run / "report.html").unlink()
    for path in figures:
        if path.name != "samples.png":
            path.unlink()
    assert draw_report(run, "en", QUIET)["report"] == str(run / "report.html")
    assert (run / "report.html").read_bytes() == first
    assert sorted((run / "figures").iterdir()) == figures


def test_in_korean_nothing_but_names_and_keys_stays_english(run):
    draw_report(run, "ko", QUIET)
    html = (run / "report.html").read_text()
    assert '<html lang="ko">' in html
    for sentence in ("결론", "더 좋은 모델을 얻으려면", "테스트 정확도", "mixlab이 만든 보고서입니다"):
        assert sentence in html
    visible = re.sub(r"(?s)<(style|script|details|code|table|title).*?</\1>|<[^>]*>", " ", html)
    words = set(re.findall(r"[A-Za-z]{4,}", visible))
    assert words <= {"mixlab", "Mixer", "Pico", "Digits", "colours", "blue", "runs", "split", "files"}, words


def test_the_screen_and_the_report_count_alike(trained):
    run, said = trained
    counts = re.search(r"(\d+) training, (\d+) validation, (\d+) test images", " ".join(said)).groups()
    rows = json.loads((run / "report.json").read_text())["facts"]["split_counts"]
    names = ("train", "validation", "test")
    assert [sum(row[name] for _, row in rows) for name in names] == list(map(int, counts))
    assert sum(map(int, counts)) == 50
    assert any(line.startswith("1 image could not be read and was left out") for line in said)
    assert "1 image could not be read and was left out" in (run / "report.html").read_text()


def test_few_validation_images_make_a_temperature_uncertain(trained):
    html = (trained[0] / "report.html").read_text()
    assert re.search(r"was fitted on the \d images of the validation split. With so few images that", html)


def test_the_command_takes_a_language_and_names_what_is_not_there(run, monkeypatch, capsys):
    report(str(run), lang="ko")
    assert 'lang="ko"' in (run / "report.html").read_text()
    assert f"report: {run}/report.html" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no such run"):
        report(str(run.parent / "none"))
    (run / "report.json").unlink()
    with pytest.raises(WeightsError, match=r"no report\.json") as caught:
        report(str(run))
    assert "--resume" in caught.value.hint


def test_figures_without_their_numbers_are_left_out_and_said(run):
    (run / "predictions.csv").unlink()
    screen = Listening()
    draw_report(run, "en", screen)
    assert any("predictions.csv is missing" in line for line in screen.said)
    html = (run / "report.html").read_text()
    assert "Learning curves" in html
    assert "Confusion matrix" not in html


def test_predictions_of_other_classes_are_refused(run):
    with pytest.raises(WeightsError, match=r"predictions\.csv"):
        read_answers(run, ("cat", "dog"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("facts", "per_class", [{"label": 3}]),
        ("facts", "class_names", "blue"),
        ("facts", "ece", "much"),
        ("facts", "chosen", ["a", "b"]),
        ("facts", "split_counts", [["a", 3]]),
        ("facts", "mistakes", [{"src": "https://example.org/x.png"}]),
        ("en", "headline", [["one"]]),
        ("en", "conclusions", [1]),
    ],
)
def test_a_damaged_record_is_named(run, part, key, value):
    record = json.loads((run / "report.json").read_text())
    record[part][key] = value
    (run / "report.json").write_text(json.dumps(record))
    with pytest.raises(WeightsError) as caught:
        draw_report(run, "en", QUIET)
    assert "report.json" in caught.value.where


def test_the_language_of_a_training_is_checked_before_it_begins(tmp_path):
    with pytest.raises(UsageError, match="no report in 'fr'"):
        mixlab.train("digits", run=tmp_path / "run", language="fr", screen=Screen(quiet=True))
    assert not (tmp_path / "run").exists()


def test_speaking_korean_changes_nothing_that_programs_read(run, trained):
    with speaking("ko"):
        draw_report(run, "ko", QUIET)
    for name in ("report.json", "predictions.csv", "metrics.jsonl", "config.json"):
        assert (run / name).read_bytes() == (trained[0] / name).read_bytes()


def test_the_gain_at_the_end_compares_the_last_two_fifths():
    def rows(*top1):
        return [{"event": "validation", "step": step, "top1": value} for step, value in enumerate(top1)]

    assert gain_at_end(rows(0.1, 0.2, 0.3, 0.4)) is None
    assert gain_at_end(rows(0.1, 0.2, 0.3, 0.4, 0.6)) == pytest.approx(0.2)
    assert gain_at_end(rows(*[0.1] * 6, 0.5, 0.5, 0.4, 0.4)) == pytest.approx(-0.1)

import base64
import dataclasses
import os
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixlab.errors import DiskError, MixlabError
from mixlab.language import speaking
from mixlab.report.figures import picture_grid, save_figure
from mixlab.report.page import Mistake, Report, thumbnail, write_report

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """What a browser would find: elements, attributes, text; and whether elements nest properly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    def inside(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, Path]]:
    folder = tmp_path_factory.mktemp("figures")
    figures = []
    for heading in ("Learning curves", "Confusion", "Calibration", "Samples"):
        path = folder / f"{heading}.png"
        save_figure(picture_grid([np.zeros((8, 8, 1), np.uint8)] * 5, [heading] * 5), path)
        figures.append((heading, f"What {heading} shows.", path))
    return figures


@pytest.fixture
def report(pictures: list[tuple[str, str, Path]]) -> Report:
    return Report(
        title="Digits",
        headline=[("Test accuracy", "98.3 % (354 of 360)")],
        notes=["Two files could not be read."],
        figures=pictures,
        per_class=[
            {
                "label": "cat",
                "num_images": 4,
                "num_correct": 3,
                "precision": 1.0,
                "recall": 0.75,
                "f1": 0.857,
            },
            {
                "label": "dog",
                "num_images": 0,
                "num_correct": 0,
                "precision": None,
                "recall": None,
                "f1": None,
            },
        ],
        recipe_text='[model]\nname = "mixer_digits"\n',
        environment={
            "torch": "2.10",
            "GPU": None,
            "packages": {"numpy": "2.4"},
            "threads": [1, 2],
            "amp": True,
        },
        cost=[("Training", "1 min 12 s")],
        conclusions=["It is right."],
        improvements=[("It still rose.", "mixlab train DATA --budget 4m"), ("Add some.", "")],
        next_commands=[("Use it", "mixlab predict digits FILE")],
        split_counts=[("cat", {"train": 40, "test": 4}), ("dog", {"train": 30, "test": 0})],
        mistakes=[
            Mistake(src=thumbnail(picture), name="cat/1.jpg", label="cat", predicted="dog", probability=0.93)
            for picture in (np.zeros((8, 8, 1), np.uint8), np.zeros((700, 500, 3), np.uint8))
        ],
        changed_keys=[("seed", "1", "0")],
    )


def written(report: Report, folder: Path) -> Page:
    write_report(report, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_holds_every_section_in_order(report: Report, tmp_path: Path) -> None:
    page = written(report, tmp_path)
    assert page.inside("h1") == ["Digits"]
    assert page.inside("h2") == [
        "Conclusions",
        "Next",
        "Notes",
        "Learning curves",
        "Confusion",
        "Each class",
        "Worst mistakes",
        "Calibration",
        "Samples",
        "Splits",
        "Recipe",
        "Environment",
        "Cost",
    ]
    assert page.inside("dt") == ["Test accuracy", "Use it"]
    assert page.inside("dd") == ["98.3 % (354 of 360)"]
    assert page.inside("li") == [
        "It is right.",
        "It still rose.",
        "Add some.",
        "Two files could not be read.",
    ]
    assert page.inside("h3") == ["For a better model", "With this model"]
    assert page.inside("code") == [
        "mixlab train DATA --budget 4m",
        "mixlab predict digits FILE",
        '[model]\nname = "mixer_digits"',
    ]
    cells = page.inside("td")
    assert cells[:10] == ["4", "3", "100.0\u00a0%", "75.0\u00a0%", "85.7\u00a0%", "0", "0", "–", "–", "–"]
    assert cells[10:14] == ["40", "4", "30", "0"]
    assert cells[14:16] == ["1", "0"]
    assert cells[16:] == ["2.10", "not known", "numpy 2.4", "1, 2", "yes", "1 min 12 s"]


def test_the_page_is_accessible_in_its_bones(report: Report, tmp_path: Path) -> None:
    page = written(report, tmp_path)
    assert ("html", "lang", "en") in page.attributes
    assert {"header", "nav", "main", "footer"} <= set(page.tags)
    texts = [text for _, text, _ in report.figures]
    assert page.values("alt") == [*texts[:2], "cat/1.jpg", "cat/1.jpg", *texts[2:]]
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in page.values("href")} <= set(ids)
    assert set(page.values("aria-labelledby")) <= set(ids)
    assert set(page.values("for")) <= set(ids)


def test_figures_are_embedded_whole(report: Report, tmp_path: Path) -> None:
    page = written(report, tmp_path)
    sources = page.values("src")
    embedded = [base64.b64decode(src.split(",")[1]) for src in sources[:2] + sources[4:]]
    assert embedded == [path.read_bytes() for _, _, path in report.figures]


def test_mistakes_are_small_pictures_with_their_names(report: Report, tmp_path: Path) -> None:
    page = written(report, tmp_path)
    small, large = page.values("src")[2:4]
    pictures = [Image.open(BytesIO(base64.b64decode(src.split(",")[1]))) for src in (small, large)]
    assert [picture.size for picture in pictures] == [(8, 8), (137, 192)]
    assert (small.split(";")[0], large.split(";")[0]) == ("data:image/png", "data:image/jpeg")
    assert page.inside("span") == ["cat/1.jpg", "true: cat", "predicted: dog, 93.0\u00a0%"] * 2


def test_the_page_refers_to_nothing_outside_itself(report: Report, tmp_path: Path) -> None:
    page = written(report, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "link" not in page.tags
    assert all(src.startswith(("data:image/png;base64,", "data:image/jpeg;")) for src in page.values("src"))
    assert all(href.startswith("#") for href in page.values("href"))


def test_hostile_names_are_shown_and_do_nothing(report: Report, tmp_path: Path) -> None:
    harmless = written(report, tmp_path)
    quoting = f'"><img src=x onerror=alert(1)>{HOSTILE}'
    hostile = dataclasses.replace(
        report,
        title=HOSTILE,
        headline=[(quoting, HOSTILE)],
        notes=[quoting],
        figures=[(quoting, quoting, path) for _, _, path in report.figures],
        per_class=[row | {"label": quoting} for row in report.per_class],
        recipe_text=f"</pre>{HOSTILE}",
        environment={quoting if key == "torch" else key: HOSTILE for key in report.environment},
        cost=[(HOSTILE, quoting)],
        conclusions=[quoting],
        improvements=[(quoting, HOSTILE), (quoting, "")],
        next_commands=[(HOSTILE, quoting)],
        split_counts=[(quoting, counts) for _, counts in report.split_counts],
        mistakes=[
            dataclasses.replace(one, name=quoting, label=HOSTILE, predicted=quoting)
            for one in report.mistakes
        ],
        changed_keys=[(HOSTILE, quoting, HOSTILE)],
    )
    page = written(hostile, tmp_path)
    assert page.tags == harmless.tags
    assert [name for _, name, _ in page.attributes] == [name for _, name, _ in harmless.attributes]
    assert page.inside("h1") == [HOSTILE]
    assert page.inside("li") == [quoting] * 4


def test_empty_parts_leave_no_empty_sections(tmp_path: Path) -> None:
    empty = Report(
        title="Nothing",
        headline=[],
        notes=[],
        figures=[],
        per_class=[],
        recipe_text="",
        environment={},
        cost=[],
    )
    page = written(empty, tmp_path)
    assert page.inside("h2") == []
    assert page.values("href") == []


def test_the_table_can_stand_after_another_number_of_figures(report: Report, tmp_path: Path) -> None:
    page = written(dataclasses.replace(report, figures_before_table=0), tmp_path)
    assert page.inside("h2")[:3] == ["Conclusions", "Next", "Notes"]
    assert page.inside("h2")[3:6] == ["Each class", "Worst mistakes", "Learning curves"]


def test_a_figure_that_is_missing_or_no_png_is_named(report: Report, tmp_path: Path) -> None:
    missing = dataclasses.replace(report, figures=[("Curves", "Text.", tmp_path / "gone.png")])
    with pytest.raises(MixlabError, match=r"gone\.png"):
        write_report(missing, tmp_path / "report.html")
    (tmp_path / "text.png").write_text("this is no image at all, but text")
    wrong = dataclasses.replace(report, figures=[("Curves", "Text.", tmp_path / "text.png")])
    with pytest.raises(MixlabError, match="not a PNG"):
        write_report(wrong, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_name_that_is_no_text_does_not_stop_the_report(report: Report, tmp_path: Path) -> None:
    page = written(dataclasses.replace(report, notes=[os.fsdecode(b"caf\xe9.png is broken")]), tmp_path)
    assert "caf\\udce9.png is broken" in page.inside("li")


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_page_that_cannot_be_written_leaves_the_old_one(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "report.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(DiskError, match="No space left"):
        write_report(report, path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["report.html"]


def test_the_page_is_in_the_language_that_is_spoken(report: Report, tmp_path: Path) -> None:
    with speaking("ko"):
        page = written(report, tmp_path)
    assert ("html", "lang", "ko") in page.attributes
    assert page.inside("h2")[:3] == ["결론", "다음 단계", "참고"]
    assert "75.0%" in page.inside("td")
    assert "이미지" in page.inside("th")


def test_the_examples_are_called_what_they_are(report: Report, tmp_path: Path) -> None:
    written(dataclasses.replace(report, many="recordings"), tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "images" not in html
    assert ">Recordings<" in html

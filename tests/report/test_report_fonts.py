"""Class names in any script: drawn with what is installed, whatever matplotlib remembers of it, or said as text."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager
from PIL import Image
from rich.cells import cell_len

import mixlab
from mixlab.report import fonts
from mixlab.report.figures import (
    CAPTION_WIDTH,
    LONGEST_LABEL,
    _short,
    _wrap,
    confusion_matrix,
    picture_grid,
    save_figure,
)
from mixlab.report.fonts import (
    describe_undrawable,
    drawable_names,
    families_for,
    order_families,
    pick_families,
    undrawable,
    use_fallbacks,
)
from mixlab.report.frontier import frontier
from mixlab.report.speed_figures import growth_curves
from mixlab.report.study_figures import accuracies
from tests.training.seams import Listening

NAMES = ["猫", "狗", "강아지", "ねこカフェ"]
FILES = (
    "cjk",
    "nanum",
    "sourcehan",
    "wqy",
    "ipag",
    "droidsansfallback",
    "pingfang",
    "hiragino",
    "malgun",
    "yugoth",
)
has_font = any(word in Path(path).name.lower() for path in findSystemFonts() for word in FILES)
needs_font = pytest.mark.skipif(not has_font, reason="no font for Chinese, Japanese or Korean is installed")


def forget() -> None:
    fonts._fallbacks.cache_clear()
    fonts._characters_of.cache_clear()
    fontManager._findfont_cached.cache_clear()  # of paths that it found before


@pytest.fixture
def stale(monkeypatch):
    """matplotlib with a list of fonts from before any other than its own was installed."""
    own = [
        entry
        for entry in fontManager.ttflist
        if entry.name.startswith(("DejaVu", "STIX", "cm", "Last Resort"))
    ]
    monkeypatch.setattr(fontManager, "ttflist", own)
    forget()
    yield
    forget()


@pytest.fixture
def no_fonts(stale, monkeypatch):
    monkeypatch.setattr(fonts, "findSystemFonts", list)


def test_fonts_of_all_three_scripts_come_first_and_those_of_the_region_before_others():
    installed = [
        "Zapf",
        "SimHei",
        "NanumGothic",
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Noto Sans CJK KR",
        "Zapf",
    ]
    wanted = ["Noto Sans CJK KR", "Noto Sans CJK JP", "Noto Sans CJK SC", "NanumGothic", "SimHei", "Zapf"]
    assert order_families(installed, "KR") == wanted
    assert order_families(installed, "SC")[0] == "Noto Sans CJK SC"
    assert [fonts._region(text) for text in ("猫", "猫ねこ", "猫강아지", "cat", "カ강")] == [
        "SC",
        "JP",
        "KR",
        "",
        "JP",
    ]


def test_of_several_fonts_those_are_taken_that_add_something():
    has = {"chinese": "猫狗", "nothing": "abc", "korean": "강아지猫", "late": "지"}
    characters = {name: frozenset(map(ord, text)) for name, text in has.items()}
    asked: list[str] = []

    def characters_of(name: str) -> frozenset[int]:
        asked.append(name)
        return characters[name]

    assert pick_families("猫狗강아지", has, characters_of) == (["chinese", "korean"], set())
    assert "late" not in asked
    assert pick_families("猫แ", has, characters.__getitem__) == (["chinese"], {"แ"})
    assert pick_families("", has, characters.__getitem__) == ([], set())


def test_what_the_default_font_has_needs_nothing_else():
    for text in ("cat", "café", "кот", "γάτα", "a\tb\u00a0c\u200b", "❤\ufe0f", ""):
        assert families_for(text) == ["sans-serif"], text
        assert undrawable(text) == set()
    assert families_for("cat", "monospace") == ["monospace"]


def glyphs_missing(figure: Figure) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FigureCanvasAgg(figure).draw()
    return [str(warning.message) for warning in caught if "Glyph" in str(warning.message)]


def figures_with_names() -> list[Figure]:
    grid = picture_grid(
        [np.zeros((8, 8, 3), np.uint8)] * 4, [f"true: {name}\nsaid: {name} 90 %" for name in NAMES]
    )
    points = [(name, name, 1.0 + i, 0.5 + 0.1 * i) for i, name in enumerate(NAMES)]
    rows = [{"model": name, "setting": NAMES[0], "top1": "0.5"} for name in NAMES]
    growth = [
        {"family": name, "axis": axis, axis: 2**i, "seconds_per_image": 1.0, "bytes_per_image": 1e6}
        for name in NAMES
        for axis in ("patches", "width")
        for i in range(2)
    ]
    return [
        confusion_matrix(np.eye(4, dtype=int), NAMES),
        grid,
        frontier([("title", "speed", "more", points)], y_label="accuracy"),
        accuracies(rows, [NAMES[0]], chance=0.1),
        growth_curves(growth),
    ]


@needs_font
def test_every_kind_of_figure_draws_chinese_japanese_and_korean():
    for figure in figures_with_names():
        use_fallbacks(figure)
        assert glyphs_missing(figure) == []


@needs_font
def test_a_font_installed_after_matplotlib_wrote_its_list_is_found(stale):
    assert undrawable("".join(NAMES)) == set()
    assert len(families_for(NAMES[0])) > 1
    figure = confusion_matrix(np.eye(4, dtype=int), NAMES)
    use_fallbacks(figure)
    assert glyphs_missing(figure) == []


@needs_font
def test_a_fresh_list_of_fonts_will_do(tmp_path):
    code = "from mixlab.report.fonts import undrawable; print(len(undrawable('猫狗강아지ねこ')))"
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment
    )
    assert (result.stdout, result.stderr) == ("0\n", "")


def test_a_font_that_is_listed_but_gone_is_passed_over(stale, monkeypatch, tmp_path):
    fontManager.ttflist.append(
        fonts.FontEntry(
            fname=str(tmp_path / "gone.ttf"), name="Noto Sans CJK SC", style="normal", variant="normal",
            weight=400, stretch="normal", size="scalable",
        )
    )  # fmt: skip
    assert fonts._characters_of("Noto Sans CJK SC") == frozenset()
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(tmp_path / "damaged.ttf")])
    assert fonts._add_new_fonts()


def test_where_no_font_has_it_a_name_stands_as_its_number(no_fonts):
    names = ["cat", "猫", "강아지", "แมว"]
    shown = drawable_names(names)
    assert shown == ["cat", "class 2", "class 3", "class 4"]
    key = [("class 2", "猫"), ("class 4", "แมว")]
    assert "2 class names have" in describe_undrawable(key)
    assert describe_undrawable(key).endswith("(Debian, Ubuntu: fonts-noto-cjk fonts-noto-core)")
    assert describe_undrawable(key[1:]).endswith("(Debian, Ubuntu: fonts-noto-core)")
    figure = confusion_matrix(np.eye(4, dtype=int), shown)
    use_fallbacks(figure)
    assert glyphs_missing(figure) == []


def test_a_text_that_cannot_be_drawn_stops_no_figure(no_fonts, tmp_path):
    figure = Figure()
    figure.text(0.5, 0.5, "猫")
    save_figure(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file()


def test_wide_characters_count_as_two_in_labels_and_captions():
    long = "강아지와고양이와새와물고기와거북이와토끼"
    assert cell_len(_short(long)) <= LONGEST_LABEL
    assert _short(long).startswith("강아지와")
    assert _short(long).endswith("토끼")
    assert _short("강아지") == "강아지"
    assert _short("x" * 40) == "x" * 20 + "…" + "x" * 11
    lines = _wrap(f"true: {long}\nsaid: {long * 3} 90 %")
    assert all(cell_len(line) <= CAPTION_WIDTH for line in lines)
    assert lines[-1].endswith("…")
    assert _wrap("true: 아주 긴 이름의 강아지와 고양이와 새") == [
        "true: 아주 긴 이름의",
        "강아지와 고양이와 새",
    ]


def pictures(root: Path) -> Path:
    for number, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * number, 90, 20 * i)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("installed", [pytest.param(True, marks=needs_font), False])
def test_the_report_of_a_training_shows_every_name(installed, tmp_path, request):
    if not installed:
        request.getfixturevalue("no_fonts")
    screen, options = Listening(), {"steps": 1, "threads": 1, "model__name": "mixer_pico"}
    # A character that could not be drawn would be a warning, and so an error.
    mixlab.train(pictures(tmp_path / "data"), "small_data", run=tmp_path / "run", screen=screen, **options)
    html = (tmp_path / "run" / "report.html").read_text()
    assert all(name in html for name in NAMES)
    assert ("Names in the figures" in html) is not installed
    assert ("fonts-noto-cjk" in html) is not installed
    assert any("fonts-noto-cjk" in line for line in screen.said) is not installed

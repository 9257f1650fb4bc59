"""`mixlab study compare`: the paper's tables as data, measuring in turns, and the frontier."""

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from mixlab.cpu.describe import describe_settings
from mixlab.errors import UsageError
from mixlab.report.frontier import frontier, pareto
from mixlab.report.screen import Screen
from mixlab.studies import compare, published
from mixlab.studies.harness import Options, conduct
from mixlab.studies.published import PAIRS, alternate, paper_frontiers, paper_results
from mixlab.studies.rows import read_rows, write_rows


def test_the_papers_tables_are_whole():
    rows = paper_results()
    places = [row["source"].rsplit(" ", 1)[-1] for row in rows]
    assert (places.count("2"), places.count("3")) == (10, 29)
    assert sum("v2" in row["source"] for row in rows) == 3
    by = {(row["model"], row["pretraining"], row["resolution"], row["epochs"]): row for row in rows}
    best = by["Mixer-H/14", "JFT-300M", "448", ""]
    assert (best["imagenet"], best["images_per_second_per_core"], best["core_days"]) == (
        "87.94",
        "40",
        "1010",
    )
    assert by["Mixer-B/16", "ImageNet", "224", "300"]["imagenet"] == "76.44"
    assert by["ViT-B/16", "ImageNet", "224", "300"]["imagenet"] == "79.67"
    assert all(row["source"].startswith("arXiv 2105.01601v") and float(row["imagenet"]) > 60 for row in rows)
    # Sums over the columns, added from the paper: a digit that is mistyped shows.
    expected = {
        "2": {"imagenet": 872.51, "real": 539.04, "avg5": 569.35, "vtab": 527.55,
              "images_per_second_per_core": 425, "core_days": 52000},
        "3": {"imagenet": 2364.88, "real": 2501.92, "avg5": 2231.36, "resolution": 8006, "epochs": 2939,
              "images_per_second_per_core": 34477, "core_days": 23780},
    }  # fmt: skip
    for place, sums in expected.items():
        for column, total in sums.items():
            values = [float(row[column] or 0) for row in rows if row["source"].endswith(place)]
            assert sum(values) == pytest.approx(total), (place, column)


def test_the_pairs_are_those_of_the_papers_text():
    speeds = {(r["model"], r["resolution"]): r["images_per_second_per_core"] for r in paper_results()}
    names = {"mixer_l16": "Mixer-L/16", "mixer_h14": "Mixer-H/14",
             "timm/vit_large_patch16_224": "ViT-L/16", "timm/vit_huge_patch14_224": "ViT-H/14"}  # fmt: skip
    for pair in PAIRS:
        for name, settings, speed in pair:
            assert float(speeds[names[name], str(settings["image_size"])]) == speed
    wide = dict(PAIRS[1][0][1])
    plain = describe_settings({"name": "mixer_l16", "num_classes": 1000}, batch_size=1)["macs"]
    large = describe_settings({"name": "mixer_l16", "num_classes": 1000} | wide, batch_size=1)["macs"]
    assert large / plain == pytest.approx(5.3, abs=0.05)  # 237 GMACs, counted from the paper's Appendix C


def test_works_take_turns_and_the_first_turn_does_not_count():
    order = []
    times = alternate([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert order == ["a", "b"] * 4
    assert [len(found) for found in times] == [3, 3]


def test_the_frontier_is_what_no_other_point_beats():
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 4.5), (4.0, 1.0), (2.5, 4.5)]
    assert pareto(points, more=True) == [(1.0, 5.0), (3.0, 4.5), (4.0, 1.0)]
    assert pareto(points, more=False) == [(1.0, 5.0)]
    assert pareto([(2.0, 5.0), (1.0, 3.0), (3.0, 4.0)], more=False) == [(1.0, 3.0), (2.0, 5.0)]


@pytest.mark.parametrize("number", [0, 1])
def test_names_of_points_cover_neither_points_nor_lines_nor_each_other(number):
    figure = paper_frontiers(paper_results())[number].figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for ax in figure.axes:
        boxes = [Text.get_window_extent(label, renderer) for label in ax.texts]
        names = [label.get_text() for label in ax.texts]
        twice = {name for name in names if names.count(name) > 1}
        assert twice == ({"H/14@224"} if number else {"H/14", "L/16, 21k"})  # of a Mixer and of a ViT
        assert not [pair for pair in combinations(boxes, 2) if Bbox.intersection(*pair)]
        middles = ax.transData.transform(np.concatenate([line.get_xydata() for line in ax.lines]))
        assert not any(box.contains(*middle) for box in boxes for middle in middles)
        assert all(ax.bbox.containsx(box.x0) and ax.bbox.containsx(box.x1) for box in boxes)
        (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        way = ax.transData.transform(dashed.get_xydata())
        runs = [np.linspace(*ends, 200) for ends in pairwise(way)]
        crossed = {
            name
            for name, box in zip(names, boxes, strict=True)
            if any(box.shrunk(0.9, 0.6).contains(*place) for run in runs for place in run)
        }
        assert len(crossed) <= 1, crossed  # where there is no other place near


def test_the_best_of_the_papers_table_2_are_on_its_frontier():
    figure = paper_frontiers(paper_results())[0].figure
    inference, training = (
        {tuple(point) for line in ax.lines if line.get_linestyle() == "--" for point in line.get_xydata()}
        for ax in figure.axes
    )
    assert inference == {(46, 89.2), (120, 85.8)}  # NFNet-F4+, HaloNet-H4
    assert training == {(100, 85.8), (1010, 87.94), (1860, 89.2), (20480, 90.0)}  # Mixer-H/14 and MPL too


def tiny(hidden_dim):
    return {"image_size": 32, "hidden_dim": hidden_dim, "num_blocks": 1, "num_classes": 2}


def test_pairs_are_measured_once_for_each_machine_and_number_of_threads(tmp_path, monkeypatch):
    pairs = tuple(
        (("mixer_pico4", tiny(width), 419), ("mixer_pico4", tiny(16 * width), 280)) for width in (8, 16)
    )
    monkeypatch.setattr(published, "PAIRS", pairs)
    options = Options(out=tmp_path / "out", threads=1, screen=Screen(quiet=True))
    real, calls = published.alternate, []

    def dying(works, rounds):
        calls.append(rounds)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(works, rounds)

    monkeypatch.setattr(published, "alternate", dying)
    monkeypatch.setattr(published, "PAIRS", (pairs[0], (("mixer_micro4", tiny(16), 4), pairs[1][1])))
    with pytest.raises(KeyboardInterrupt):
        published.measure_ratios(options)
    (first,) = read_rows(tmp_path / "out/throughput.csv")
    other = first | {"machine": "another", "ratio": "9.000"}
    write_rows(tmp_path / "out/throughput.csv", published.RATIO_COLUMNS, [other, first])
    rows = published.measure_ratios(options)
    assert [row["mixer"] for row in rows] == ["mixer_pico4", "mixer_micro4"]
    assert rows[0] == first
    assert published.measure_ratios(options) == rows
    assert calls == [5, 5, 5]
    assert len(read_rows(tmp_path / "out/throughput.csv")) == 3
    assert float(first["lowest"]) <= float(first["ratio"]) <= float(first["highest"])
    assert first["paper_ratio"] == "1.50"
    answer = published.answer_ratios(rows)
    assert ("Threads", "1") in answer.settings
    assert "another" not in str(answer.settings)


@pytest.mark.parametrize(("ratio", "verdict"), [("1.2", "holds"), ("1.0", "open"), ("0.8", "does not hold")])
def test_the_verdict_on_a_ratio_is_of_all_its_turns(ratio, verdict):
    row = dict.fromkeys(published.RATIO_COLUMNS, "1") | {
        "lowest": str(float(ratio) - 0.1), "highest": str(float(ratio) + 0.1), "ratio": ratio,
    }  # fmt: skip
    (finding,) = published.answer_ratios([row]).findings
    assert finding.verdict == verdict


def test_places_that_span_no_decade_begin_at_zero():
    points = [("Mixer", "a", 640.0, 70.0), ("ViT", "b", 650.0, 60.0)]
    panels = [("", "", "less", points), ("", "", "less", [*points, ("ViT", "c", 6.0, 50.0)])]
    near, far = frontier(panels, y_label="").axes
    assert (near.get_xscale(), near.get_xlim()[0], far.get_xscale()) == ("linear", 0, "log")


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


def test_an_option_of_another_study_is_refused(tmp_path):
    from mixlab.commands.studying import study

    with pytest.raises(UsageError, match="no such option"):
        study("shuffle", throughput=True, out=tmp_path / "out")
    with pytest.raises(UsageError, match="trains nothing"):
        study("filters", "mixer_cifar:cifar10", seeds=2, out=tmp_path / "out")
    with pytest.raises(UsageError, match="trains nothing"):
        study("compare", throughput=True, minutes=2.0, out=tmp_path / "out")
    with pytest.raises(UsageError, match="neither data nor weights"):
        study("compare", "digits", throughput=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # four small trainings
@pytest.mark.figures
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

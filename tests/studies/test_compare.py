"""`mixlab study compare`: the paper's tables as data, measuring in turns, and the frontier."""

import json
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from mixlab.errors import UsageError
from mixlab.models.describe import describe_settings
from mixlab.report.frontier import frontier, pareto
from mixlab.report.screen import Screen
from mixlab.studies import compare
from mixlab.studies.harness import Options, conduct
from mixlab.studies.published import PAIRS, alternate, paper_frontier, paper_results


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


def test_names_of_points_cover_neither_points_nor_each_other():
    figure = paper_frontier(paper_results()).figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for ax in figure.axes:
        boxes = [Text.get_window_extent(label, renderer) for label in ax.texts]
        names = [label.get_text() for label in ax.texts]
        assert {name for name in names if names.count(name) > 1} == {"H/14@224"}  # of a Mixer and of a ViT
        assert not [pair for pair in combinations(boxes, 2) if Bbox.intersection(*pair)]
        middles = ax.transData.transform(np.concatenate([line.get_xydata() for line in ax.lines]))
        assert not any(box.contains(*middle) for box in boxes for middle in middles)
        assert all(ax.bbox.containsx(box.x0) and ax.bbox.containsx(box.x1) for box in boxes)


def test_places_that_span_no_decade_begin_at_zero():
    points = [("Mixer", "a", 640.0, 70.0), ("ViT", "b", 650.0, 60.0)]
    panels = [("", "", "less", points), ("", "", "less", [*points, ("ViT", "c", 6.0, 50.0)])]
    near, far = frontier(panels, y_label="").axes
    assert (near.get_xscale(), near.get_xlim()[0], far.get_xscale()) == ("linear", 0, "log")


def planted(mixer, vit, resnet):
    tops = {"Mixer": mixer, "ViT": vit, "ResNet": resnet}
    return {name: {str(seed): value for seed, value in enumerate(values)} for name, values in tops.items()}


def test_verdicts_follow_from_paired_differences_and_speeds():
    fast = {"Mixer": {"plain": "160.0", "fast": "200.0"}, "ViT": {"plain": "100.0", "fast": "100.0"}}
    tops = planted([0.70, 0.71, 0.70], [0.75, 0.76, 0.755], [0.70, 0.72, 0.69])
    assert [finding.verdict for finding in compare._findings(tops, fast)] == ["holds", "open", "holds"]
    mixed = {"Mixer": {"plain": "90.0", "fast": "200.0"}, "ViT": {"plain": "100.0", "fast": "100.0"}}
    assert compare._findings(tops, mixed)[-1].verdict == "open"


def test_an_option_of_another_study_is_refused(tmp_path):
    from mixlab.commands.studying import study

    with pytest.raises(UsageError, match="no such option"):
        study("shuffle", throughput=True, out=tmp_path / "out")
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
    }
    json.dumps(result, allow_nan=False)

"""The paper's tables as data, and the frontier that is drawn of them."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from mixlab.report.frontier import frontier, pareto
from mixlab.studies.published import paper_frontiers, paper_results


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


def test_places_that_span_no_decade_begin_at_zero():
    points = [("Mixer", "a", 640.0, 70.0), ("ViT", "b", 650.0, 60.0)]
    panels = [("", "", "less", points), ("", "", "less", [*points, ("ViT", "c", 6.0, 50.0)])]
    near, far = frontier(panels, y_label="").axes
    assert (near.get_xscale(), near.get_xlim()[0], far.get_xscale()) == ("linear", 0, "log")

"""Accuracy against speed or cost, with the points that no other beats."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox, BboxBase

from mixlab.report.figures import GREY, SMALL, tidy
from mixlab.report.fonts import families_for, use_fallbacks
from mixlab.report.study_figures import COLORS, MARKERS, legend_above

FRONTIER = "beaten by none in both"
MARK_POINTS = 7.0  # the size of a marker
# Where the name of a point may stand, in points of print to the right of it and up: near it, then away from it.
NAME_PLACES = [(5, 4), (5, -4), (-5, 4), (-5, -4), (0, 7), (0, -7), (7, 0), (-7, 0)]
NUM_NEAR = len(NAME_PLACES)
NAME_PLACES += [(right, up) for far in (14, 24, 34) for up in (far, -far) for right in (far, -far, 0)]


def frontier(
    panels: Sequence[tuple[str, str, str, Sequence[tuple[str, str, float, float]]]], *, y_label: str
) -> Figure:
    """Scatter plots with the points that no other beats: (title, x label, better: `more` or `less`, points).

    A point is (family, name, x, y); more of y is better. The x axis is logarithmic where a panel's points span a
    decade, else it begins at zero.
    """
    figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    families = list(dict.fromkeys(point[0] for _, _, _, points in panels for point in points))
    for ax, (title, x_label, better, points) in zip(grid, panels, strict=True):
        for number, family in enumerate(families):
            mine = [point for point in points if point[0] == family]
            ax.plot(
                [point[2] for point in mine], [point[3] for point in mine], MARKERS[number % len(MARKERS)],
                color=COLORS[number % len(COLORS)], markersize=MARK_POINTS, label=family,
            )  # fmt: skip
        best = pareto([(x, y) for _, _, x, y in points], more=better == "more")
        ax.plot(*zip(*best, strict=True), color=GREY, linewidth=1, linestyle="--", zorder=0, label=FRONTIER)
        tidy(ax, title, x_label, y_label if ax is grid[0] else "")
        ax.margins(x=0.15, y=0.08)
        places = [point[2] for point in points]
        if max(places) >= 10 * min(places):
            ax.set_xscale("log")
        else:
            ax.set_xlim(0, 1.2 * max(places))
    legend_above(figure, grid[0], len(families) + 1)
    use_fallbacks(figure)
    figure.draw_without_rendering()  # the axes take their places, which those of the names follow from
    for ax, (_, _, _, points) in zip(grid, panels, strict=True):
        name_points(ax, [(name, x, y) for _, name, x, y in points])
    return figure


def name_points(ax: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write the name of each point (name, x, y) beside it, where it covers least of points, lines and other names.

    A name without such a place near its point, or only nearer to another one, stands away and is joined by a line.
    """
    renderer = FigureCanvasAgg(ax.get_figure(root=True)).get_renderer()
    half = renderer.points_to_pixels(MARK_POINTS / 2)
    middles = ax.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox([middle - half, middle + half]) for middle in middles]
    lines = [ax.transData.transform(line.get_xydata()) for line in ax.lines if line.get_label() == FRONTIER]
    for own, (name, x, y) in enumerate(points):
        tried = []
        for number, (right, up) in enumerate(NAME_PLACES):
            label = ax.annotate(
                name, (x, y), (right, up), textcoords="offset points", fontsize=SMALL - 1,
                fontfamily=families_for(name),
                ha="left" if right > 0 else "right" if right < 0 else "center",
                va="bottom" if up > 0 else "top" if up < 0 else "center",
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6} if number >= NUM_NEAR else None,
            )  # fmt: skip
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line
            covered = box.width * box.height - _shared_area(box, ax.bbox)  # what is outside the axes
            covered += sum(_shared_area(box, other) for other in taken)
            covered += half * sum(_shared_length(box, line) for line in lines)
            way = np.array([middles[own], np.mean([box.min, box.max], axis=0)])
            if number >= NUM_NEAR:  # its own line, which should cross no other name or point
                others = [other for place, other in enumerate(taken) if place != own]
                covered += half * sum(_shared_length(other, way) for other in others)
            gaps = np.maximum(np.maximum(box.min - middles, middles - box.max), 0)
            if number < NUM_NEAR and np.hypot(*gaps.T).argmin() != own:
                covered += box.width * box.height  # it would be taken for the name of another
            tried.append((covered, number, label, box, way))
            if tried[-1][0] < 1:  # square pixel
                break
        _, number, label, box, way = min(tried, key=lambda place: place[:2])
        for _, _, other, _, _ in tried:
            if other is not label:
                other.remove()
        taken.append(box)
        lines += [way] if number >= NUM_NEAR else []


def _shared_area(one: Bbox, other: BboxBase) -> float:
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)


def _shared_length(box: BboxBase, line: np.ndarray) -> float:
    """How much of a line (n, 2) runs through a box, in pixels, by points two pixels apart."""
    length = 0.0
    for start, end in pairwise(line):
        places = np.linspace(start, end, max(int(np.hypot(*(end - start)) / 2), 2))
        length += 2.0 * float((((places > box.min) & (places < box.max)).all(axis=1)).sum())
    return length


def pareto(points: Sequence[tuple[float, float]], *, more: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both, by x: more of y is better, and more of x, or less."""
    order = sorted(points, key=lambda point: (-point[0] if more else point[0], -point[1]))
    kept: list[tuple[float, float]] = []
    highest = -np.inf
    for point in order:
        if point[1] > highest:
            kept.append(point)
            highest = point[1]
    return sorted(kept)

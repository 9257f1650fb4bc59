"""The images of studies: rows of a CSV file in, a matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mixlab.report.figures import BLUE, GREY, ORANGE, SMALL, tidy

# Okabe and Ito's, in an order in which neighbours differ in brightness too.
COLORS = (BLUE, "#E69F00", "#009E73", ORANGE, "#CC79A7", "#56B4E9", GREY)
DASHES, MARKERS = ("-", "--", ":", "-."), "osD^vP"
Rows = Sequence[Mapping[str, str]]


def legend_above(figure: Figure, ax: Axes, columns: int) -> None:
    """What the lines of `ax` are, above all axes of `figure`."""
    figure.legend(
        *ax.get_legend_handles_labels(),
        fontsize=SMALL,
        frameon=False,
        ncols=columns,
        loc="outside upper center",
    )


def accuracies(rows: Rows, settings: Sequence[str], *, chance: float) -> Figure:
    """Test accuracy by model and setting: bars of means, a point for each seed."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.8 + 1.6 * len(models), 4), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(settings)
    for number, setting in enumerate(settings):
        places, means = [], []
        for place, model in enumerate(models):
            values = [
                float(row["top1"]) for row in rows if (row["model"], row["setting"]) == (model, setting)
            ]
            if not values:
                continue
            x = place + (number - (len(settings) - 1) / 2) * width
            places.append(x)
            means.append(fmean(values))
            ax.plot(
                [x] * len(values),
                values,
                "o",
                color="black",
                markersize=3.5,
                markerfacecolor="white",
                zorder=3,
            )
        bars = ax.bar(places, means, 0.92 * width, color=COLORS[number], label=setting, alpha=0.85)
        ax.bar_label(bars, [f"{100 * mean:.1f}" for mean in means], padding=6, fontsize=SMALL)
    ax.axhline(chance, color=GREY, linestyle="--", linewidth=1)
    ax.set_xticks(range(len(models)), models)
    tidy(ax, "", "", "test accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(axis="x", visible=False)
    ax.set_ylim(0, None)
    ax.margins(y=0.12)
    legend_above(figure, ax, len(settings))
    return figure


def relative_drops(drops: Mapping[tuple[str, str], Any], paper: Mapping[tuple[str, str], float]) -> Figure:
    """Share of the original accuracy lost, by model and setting, beside what the paper says.

    drops: (model, setting) -> a mean with `mean`, `low`, `high`.
    """
    names = list(drops)
    figure = Figure(figsize=(7, 1.2 + 0.42 * len(names)), layout="constrained")
    ax = figure.subplots()
    for place, name in enumerate(names):
        drop = drops[name]
        if drop.low is not None:
            ax.plot([drop.low, drop.high], [place, place], color=BLUE, linewidth=2, solid_capstyle="butt")
        ax.plot([drop.mean], [place], "o", color=BLUE, markersize=6, label="here" if place == 0 else None)
        ax.annotate(
            f"{100 * drop.mean:.1f} %",
            (drop.mean, place),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
        )
    known = [(paper[name], place) for place, name in enumerate(names) if name in paper]
    if known:
        x, y = zip(*known, strict=True)
        ax.plot(
            x,
            y,
            "D",
            color=ORANGE,
            markersize=7,
            markerfacecolor="none",
            markeredgewidth=1.5,
            label="the paper",
        )
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(range(len(names)), [f"{model}, {setting}" for model, setting in names])
    ax.invert_yaxis()
    tidy(ax, "", "share of the original accuracy lost", "")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.margins(x=0.08, y=0.12)
    ax.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def curves_by_model(curves: Rows, models: Sequence[str], settings: Sequence[str]) -> Figure:
    """Validation accuracy against epochs, a panel for each model, a line for each setting: means over seeds."""
    figure = Figure(figsize=(3.1 * len(models), 3.4), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, model in zip(panels, models, strict=True):
        for number, setting in enumerate(settings):
            found: dict[float, list[float]] = {}
            for row in curves:
                if (row["model"], row["setting"]) == (model, setting):
                    found.setdefault(float(row["epoch"]), []).append(float(row["top1"]))
            epochs = sorted(found)
            ax.plot(
                epochs,
                [fmean(found[epoch]) for epoch in epochs],
                color=COLORS[number],
                linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number],
                markersize=4 if len(epochs) <= 40 else 0,
                label=setting,
            )
        tidy(ax, model, "epoch", "validation accuracy" if ax is panels[0] else "")
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend_above(figure, panels[0], len(settings))
    return figure


def unit_pictures(units: np.ndarray, pairs: np.ndarray, grid: tuple[int, int]) -> Figure:
    """Pairs of units (D, S) as images of the grid, side by side in order; pairs: int (n, 2)."""
    pictures = units[pairs.reshape(-1)].reshape(-1, *grid, 1)
    limits = np.abs(pictures).max(axis=(1, 2, 3), keepdims=True)
    # From -1 to 1 on the scale of each; a unit of zeros has none.
    return _tiled(pictures / np.where(limits > 0, limits, 1.0), columns=24 if len(pictures) > 128 else 16)


def stem_filters(filters: np.ndarray) -> Figure:
    """Filters (C, channels, P, P) in their colours, or in greys, each on its own scale."""
    low = filters.min(axis=(1, 2, 3), keepdims=True)
    high = filters.max(axis=(1, 2, 3), keepdims=True)
    scaled = ((filters - low) / np.where(high > low, high - low, 1.0)).transpose(0, 2, 3, 1)
    return _tiled(scaled if scaled.shape[-1] == 3 else scaled[..., :1], columns=32, low=0.0)


def _tiled(pictures: np.ndarray, *, columns: int, low: float = -1.0) -> Figure:
    """Images (n, H, W, 1 or 3), values from `low` to 1, in rows, as one image with white gaps.

    Those of one channel are in blue and red about zero, or in greys where `low` is zero.
    """
    number, height, width, channels = pictures.shape
    rows = -(-number // columns)
    gap = max(round(0.12 * width), 1)
    sheet = np.full((rows * (height + gap), columns * (width + gap), channels), np.nan)
    for place, picture in enumerate(pictures):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    figure = Figure(figsize=(10, 10 * sheet.shape[0] / sheet.shape[1]))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    if channels == 3:
        ax.imshow(np.where(np.isnan(sheet), 1.0, sheet), interpolation="nearest")
    else:
        colors = "RdBu_r" if low < 0 else "gray"
        ax.imshow(sheet[..., 0], cmap=colors, vmin=low, vmax=1, interpolation="nearest")
    return figure


NUMBERS = (
    ("opposed", "units with an opposite partner"),
    ("frequency", "frequency, cycles a patch"),
    ("spread", "spread (1: everywhere)"),
)


def _from_zero(ax: Axes) -> None:
    """An axis from zero to a little above the highest point; a whole one where all are zero."""
    highest = max(float(np.max(line.get_ydata())) for line in ax.lines)
    ax.set_ylim(-0.03 * (highest or 1.0), 1.08 * (highest or 1.0))


def layer_numbers(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Figure:
    """Numbers of token-mixing units by layer, a line for each kind of weights."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, len(NUMBERS))
    for ax, (key, label) in zip(axes, NUMBERS, strict=True):
        for number, kind in enumerate(kinds):
            found = sorted((row["layer"], row[key]) for row in rows if row["weights"] == kind)
            ax.plot(
                *zip(*found, strict=True), color=COLORS[number], linestyle=DASHES[number], marker=MARKERS[number],
                markersize=5, label=kind,
            )  # fmt: skip
        tidy(ax, "", "layer", label)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _from_zero(ax)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    legend_above(figure, axes[0], len(kinds))
    return figure


def over_steps(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The same numbers against training steps, a line for each layer, from light (the first) to dark."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, len(NUMBERS))
    layers = sorted({row["layer"] for row in rows})
    for ax, (key, label) in zip(axes, NUMBERS, strict=True):
        for number, layer in enumerate(layers):
            found = sorted((row["step"], row[key]) for row in rows if row["layer"] == layer)
            shade = 0.75 - 0.75 * number / max(len(layers) - 1, 1)
            ax.plot(
                *zip(*found, strict=True), color=(shade, shade * 0.6 + 0.25, 1 - 0.45 * (1 - shade)), marker=".",
                label=f"layer {layer}",
            )  # fmt: skip
        tidy(ax, "", "training step", label)
        _from_zero(ax)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    legend_above(figure, axes[0], min(len(layers), 8))
    return figure

"""The images of `mixlab bench`: speeds of backends, and how time and memory grow."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from mixlab.report.figures import BLUE, GREY, ORANGE, SMALL, tidy


def speeds(rows: Sequence[dict[str, Any]]) -> Figure:
    """Images a second of every backend, a panel for each model, from the rows of `mixlab bench`."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(7, 0.6 + 2.2 * len(models)), layout="constrained")
    for ax, model in zip(figure.subplots(len(models), 1, squeeze=False)[:, 0], models, strict=True):
        found = [row for row in rows if row["model"] == model and "error" not in row]
        first = found[0]
        values = [row["images_per_second"] for row in found]
        bars = ax.barh(
            [row["backend"] for row in found],
            values,
            color=[BLUE if row["backend"] == "mixlab" else GREY for row in found],
        )
        labels = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        ax.bar_label(bars, labels, padding=3, fontsize=SMALL)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        size = "x".join(str(side) for side in first["image_size"])
        mode = "training step" if first["mode"] == "train" else "inference"
        tidy(ax, f"{model}, {mode}, {size} pixels, batches of {first['batch_size']}", "images per second", "")
        ax.grid(axis="y", visible=False)
    return figure


def growth_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Time and memory an image against patches and width, from the rows of `mixlab bench --scale`; all axes log."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row")
    styles = zip((BLUE, "#56B4E9", ORANGE, GREY), "osD^", strict=True)
    looks = dict(zip(dict.fromkeys(row["family"] for row in rows), styles, strict=False))
    for line, (key, label, factor) in enumerate(
        (("seconds_per_image", "milliseconds an image", 1e3), ("bytes_per_image", "MiB an image", 2**-20))
    ):
        for ax, axis in zip(grid[line], ("patches", "width"), strict=True):
            for family, (color, marker) in looks.items():
                found = [row for row in rows if row["family"] == family and row["axis"] == axis]
                x = [row[axis] for row in found]
                ax.plot(
                    x, [factor * row[key] for row in found], color=color, marker=marker, markersize=5, label=family
                )  # fmt: skip
            tidy(ax, "", "patches" if axis == "patches" else "channels", label)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(x, [str(value) for value in x])
            ax.minorticks_off()
    grid[0, 0].legend(fontsize=SMALL, frameon=False)
    return figure

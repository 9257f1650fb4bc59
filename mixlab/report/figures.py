"""The images of a report: plain numbers in, a matplotlib Figure out.

Only Figure objects, never pyplot, so nothing is global and no display is needed. Text is at least 8 pt.
"""

import math
import textwrap
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.cells import cell_len, chop_cells

from mixlab.files import write_atomically
from mixlab.language import tell, word
from mixlab.report.fonts import use_fallbacks

# Okabe and Ito's colours, which people with any colour vision can tell apart; shapes differ as well.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5a6270"
SMALL, NORMAL = 8, 9  # Points.
LABEL_PITCH = 0.165  # Inches from one class label to the next: an 8 pt line and a little air.
WIDEST_MATRIX = 26.0  # Inches. Beyond it (about 155 classes) only every n-th class is labelled.
LONGEST_LABEL = 32  # Characters of a Latin script; those of Chinese, Japanese and Korean count as two.
CAPTION_WIDTH = 24  # Characters of an 8 pt monospaced font, which are all 0.067 inches wide.
CAPTION_LINES = 4
SMOOTHED_FROM = 60  # Points, from which on a curve is drawn as a running mean, thin behind it as it is.
PICTURE_SIZE = 1.62  # Inches.


def learning_curves(rows: Sequence[dict[str, Any]], many: str = "images") -> Figure:
    """Loss, accuracy, learning rate and speed against the epoch, from the rows of a run log.

    many: what is trained on.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    panels: list[tuple[str, str, str | None]] = [
        (tell("Loss"), "loss", "loss"),
        (tell("Accuracy"), "accuracy", "top1"),
        (tell("Learning rate"), "lr", None),
        (tell("Speed ({many} per second)", many=many), "images_per_second", None),
    ]
    for ax, (title, train_key, validation_key) in zip(axes.flat, panels, strict=True):
        tidy(ax, title, tell("epoch"), "")
        ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0) if train_key == "accuracy" else "{x:,g}")
        is_loss = train_key == "loss"
        label = tell("training loss") if is_loss else tell("training")
        drawn = _curve(ax, rows, "train", train_key, label, BLUE, "o", 1.2)
        if validation_key:
            label = tell("validation loss") if is_loss else tell("validation")
            drawn |= _curve(ax, rows, "validation", validation_key, label, ORANGE, "D", 1.8)
        if not drawn:
            ax.text(
                0.5, 0.5, tell("not recorded"), transform=ax.transAxes, ha="center", color=GREY, size=NORMAL
            )
            ax.set(xticks=[], yticks=[])
        elif validation_key:
            ax.legend(fontsize=SMALL, frameon=False)
        else:
            highest = max(max(line.get_ydata()) for line in ax.lines)
            ax.set_ylim(-0.03 * (highest or 1), 1.1 * (highest or 1))  # Speeds compare from zero.
    return figure


def _curve(
    ax: Axes,
    rows: Sequence[dict[str, Any]],
    event: str,
    key: str,
    label: str,
    color: str,
    marker: str,
    width: float,
) -> bool:
    """Draw one line, leaving out rows without a value; False if there was nothing to draw."""
    points = [(row.get("epoch"), row.get(key)) for row in rows if row.get("event") == event]
    kept = [(x, y) for x, y in points if _is_number(x) and _is_number(y)]
    if not kept:
        return False
    # A line of one point is invisible without a marker, and few points should be seen as few.
    shown = marker if len(kept) <= 40 else ""
    x, y = zip(*kept, strict=True)
    if len(kept) > SMOOTHED_FROM and key != "lr":  # which has no noise, but corners
        ax.plot(x, y, color=color, linewidth=0.6, alpha=0.35)
        y = smooth(y, 2 * (len(y) // 40) + 1)
    ax.plot(x, y, color=color, marker=shown, markersize=4, linewidth=width, label=label)
    return True


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Each value as the mean of the `window` (odd) around it, at the ends of those that there are."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    place = np.arange(len(values))
    first, end = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(values))
    return list((sums[end] - sums[first]) / (end - first))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """What was predicted (columns) for what was true (rows). counts: int (K, K). Colours are shares of a row.

    Up to 20 classes the counts stand in the cells; for more, the figure grows so that labels stay legible.
    """
    counts = np.asarray(counts)
    num_classes = len(class_names)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(f"counts has shape {counts.shape}, but there are {num_classes} class names")
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    names = [_short(name) for name in class_names]
    with_counts = num_classes <= 20
    cell = max(0.36, 0.075 * len(str(counts.max())) + 0.12) if with_counts else LABEL_PITCH
    side = min(max(cell * num_classes, 3.6), WIDEST_MATRIX)
    longest = max(cell_len(name) for name in names)
    labels = 0.09 * longest + 0.5  # Inches, generous: what is left over is cut off when saving.

    figure = Figure(figsize=(side + labels + 1.0, side + labels + 0.4), layout="constrained")
    ax = figure.subplots()
    # The square root makes a confusion of one image in a hundred visible beside a full diagonal.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    ax.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    every = math.ceil(num_classes * LABEL_PITCH / side)
    places = list(range(0, num_classes, every))
    upright = longest * 0.085 > side / num_classes
    # parse_math=False: a class name may well hold two dollar signs.
    shown = [names[place] for place in places]
    ax.set_xticks(places, shown, fontsize=SMALL, rotation=90 if upright else 0, parse_math=False)
    ax.set_yticks(places, shown, fontsize=SMALL, parse_math=False)
    ax.set_xlabel(tell("predicted class"), fontsize=NORMAL)
    ax.set_ylabel(tell("true class"), fontsize=NORMAL)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if num_classes <= 200:
        ax.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="#e3e7ec", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
    if with_counts:
        for row, column in np.argwhere(counts > 0):
            color = "white" if norm(shares[row, column]) > 0.55 else "#1c2733"
            ax.text(column, row, str(counts[row, column]), size=SMALL, color=color, ha="center", va="center")
    high = min(1.0, 8 / side)
    bar_axes = ax.inset_axes((1 + 0.15 / side, 1 - high, 0.2 / side, high))
    bar = figure.colorbar(ScalarMappable(norm, "Blues"), cax=bar_axes)
    marks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar.set_ticks(marks, labels=[f"{mark:.0%}" for mark in marks])
    bar.set_label(tell("share of the true class"), fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.outline.set_visible(False)
    return figure


def _short(name: str) -> str:
    line = " ".join(name.split())
    # The end stays too: names that are alike at length differ there.
    if cell_len(line) <= LONGEST_LABEL:
        return line
    head, tail = chop_cells(line, LONGEST_LABEL - 12)[0], chop_cells(line[::-1], 11)[0][::-1]
    return head + "…" + tail


def reliability_diagram(bins: Sequence[dict[str, Any]], ece: float, many: str = "images") -> Figure:
    """How often the model is right when it is so sure, above how often it is so sure.

    bins: lower, upper, accuracy and confidence as fractions, num_images; empty bins are skipped. many: what was
    tested.
    """
    kept = [b for b in bins if b["num_images"] > 0]
    figure = Figure(figsize=(5.6, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    lower = np.array([b["lower"] for b in kept], dtype=float)
    width = np.array([b["upper"] for b in kept], dtype=float) - lower
    accuracy = np.array([b["accuracy"] for b in kept], dtype=float)
    confidence = np.array([b["confidence"] for b in kept], dtype=float)
    edge = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}

    title = tell("Expected calibration error {ece:.1f} points", ece=100 * ece)
    tidy(top, title, "", tell("share that is right"))
    top.bar(lower, accuracy, width, color=BLUE, label=tell("accuracy"), **edge)
    gap = {"align": "edge", "edgecolor": ORANGE, "linewidth": 0.8, "hatch": "////"}
    top.bar(
        lower,
        np.abs(confidence - accuracy),
        width,
        bottom=np.minimum(accuracy, confidence),
        facecolor=(*to_rgb(ORANGE), 0.25),
        label=tell("gap to the mean confidence"),
        **gap,
    )
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label=tell("perfectly calibrated"))
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    top.yaxis.set_major_formatter(PercentFormatter(1.0))
    top.legend(fontsize=SMALL, frameon=False, loc="upper left")

    tidy(bottom, "", tell("confidence"), word(many))
    bottom.bar(lower, [b["num_images"] for b in kept], width, color=GREY, **edge)
    bottom.xaxis.set_major_formatter(PercentFormatter(1.0))
    bottom.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def coverage_curve(
    confidence: np.ndarray, correct: np.ndarray, chosen: tuple[float, float] | None = None
) -> Figure:
    """The share that is right among the surest, against how many these are. confidence, correct: (n,).

    chosen: share of the images, and of them that are right, at the threshold that validation chose.
    """
    order = np.argsort(-confidence, kind="stable")
    count = np.arange(1, len(order) + 1)
    right = np.cumsum(correct[order]) / np.maximum(count, 1)
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    ax = figure.subplots()
    tidy(ax, "", tell("share that the model is surest of"), tell("of them right"))
    ax.plot(count / max(len(order), 1), right, color=BLUE, linewidth=1.6)
    if chosen is not None:
        ax.plot(*chosen, color=ORANGE, marker="D", linestyle="", label=tell("threshold chosen on validation"))
        ax.legend(fontsize=SMALL, frameon=False, loc="lower left")
    lowest = float(right[len(order) // 50 :].min()) if len(order) else 0.0
    ax.set(xlim=(0, 1.02), ylim=(max(lowest - 0.25 * (1.02 - lowest), 0), 1 + 0.03 * (1.02 - lowest)))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def picture_grid(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8) -> Figure:
    """A gallery. images: uint8 (H, W, 3) or (H, W, 1), sizes may differ; captions may hold line breaks."""
    if len(images) != len(captions) or not images:
        raise ValueError(
            f"{len(images)} images and {len(captions)} captions: needs as many of each, and some"
        )
    wrapped = [_wrap(caption) for caption in captions]
    columns = min(columns, len(images))
    num_rows = math.ceil(len(images) / columns)
    text_height = 0.145 * max(len(lines) for lines in wrapped) + 0.06
    pitch_x, pitch_y = PICTURE_SIZE + 0.1, PICTURE_SIZE + text_height + 0.14
    width, height = columns * pitch_x, num_rows * pitch_y
    figure = Figure(figsize=(width, height))
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        row, column = divmod(index, columns)
        left, low = column * pitch_x + 0.05, height - row * pitch_y - PICTURE_SIZE - 0.05
        ax = figure.add_axes((left / width, low / height, PICTURE_SIZE / width, PICTURE_SIZE / height))
        ax.imshow(
            image[..., 0] if image.shape[-1] == 1 else image,
            cmap="gray",
            vmin=0,
            vmax=255,
            # Nearest keeps a small image's pixels as they are; a large one is shrunk smoothly.
            interpolation="nearest" if max(image.shape[:2]) <= 120 * PICTURE_SIZE else "auto",
        )
        ax.set_axis_off()
        figure.text(
            (left + PICTURE_SIZE / 2) / width,
            (low - 0.06) / height,
            "\n".join(lines),
            ha="center",
            va="top",
            family="monospace",  # So that a count of characters is a width, and captions cannot meet.
            size=SMALL,
            parse_math=False,
        )
    return figure


def _wrap(caption: str) -> list[str]:
    lines: list[str] = []
    for line in caption.splitlines():
        is_wide = cell_len(line) > len(line)
        lines += _wrap_wide(line) if is_wide else textwrap.wrap(line, CAPTION_WIDTH)
    if len(lines) > CAPTION_LINES:
        lines = lines[:CAPTION_LINES]
        lines[-1] = chop_cells(lines[-1], CAPTION_WIDTH - 1)[0] + "…"
    return lines


def _wrap_wide(line: str) -> list[str]:
    """Chinese, Japanese and Korean characters are as wide as two, and there need not be spaces to wrap at."""
    lines = [""]
    for part in line.split():
        longer = f"{lines[-1]} {part}".strip()
        if cell_len(longer) <= CAPTION_WIDTH:
            lines[-1] = longer
        else:
            lines += chop_cells(part, CAPTION_WIDTH)
    return [text for text in lines if text]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG of 120 dots per inch, the same bytes for the same figure. Raises DiskError."""
    use_fallbacks(figure)
    content = BytesIO()
    with warnings.catch_warnings():
        # A character that no installed font has is drawn as a box; that must not stop a run.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(
            content,
            format="png",
            dpi=120,
            bbox_inches="tight",
            pad_inches=0.12,
            facecolor="white",
            metadata={"Software": None},
        )
    write_atomically(path, content.getvalue())


def tidy(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    ax.set_title(title, fontsize=NORMAL + 1, loc="left")
    ax.set_xlabel(x_label, fontsize=NORMAL)
    ax.set_ylabel(y_label, fontsize=NORMAL)
    ax.tick_params(labelsize=SMALL, color="#b8c0ca")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b8c0ca")
    ax.grid(color="#e8ebef", linewidth=0.8)
    ax.set_axisbelow(True)

"""Figures from the lines of a gpu.jsonl, and from nothing else."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.gpu.run import read_lines
from mixlab.errors import DataError
from mixlab.report.figures import BLUE, GREY, ORANGE, SMALL, save_figure, tidy


def draw(file: Path, folder: Path) -> list[Path]:
    """PNG files of what `file` has rows for. DataError if there is nothing to draw."""
    lines = read_lines(file)
    machine = _machine(lines)
    drawn = []
    for part in ("inference", "compiled", "training"):
        rows = [row for row in _rows(lines, part) if "images_per_second" in row]
        if rows:
            drawn.append((speeds(rows, f"{part}, bf16, {machine}"), folder / f"{part}.png"))
    if rows := _rows(lines, "cores"):
        drawn.append((scaling(rows, machine), folder / "cores.png"))
    if not drawn:
        raise DataError("there are no speeds in it", where=str(file))
    folder.mkdir(parents=True, exist_ok=True)
    for figure, path in drawn:
        save_figure(figure, path)
    return [path for _, path in drawn]


def _rows(lines: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [line["row"] for line in lines if line["part"] == part and "row" in line]


def _machine(lines: list[dict[str, Any]]) -> str:
    known = next((line["facts"] for line in reversed(lines) if "status" in line), {})
    what = known.get("card") or f"{known.get('cores')} cores of {known.get('cpu')}"
    return f"{what}, torch {known.get('torch')}, commit {known.get('commit')}"


def speeds(rows: list[dict[str, Any]], title: str) -> Figure:
    """A panel for each group: images a second of each side, and its share of the large product."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    lengths = [
        sum(row["group"] == group and "product" not in row["side"] for row in rows) for group in groups
    ]
    figure = Figure(figsize=(8, 0.8 + 0.75 * len(groups) + 0.32 * sum(lengths)), layout="constrained")
    figure.suptitle(title, fontsize=SMALL + 1)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[1 + length for length in lengths])
    for ax, group in zip(panels[:, 0], groups, strict=True):
        found = [row for row in rows if row["group"] == group and "product" not in row["side"]]
        values = [row["images_per_second"] for row in found]
        names = [f"{row['side'].removeprefix('timm/')}, {row['image_size']} px" for row in found]
        colors = [BLUE if row["side"].startswith("mixer") else GREY for row in found]
        low, high = zip(*(row["range"] for row in found), strict=True)
        spread = [
            [value - least for value, least in zip(values, low, strict=True)],
            [most - value for value, most in zip(values, high, strict=True)],
        ]
        bars = ax.barh(range(len(found)), values, color=colors, xerr=spread, error_kw={"linewidth": 1})
        labels = [
            f"  {row['images_per_second']:,.0f}; {row['share_of_product']:.0%} of the product; "
            f"batch {row['batch_size']}"
            for row in found
        ]
        ax.bar_label(bars, labels, padding=4, fontsize=SMALL)
        ax.set_yticks(range(len(found)), names)
        ax.invert_yaxis()
        ax.margins(x=0.45)
        tidy(ax, group, "images per second" if group == groups[-1] else "", "")
        ax.grid(axis="y", visible=False)
    return figure


def scaling(rows: list[dict[str, Any]], machine: str) -> Figure:
    """Images a second against threads, beside as many times one thread's."""
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(4.2 * len(kinds), 3.4), layout="constrained")
    figure.suptitle(machine, fontsize=SMALL + 1)
    for ax, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        found = sorted(
            (row["threads"], row["images_per_second"])
            for row in rows
            if row["what"] == kind and "images_per_second" in row
        )
        threads, values = zip(*found, strict=True)
        least, first = found[0]
        ax.plot(threads, values, "o-", color=BLUE, label="measured")
        ax.plot(
            threads, [first * count / least for count in threads], "--", color=ORANGE, label="in proportion"
        )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(threads, [str(count) for count in threads])
        ax.set_yticks(values, [f"{value:,.0f}" for value in values])
        ax.minorticks_off()
        ax.legend(fontsize=SMALL, frameon=False)
        tidy(ax, kind, "threads", "images per second")
    return figure

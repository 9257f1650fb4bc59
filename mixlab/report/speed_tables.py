"""What `mixlab bench` measured, as tables for a person."""

from typing import Any

from rich.table import Table

from mixlab.report.screen import Screen


def show_bench(rows: list[dict[str, Any]], screen: Screen) -> None:
    """Speed of every model and backend, and how many times faster mixlab is than each."""
    table = Table()
    for heading in (
        "model",
        "backend",
        "images/s",
        "ms for one",
        "GFLOP/s",
        "of GEMM peak",
        "memory",
        "mixlab is",
        "for one",
    ):
        table.add_column(heading, justify="left" if heading in ("model", "backend") else "right")
    ours: dict[str, Any] = {}
    for row in rows:
        if "error" in row:
            table.add_row(row["model"], row["backend"], row["error"])
            continue
        if "ratio" in row:
            ours = row
        ratio, backend = ours.get("ratio", {}), row["backend"]
        times = alone = ""
        if backend in ratio:
            low, high = ours["ratio_range"][backend]
            times = f"{ratio[backend]:.2f}x ({low:.2f} to {high:.2f})"
            if "ratio_batch_1" in ours:
                alone = f"{ours['ratio_batch_1'][backend]:.2f}x"
        speed = [
            "" if row[key] is None else f"{row[key]:,.1f}"
            for key in ("images_per_second", "ms_batch_1", "gflops")
        ]
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB"
        table.add_row(row["model"], backend, *speed, f"{row['peak_share']:.0%}", memory, times, alone)
    screen.show(table)


def show_growth(rows: list[dict[str, Any]], powers: list[dict[str, Any]], screen: Screen) -> None:
    """Time and memory an image at every point, and with what power they grow at the end."""
    for axis, title in (("patches", "patches"), ("width", "channels")):
        table = Table(title=f"against {title}: ms, MiB an image")
        values = list(dict.fromkeys(row[axis] for row in rows if row["axis"] == axis))
        for heading in ("", *map(str, values), "time grows as", "memory as"):
            table.add_column(heading, justify="right" if heading else "left")
        for power in powers:
            if power["axis"] != axis:
                continue
            found = [row for row in rows if row["family"] == power["family"] and row["axis"] == axis]
            cells = [
                f"{1000 * row['seconds_per_image']:.1f}, {row['bytes_per_image'] / 2**20:.0f}"
                for row in found
            ]
            table.add_row(
                power["family"], *cells, f"{title}^{power['time']:.2f}", f"{title}^{power['memory']:.2f}"
            )
        screen.show(table)

"""`mixlab ui`: the runs and studies of a folder in a browser. It shows what is in their files, and little else.

    GET /api/runs          every run, best first, and every study
    GET /api/runs/NAME     recipe, result, curves, confusion counts, names of figures
    GET /api/studies/NAME  its tables and names of figures
    GET /files/...         report.html and figures of a run or study

Only files of known names, of folders that are runs or studies, are served.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mixlab.errors import MixlabError
from mixlab.escape import from_csv, visible_values, without_places
from mixlab.records import read_json, read_table, read_text, read_toml
from mixlab.report.run_log import read_run_log
from mixlab.serving.guard import LOOPBACK, Guard, file_key, http_error, unexpected
from mixlab.serving.metrics import Metrics
from mixlab.serving.server import page_routes

# A report brings its style and its script with it, and needs nothing else; it runs as a page of no origin.
REPORT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src data:",
        "media-src data:",
        "style-src 'unsafe-inline'",
        "script-src 'unsafe-inline'",
        "sandbox allow-scripts",
    )
)
MAX_POINTS = 1000  # of a curve
MAX_CLASSES = 50  # of a confusion table
MAX_ROWS = 200  # of a table
MAX_TABLE_BYTES = 64 * 2**20  # of a CSV file that is shown

ListRuns = Callable[[Path], list[dict[str, Any]]]


def create_ui(
    runs: Path,
    studies: Path,
    list_runs: ListRuns,
    known: Mapping[str, str],
    *,
    hosts: tuple[str, ...] = LOOPBACK,
    token: str | None = None,
    root_path: str = "",
    language: str | None = None,
) -> ASGIApp:
    """The ASGI application. runs, studies: the folders that hold them. list_runs: gives a row for each run.
    known: the studies there are, and what each is asked about (DATA, WEIGHTS). The rest is as for `serve`."""

    def run_of(request: Request) -> Path:
        return _inside(runs, request.path_params["name"], _is_run)

    def key(kind: str, folder: Path) -> dict[str, str]:
        return {"key": file_key(token, f"/files/{kind}/{folder.name}")}

    async def overview(request: Request) -> Response:
        rows = await asyncio.to_thread(_rows, runs, list_runs)
        there = sorted(filter(_is_study, studies.iterdir())) if studies.is_dir() else []
        shown = [_study(folder) | key("studies", folder) for folder in there]
        missing = [
            {"study": name, "command": f"mixlab study {name} {subject}".rstrip()}
            for name, subject in known.items()
            if name not in {folder.name for folder in there}
        ]
        return JSONResponse({"folder": runs.name, "runs": rows, "studies": shown, "missing_studies": missing})

    async def one(request: Request) -> Response:
        run = run_of(request)
        return JSONResponse(await asyncio.to_thread(describe_run, run) | key("runs", run))

    async def study(request: Request) -> Response:
        folder = _inside(studies, request.path_params["name"], _is_study)
        return JSONResponse(await asyncio.to_thread(_study, folder, tables=True) | key("studies", folder))

    async def run_file(request: Request) -> Response:
        return _file(run_of(request), request.path_params["file"])

    async def study_file(request: Request) -> Response:
        return _file(_inside(studies, request.path_params["name"], _is_study), request.path_params["file"])

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    routes = [
        Route("/api/runs", overview, methods=["GET"]),
        Route("/api/runs/{name}", one, methods=["GET"]),
        Route("/api/studies/{name}", study, methods=["GET"]),
        Route("/files/runs/{name}/{file:path}", run_file, methods=["GET"]),
        Route("/files/studies/{name}/{file:path}", study_file, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        *page_routes({"/": "ui.html"}, language),
    ]
    handlers: dict[Any, Any] = {HTTPException: http_error, Exception: unexpected}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, hosts, token, Metrics(), root_path)


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.toml").is_file()


def _is_study(folder: Path) -> bool:
    """Whether a folder has what studies write."""
    return folder.is_dir() and ((folder / "report.html").is_file() or any(folder.glob("*.csv")))


def _inside(folder: Path, name: str, is_one: Callable[[Path], bool]) -> Path:
    """The folder of that name in `folder`, if it is one of its entries and of the right kind; else 404."""
    if not folder.is_dir() or name not in os.listdir(folder) or not is_one(folder / name):
        raise HTTPException(404, "there is no such run or study")
    return folder / name


def _file(folder: Path, name: str) -> Response:
    """A report or a figure. Where links lead, it must lie in the folder too: it may come from somebody else."""
    if name == "report.html" and _is_within(folder, folder / name):
        return FileResponse(
            folder / name, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY}
        )
    figure = name.removeprefix("figures/")
    if figure != name and figure in figures_of(folder):
        return FileResponse(folder / name, media_type="image/png")
    raise HTTPException(404, "there is no such file")


def figures_of(folder: Path) -> list[str]:
    """Names of the images of a run or study."""
    place = folder / "figures"
    if not place.is_dir():
        return []
    return sorted(
        name for name in os.listdir(place) if name.endswith(".png") and _is_within(folder, place / name)
    )


def _is_within(folder: Path, path: Path) -> bool:
    """Whether `path` is a regular file in `folder`, wherever links lead."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _rows(runs: Path, list_runs: ListRuns) -> list[dict[str, Any]]:
    """What `list_runs` says of each run, with its data, its model, when it began, and how long its log is still."""
    rows = []
    for row in list_runs(runs):
        run = Path(row["run"])
        versions = [_version(run / name) for name in ("recipe.toml", "environment.json", "metrics.jsonl")]
        idle = None if versions[2] is None else max(time.time() - versions[2] / 1e9, 0.0)
        rows.append(row | _described(run, *versions[:2]) | {"run": run.name, "idle_seconds": idle})
    return rows


def _version(path: Path) -> int | None:
    """Nanoseconds at which a file was last written; None where there is none."""
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=4096)  # the page asks every few seconds, and neither file changes as a rule
def _described(run: Path, recipe_version: int | None, environment_version: int | None) -> dict[str, Any]:
    """data, model and started (ISO 8601) of a run, None where they are not known."""

    def text(read: Callable[[Path], Any], name: str, *keys: str) -> str | None:
        try:
            value = read(run / name)
        except MixlabError:
            return None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, str) else None

    started = text(read_json, "environment.json", "started")
    try:
        started = started and datetime.fromisoformat(started).isoformat()
    except ValueError:
        started = None
    found = {
        "data": text(read_toml, "recipe.toml", "data", "source"),
        "model": text(read_toml, "recipe.toml", "model", "name"),
    }
    shown: dict[str, Any] = visible_values(without_places(found))
    return shown | {"started": started}


def _study(folder: Path, *, tables: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {
        "study": folder.name,
        "has_report": _is_within(folder, folder / "report.html"),
        "figures": figures_of(folder),
    }
    if tables:
        files = sorted(
            folder.glob("*.csv"), key=lambda path: (path.name == "curves.csv", path.name)
        )  # long, so last
        found["tables"] = [visible_values(_table(path)) for path in files]
    return found


def _table(path: Path) -> dict[str, Any]:
    """A CSV file with at most MAX_ROWS of its rows, or why it cannot be read."""
    try:
        rows = read_table(path, (), MAX_TABLE_BYTES)
    except MixlabError as error:
        return {"name": path.name, "columns": ["unreadable"], "rows": [[error.message]], "num_rows": 0}
    columns = list(rows[0]) if rows else []
    cells = [[row[column] for column in columns] for row in rows[:MAX_ROWS]]
    return {"name": path.name, "columns": columns, "rows": cells, "num_rows": len(rows)}


def describe_run(run: Path) -> dict[str, Any]:
    """All that the page shows of a run, from its files. unreadable: what is left out, and why."""
    unreadable: list[str] = []

    def part(name: str, read: Callable[[Path], Any], otherwise: Any) -> Any:
        if not os.path.lexists(run / name):
            return otherwise
        try:
            return read(run / name)
        except MixlabError as error:
            unreadable.append(f"{name}: {error.message}")
            return otherwise

    log = part("metrics.jsonl", read_run_log, [])
    curves = {
        event: _thin([row for row in log if row["event"] == event], keys)
        for event, keys in (
            ("train", ("epoch", "loss", "accuracy")),
            ("validation", ("epoch", "loss", "top1")),
        )
    }
    ends = [row for row in log if row["event"] == "end"]
    result = {key: value for key, value in (ends[-1] if ends else {}).items() if key not in ("run", "report")}
    found = {
        "run": run.name,
        "finished": bool(ends),
        "result": result,
        "recipe": part("recipe.toml", read_text, ""),
        "environment": part("environment.json", read_json, {}),
        "curves": curves,
        "confusion": part("predictions.csv", _confusion, None),
        "figures": figures_of(run),
        "has_report": _is_within(run, run / "report.html"),
    }
    shown: dict[str, Any] = visible_values(without_places(found | {"unreadable": unreadable}))
    return shown | {"run": run.name}


def _thin(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[list[Any]]:
    step = max(len(rows) // MAX_POINTS, 1)
    return [[row.get(key) for key in keys] for row in rows[::step]]


def _confusion(path: Path) -> dict[str, Any] | None:
    """Counts of (label, prediction) of the test split; None with too many classes."""
    rows = read_table(path, ("label", "prediction"), MAX_TABLE_BYTES)
    counts = Counter((from_csv(row["label"]), from_csv(row["prediction"])) for row in rows)
    names = sorted({name for pair in counts for name in pair})
    if len(names) > MAX_CLASSES:
        return None
    return {"classes": names, "counts": [[counts[a, b] for b in names] for a in names]}

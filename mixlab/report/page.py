"""report.html, of a run or of a study: one page that needs no other file and no network."""

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mixlab.errors import MixlabError
from mixlab.escape import lines
from mixlab.files import write_atomically
from mixlab.language import language, tell, word

THUMBNAIL_SIDE = 192
DOTS_PER_INCH, CSS_PIXELS_PER_INCH = 120, 96  # Figures are saved with 120; a browser's inch has 96.


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An example that was predicted wrongly.

    src: the address of its picture (`thumbnail`). media: that of what can be heard of it (`address`), if anything.
    """

    src: str
    name: str
    label: str
    predicted: str
    probability: float
    media: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page says, as plain data. many: what its examples are called, in English."""

    title: str
    many: str = "images"
    headline: list[tuple[str, str]]  # Name and value, such as ("Test accuracy", "98.3 % (354 of 360)").
    notes: list[str]  # Plain sentences.
    figures: list[tuple[str, str, Path]]  # Heading, one sentence (also the alt text), PNG file.
    per_class: list[
        dict[str, Any]
    ]  # label, num_images, num_correct; precision, recall, f1: fraction or None.
    recipe_text: str  # TOML.
    environment: dict[str, object]
    cost: list[tuple[str, str]]
    name_key: Sequence[
        tuple[str, str]
    ] = ()  # What stands in the figures for a class name that no font could draw.
    figures_before_table: int = 2  # How many figures stand above the per-class table.
    conclusions: Sequence[str] = ()  # Sentences.
    improvements: Sequence[tuple[str, str]] = ()  # Why, and the command, "" for none.
    next_commands: Sequence[tuple[str, str]] = ()  # What for, and the command.
    split_counts: Sequence[tuple[str, dict[str, int]]] = ()  # Class, and how many each split has of it.
    mistakes: Sequence[Mistake] = ()  # Worst first.
    changed_keys: Sequence[tuple[str, str, str]] = ()  # Key, value, default.


@dataclass(frozen=True, kw_only=True)
class StudyPage:
    """What the page of a study says, as plain data."""

    title: str
    question: str
    paper: str  # Where it stands there, and what was done.
    settings: list[tuple[str, str]]
    findings: list[dict[str, str]]  # statement, paper, here, verdict, limits.
    tables: list[tuple[str, list[str], list[list[str]]]]  # Title, columns, rows.
    figures: list[tuple[str, str, Path]]  # As in `Report`.
    notes: list[str]


def write_report(report: Report, path: Path) -> None:
    """Write the page as one HTML file, in the language of now. Raises DiskError, or MixlabError if a figure cannot be
    read."""
    figures = [_embed(*figure) for figure in report.figures]
    split = report.figures_before_table
    _write(
        path,
        "report.html",
        report=report,
        figures_above=figures[:split],
        figures_below=figures[split:],
    )


def write_study_page(page: StudyPage, path: Path) -> None:
    """As `write_report`."""
    _write(path, "study.html", page=page, figures=[_embed(*figure) for figure in page.figures])


def _write(path: Path, template: str, **values: Any) -> None:
    environment = Environment(
        loader=PackageLoader("mixlab.report"),
        autoescape=True,  # Class names and file names come from anywhere.
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["plain"] = _plain
    environment.globals |= {"tell": tell, "word": word, "language": language()}
    html = environment.get_template(template).render(**values)
    # A file name may hold bytes that are no text; they become question marks rather than an error.
    write_atomically(path, html.encode("utf-8", errors="replace"))


def _embed(heading: str, text: str, path: Path) -> dict[str, Any]:
    """The PNG as base64, with the CSS pixels at which its 8 pt text is 8 pt on the page."""
    try:
        png = Path(path).read_bytes()
    except OSError as error:
        message = f"could not read a figure of the report: {error.strerror or error}"
        raise MixlabError(message, where=str(path)) from error
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise MixlabError("a figure of the report is not a PNG file", where=str(path))
    width, height = (
        round(side * CSS_PIXELS_PER_INCH / DOTS_PER_INCH) for side in struct.unpack(">II", png[16:24])
    )
    data = base64.b64encode(png).decode("ascii")
    return {"heading": heading, "text": text, "data": data, "width": width, "height": height}


def thumbnail(picture: np.ndarray) -> str:
    """The address of a picture inside the page, its larger side THUMBNAIL_SIDE pixels at most.

    picture: uint8 (H, W, 1 or 3), of any size.
    """
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    content, kind = BytesIO(), "png" if max(picture.shape[:2]) <= THUMBNAIL_SIDE // 2 else "jpeg"
    image.save(content, kind, quality=85)
    return address(f"image/{kind}", content.getvalue())


def address(media_type: str, content: bytes) -> str:
    """The address of a file that is inside the page."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _shown(value: Any) -> Any:
    """What stands in the page for a value: text with nothing in it that is not seen."""
    return lines(value) if type(value) is str else value


def _percent(fraction: float | None) -> str:
    # The space before the sign is one that does not break the line.
    return "–" if fraction is None else tell("{share:.1f}\u00a0%", share=100 * fraction)


def _plain(value: object) -> str:
    """A value of the environment as a person would write it."""
    if value is None:
        return tell("not known")
    if isinstance(value, bool):
        return tell("yes") if value else tell("no")
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(item) for item in value)
    return str(value)

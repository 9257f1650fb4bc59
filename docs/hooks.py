"""What `mkdocs build` does beyond Markdown: a name for the search, and no page may load anything from elsewhere."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

# Attributes and rules by which a browser loads what they name; a plain link (`<a href>`) is followed by people only.
LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\b(?:src|srcset)=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|alternate))[^>]*?\bhref=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|(?:url\(|@import\s+)["']?(?:https?:)?//[^"')\s]+""",
    re.IGNORECASE,
)


def loads_elsewhere(text: str) -> list[str]:
    """What a page or a style sheet would load from another server."""
    return LOADS.findall(text)


def on_post_page(output: str, **_: Any) -> str:
    """The page, with a name for the theme's search box, which readers of the screen say aloud."""
    return output.replace(
        'data-md-component="search" role="dialog"',
        'data-md-component="search" role="dialog" aria-label="Search"',
    )


def on_post_build(config: Any, **_: Any) -> None:
    """Fail with the first page that would."""
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css") and (found := loads_elsewhere(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path} would load {found[0]}")

"""Text from outside made safe for where it is shown: class names, file names and paths can hold anything.

`readable` is for names that come in, so that all of mixlab sees plain text. `visible` is for terminals, pages and
figures; `for_csv` and `for_markdown` are for files that other programs read. `without_places` takes the paths of this
machine out of what leaves it.
"""

import re
import unicodedata
from typing import Any

# Controls (ESC, line breaks), formats that turn the direction of what follows (U+202E), private use and surrogates.
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # format characters that names of some languages, and emoji, are written with
_FORMULA = re.compile(r"^['=+\-@\t\r\n]")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>&|~$#!])")
# A path with at least two parts, at the beginning of a word; the part after the last separator is kept.
_PLACE = re.compile(
    r"(?<![\w:/.~\\-])(?:file://|~[\w.-]*|[A-Za-z]:)?(?:[/\\][^\s/\\\"'`()<>|,;:]+)*[/\\](?=[^\s/\\\"'`()<>|,;:])"
)


def visible(text: str, *, keep: str = "") -> str:
    """`text` with every character that is not seen, or moves others, as an escape such as `\\x1b`; but for `keep`."""
    if text.isprintable():
        return text
    return "".join(
        sign
        if sign in keep or sign in _JOINERS or unicodedata.category(sign) not in _INVISIBLE
        else sign.encode("unicode_escape", "surrogatepass").decode()
        for sign in text
    )


def readable(text: str) -> str:
    """`text` with what no screen and no file of text can hold (bytes of no coding, control characters) escaped."""
    return text if is_plain(text) else "".join(c if is_plain(c) else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def restored(text: str) -> str:
    """The name of a file of which `text` is the readable form."""

    def character(found: re.Match[str]) -> str:
        code = int(found[1][1:], 16)
        return chr(code + 0xDC00 if found[1][0] == "x" and code >= 0x80 else code)

    return re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4})", character, text)


def is_plain(text: str) -> bool:
    """Whether `text` is free of lone surrogates, control characters and line breaks."""
    if text.isprintable():  # nearly all are, and this is a hundred times as fast
        return True
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def lines(text: str) -> str:
    """`visible` for text of several lines."""
    return visible(text, keep="\n\t")


def visible_values(value: Any) -> Any:
    """`lines` for every text in a JSON value."""
    if isinstance(value, str):
        return lines(value)
    if isinstance(value, dict):
        return {visible_values(key): visible_values(inner) for key, inner in value.items()}
    return [visible_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def for_csv(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe goes before what begins like one.

    Also before an apostrophe, so that `from_csv` gives back every text.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def from_csv(cell: str) -> str:
    """The inverse of `for_csv`; cells written without it come back as they are."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell


def for_markdown(text: str) -> str:
    """One line of plain text within Markdown, whatever it looks like."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def without_places(value: Any) -> Any:
    """A JSON value without the folders of this machine: of every path in its texts the last part stays."""
    if isinstance(value, str):
        return _base_name(value)
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    return [without_places(inner) for inner in value] if isinstance(value, list | tuple) else value


def _base_name(text: str) -> str:
    kind, colon, rest = text.partition(":")
    if colon and kind in ("wds", "hf"):
        return f"{kind}:{_base_name(rest)}"
    if (
        re.match(r"(~|[A-Za-z]:\\|[/\\])", text)
        and "\n" not in text
        and not re.search(r"[\"'();,]|\s[/~]", text)
    ):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]  # all of it is a path, which may have spaces
    return _PLACE.sub("", text)

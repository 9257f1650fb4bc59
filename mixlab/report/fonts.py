"""Characters that matplotlib's own font lacks, such as Chinese, Japanese and Korean: which installed fonts have them.

matplotlib draws a character with the first of a text's families that has it, but knows only the fonts of a list that
it wrote at some time; a font installed since is found here too.
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache

from matplotlib.artist import Artist
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties, findSystemFonts, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter

from mixlab.language import tell

SANS = "sans-serif"
# The beginnings of names, best first: of fonts with all of Chinese, Japanese and Korean, then with one of them, as
# Linux, macOS and Windows bring them, then of others.
PREFERRED = (
    "Noto Sans CJK", "Source Han Sans", "Noto Sans JP", "Noto Sans KR", "Noto Sans SC", "Noto Sans TC",
    "Nanum", "UnDotum", "Baekmuk", "WenQuanYi", "IPA", "Takao", "VL ", "AR PL", "Droid Sans Fallback",
    "Hiragino", "PingFang", "Apple SD Gothic Neo", "AppleGothic", "Heiti",
    "Malgun Gothic", "Yu Gothic", "Meiryo", "MS Gothic", "Microsoft YaHei", "Microsoft JhengHei", "SimHei", "Gulim",
    "Arial Unicode", "Noto Sans",
)  # fmt: skip
MOST_FONTS = 300  # that are looked into for one character
DEBIAN_CJK, DEBIAN_OTHER = "fonts-noto-cjk", "fonts-noto-core"


def families_for(text: str, generic: str = SANS) -> list[str]:
    """The families to draw `text` with: the generic one, and those that have what it lacks."""
    missing = _missing(text)
    if not missing:
        return [generic]
    return list(dict.fromkeys([generic, SANS, *_fallbacks(missing)[0]]))


def undrawable(text: str) -> set[str]:
    """The characters of `text` that no installed font has."""
    missing = _missing(text)
    return set(_fallbacks(missing)[1]) if missing else set()


def drawable_names(names: Sequence[str]) -> list[str]:
    """`names`, with `class 3` in place of the third where no installed font could draw it."""
    missing = undrawable("".join(names))
    return [tell("class {i}", i=i) if missing & set(name) else name for i, name in enumerate(names, start=1)]


def describe_undrawable(key: Sequence[tuple[str, str]]) -> str:
    """A sentence on names that stand otherwise in figures, and what to install. key: what stands there, the name."""
    packages = {DEBIAN_CJK if _region(undrawable(name)) else DEBIAN_OTHER for _, name in key}
    values = {"name": key[0][1], "shown": key[0][0], "packages": " ".join(sorted(packages))}
    if len(key) == 1:
        return tell(
            "1 class name has characters that no font here can draw: {name}, which is {shown} in the figures; "
            "install a font that has them (Debian, Ubuntu: {packages})",
            **values,
        )
    return tell(
        "{n} class names have characters that no font here can draw, such as {name}, which is {shown} in the "
        "figures; install a font that has them (Debian, Ubuntu: {packages})",
        n=len(key),
        **values,
    )


def use_fallbacks(figure: Figure) -> None:
    """Give every text of a finished figure the families that its characters need."""
    for axis in (axis for ax in figure.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)):
        if isinstance(axis.get_major_formatter(), FuncFormatter | FixedFormatter | StrCategoryFormatter):
            axis.get_majorticklabels()  # ticks with names get their texts when they are read
    # Looked for in all of an axes without an axis, texts would make its ticks, which takes longer than to draw it.
    parts: list[Artist] = [*figure.texts, *figure.legends]
    for ax in figure.axes:
        parts += [ax] if ax.axison else [*ax.texts, ax.title]
    for artist in (artist for part in parts for artist in part.findobj(Text)):
        assert isinstance(artist, Text)
        if _missing(artist.get_text()):
            families = artist.get_fontfamily()
            found = families_for(artist.get_text())
            artist.set_fontfamily(list(dict.fromkeys([*families, *found])))


def order_families(names: Iterable[str], region: str) -> list[str]:
    """Names of fonts, the preferred ones first, and of those the ones of `region` (JP, KR, SC, or none)."""

    def place(name: str) -> tuple[int, bool, str]:
        rank = next((i for i, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
        return rank, not (region and name.endswith(region)), name

    return sorted(set(names), key=place)


def pick_families(
    missing: Iterable[str], families: Iterable[str], characters_of: Callable[[str], frozenset[int]]
) -> tuple[list[str], set[str]]:
    """The first of `families` that have some of the missing characters, and the characters that none has."""
    left, picked = set(missing), []
    for family in families:
        if not left:
            break
        covered = {character for character in left if ord(character) in characters_of(family)}
        if covered:
            picked.append(family)
            left -= covered
    return picked, left


def _missing(text: str) -> frozenset[str]:
    """What the default font lacks of `text`, but for characters that nobody sees."""
    if text.isascii():
        return frozenset()
    known = _characters_of(SANS)
    return frozenset(
        character
        for character in text
        if ord(character) not in known
        and unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp")
        and not "\ufe00" <= character <= "\ufe0f"  # variation selectors
    )


@lru_cache(maxsize=128)
def _fallbacks(missing: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that have what is missing, and what is left; at first of the fonts that matplotlib knows."""
    region = _region(missing)
    picked, left = pick_families(missing, _listed(region), _characters_of)
    if left and _add_new_fonts():
        picked, left = pick_families(missing, _listed(region), _characters_of)
    return tuple(picked), frozenset(left)


def _listed(region: str) -> list[str]:
    names = {entry.name for entry in fontManager.ttflist if _is_plain(entry)}
    return order_families(names, region)[:MOST_FONTS]


def _is_plain(entry: FontEntry) -> bool:
    """Whether a font is upright, of normal width and weight, and no stand-in for all characters."""
    is_regular = entry.style == entry.stretch == "normal" and entry.weight in (400, "normal", "regular")
    return is_regular and not entry.name.startswith("Last Resort")


def _add_new_fonts() -> bool:
    """Make matplotlib know the fonts that were installed since it wrote its list; whether there are any."""
    known = {entry.fname for entry in fontManager.ttflist}
    fresh = [path for path in findSystemFonts() if path not in known]
    for path in fresh:
        with suppress(Exception):  # a damaged file, or a format that FreeType does not read
            fontManager.addfont(path)
    return bool(fresh)


@lru_cache(maxsize=4)  # one of 45,000 code points takes 3 MB
def _characters_of(family: str) -> frozenset[int]:
    """The code points that the font of this family has."""
    try:
        wanted = FontProperties(family=[family])  # a bare name would be read as a pattern
        path = fontManager.findfont(wanted, fallback_to_default=False, rebuild_if_missing=False)
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # the list names a file that is gone, or no font any more
        return frozenset()


def _region(characters: Iterable[str]) -> str:
    """JP, KR or SC where the characters are of these; what the three have in common counts as SC."""
    region = ""
    for character in characters:
        name = unicodedata.name(character, "")
        if name.startswith(("HIRAGANA", "KATAKANA")):
            return "JP"
        if name.startswith("HANGUL"):
            region = "KR"
        elif name.startswith("CJK") and not region:
            region = "SC"
    return region

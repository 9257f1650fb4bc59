"""The keys of a recipe as text: their table, TOML, what a person types, and what help and docs say of them."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache, reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mixlab.errors import UsageError, WeightsError
from mixlab.models.family import with_new_names
from mixlab.records import read_toml
from mixlab.settings import Level
from mixlab.training.recipe import Recipe
from mixlab.words import with_article

# Keys of older recipes: the only value that still means something (None: any, without another key it meant nothing),
# and what to use instead of any other.
RETIRED: dict[str, tuple[float | None, str]] = {
    "coarse_share": (0.0, "--model.patch-size takes larger patches for the whole training"),
    "coarse_factor": (None, ""),
    "optimizer.sam_from": (0.0, "--optimizer.sam-rho holds for the whole training"),
}

# What people call a key elsewhere.
ALIASES = {
    "learning_rate": "optimizer.lr",
    "epoch": "epochs",
    "batch": "batch_size",
    "workers": "data.num_workers",
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a recipe: its dotted name, type, default, what it does in a sentence, and who needs it."""

    name: str
    hint: Any
    default: Any
    sentence: str
    level: Level

    @property
    def option(self) -> str:
        """As a person types it."""
        return as_option(self.name)

    @property
    def other_names(self) -> tuple[str, ...]:
        """What else is taken for it: its last part, where no other key ends so, and what it is called elsewhere."""
        last = self.name.rpartition(".")[2]
        is_clear = "." in self.name and sum(name.rpartition(".")[2] == last for name in recipe_keys()) == 1
        return (*([last] if is_clear else []), *(name for name, key in ALIASES.items() if key == self.name))

    def value_in(self, recipe: Recipe) -> Any:
        """What a recipe has for it."""
        return reduce(getattr, self.name.split("."), recipe)

    @property
    def default_text(self) -> str:
        """The default as a person would write it."""
        return self.text_of(self.default)

    def text_of(self, value: Any) -> str:
        """A value of it as a person would type it."""
        if value is None:
            return "auto" if "auto" in self.sentence else "none"
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return ("x" if type_name(self.hint) == "HxW" else ",").join(map(str, value))
        return str(value)


def as_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@cache
def recipe_keys() -> Mapping[str, Key]:
    """The table of all keys, by name, in order."""
    found: dict[str, Key] = {}
    hints = get_type_hints(Recipe)
    for outer in fields(Recipe):
        config = hints[outer.name]
        if not is_dataclass(config):
            found[outer.name] = _key(outer.name, config, outer)
            continue
        inner_hints = get_type_hints(config)
        for inner in fields(config):
            name = f"{outer.name}.{inner.name}"
            found[name] = _key(name, inner_hints[inner.name], inner)
    return MappingProxyType(found)


def _key(name: str, hint: Any, field: Any) -> Key:
    default = None if field.default is MISSING else field.default
    told = field.metadata
    return Key(name=name, hint=hint, default=default, sentence=told["sentence"], level=told["level"])


def keys_as_markdown() -> str:
    """The page of the settings, docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Every key of a recipe: on the command line as `--KEY VALUE`, in a TOML file under its part's name, in",
        "Python as `PART__KEY=VALUE`. The part before the dot may be left out where that is clear. This page is what",
        "`python -m mixlab.training.keys` prints; `mixlab keys KEY` says the same of one. Taken for a key too are",
        f"{', '.join(f'`{name}` (`{key}`)' for name, key in ALIASES.items())}.",
    ]
    for level, title in (("common", "Common"), ("more", "More"), ("expert", "For experts")):
        lines += ["", f"## {title}", "", "| key | takes | default | what it does |", "|---|---|---|---|"]
        for key in recipe_keys().values():
            if key.level == level:
                kind = type_name(key.hint).replace("|", ", ")
                lines.append(f"| `{key.name}` | {kind} | {key.default_text} | {key.sentence} |")
    return "\n".join(lines) + "\n"


def to_toml(
    recipe: Recipe, without: Callable[[Any], Any] = lambda values: values, *, with_comments: bool = False
) -> str:
    """The recipe as TOML that `from_toml` reads back equal; what is None is left out.

    without: takes something out of the values, which is then not read back. with_comments: each key's sentence is
    above it.
    """
    import tomli_w

    text = tomli_w.dumps(without(_without_none(asdict(recipe))))
    if not with_comments:
        return text
    lines, part = [], ""
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("["):
            part = f"{line.strip('[]')}."
        elif name := re.match(r"\w+(?= = )", line):
            lines.append(f"# {recipe_keys()[part + name[0]].sentence}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def from_toml(path: Path) -> dict[str, Any]:
    """Flat overrides, `optimizer.lr` -> value, of a TOML file; UsageError with line or key if it is wrong."""
    if not path.exists():
        raise UsageError("there is no such recipe file", where=str(path))
    try:
        values = read_toml(path, follow=True)
    except WeightsError as error:
        raise UsageError(f"the recipe file cannot be read: {error.message}", where=error.where) from error
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return flat


def override(
    recipe: Recipe, values: dict[str, Any], *, where: str | None = None, to_train: bool = True
) -> Recipe:
    """`recipe` with keys replaced; values may be text. UsageError names the nearest key or the type.

    to_train: False where only the data of a run is needed, whatever it was trained with.

    A key is dotted (`optimizer.lr`), or its last part where only one key ends so (`lr`).
    """
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        key, value = _named_as_today(key, value)
        full = full_key(key, where=where)
        if full in RETIRED:
            if to_train:
                _check_retired(full, value, where)
            continue
        group, _, name = full.rpartition(".")
        groups.setdefault(group, {})[name] = _convert(value, recipe_keys()[full].hint, full, where)
    top = groups.pop("", {})
    parts = {group: replace(getattr(recipe, group), **changes) for group, changes in groups.items()}
    return replace(recipe, **parts, **top)


def _named_as_today(key: str, value: Any) -> tuple[str, Any]:
    """A key and its value, where a setting of models had another name before."""
    part, _, name = key.rpartition(".")
    if part not in ("", "model"):
        return key, value
    ((name, value),) = with_new_names({name: value}).items()
    return f"{part}.{name}" if part else name, value


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _check_retired(key: str, value: Any, where: str | None) -> None:
    """UsageError if an older recipe asks for what is no longer there."""
    default, instead = RETIRED[key]
    if default is not None and _number(value) != default:
        raise UsageError(
            f"{key} is no longer there, and this recipe sets it to {value!r}",
            where=where or key,
            hint=f"leave it out: {instead}; LOG.md says why it went",
        )


def full_key(key: str, *, also: Iterable[str] = (), where: str | None = None) -> str:
    """`lr` -> `optimizer.lr`; UsageError with the nearest of the keys, and of `also`, for an unknown one."""
    known = recipe_keys()
    key, _ = _named_as_today(ALIASES.get(key, key), None)
    if key in known or key in RETIRED:
        return key
    short = [name.split(".")[-1] for name in known]
    inner = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    if "." not in key and len(inner) == 1:
        return inner[0]
    gone = [name for name in RETIRED if name.split(".")[-1] == key]
    if gone:
        return gone[0]
    close = difflib.get_close_matches(key, [*also, *known, *short, *ALIASES], n=1)
    nearest = next(iter([*inner, *close]), None)
    raise UsageError(
        f"recipes have no key {key!r}",
        where=where,
        hint=f"did you mean {nearest!r}?" if nearest else "`mixlab keys` lists the keys",
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    kept = {k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def type_name(hint: Any) -> str:
    """A type as a person writes it: `fp32|bf16`, `number`, `on|off`, `HxW`."""
    if get_origin(hint) is Literal:
        return "|".join(str(value) for value in get_args(hint))
    if get_origin(hint) is tuple:
        return "numbers" if Ellipsis in get_args(hint) else "HxW"
    plain = [part for part in get_args(hint) if part is not type(None)]
    if plain:
        return type_name(plain[0])
    return {float: "number", int: "integer", bool: "true|false", str: "text"}[hint]


def _convert(value: Any, hint: Any, key: str, where: str | None) -> Any:
    """`value`, text or TOML, as the type `hint`; UsageError says what is expected."""
    options = get_args(hint) if get_origin(hint) is not Literal and get_origin(hint) is not tuple else (hint,)
    options = options or (hint,)
    if type(None) in options and value in (None, "none", "auto"):
        return None
    if key == "batch_size" and value == "auto":
        return 0
    target = next(option for option in options if option is not type(None))
    try:
        return _parse(value, target)
    except (ValueError, TypeError, KeyError):
        raise UsageError(
            f"{key} takes {with_article(type_name(target))}, got {value!r}", where=where or key
        ) from None


def parse_image_size(text: Any) -> tuple[int, int]:
    """`64` or `64x48` -> (height, width); UsageError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", str(text).strip().lower())
    if match is None:
        raise UsageError(
            f"{text!r} is no image size", where="image_size", hint="write 64 or 64x48 (height x width)"
        )
    return int(match[1]), int(match[2] or match[1])


def _parse(value: Any, target: Any) -> Any:
    if get_origin(target) is Literal:
        if value not in get_args(target):
            raise ValueError
        return value
    if get_origin(target) is tuple and Ellipsis in get_args(target):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(_parse(part, get_args(target)[0]) for part in parts)
    if get_origin(target) is tuple:
        return parse_image_size(
            "x".join(str(side) for side in value) if isinstance(value, list | tuple) else value
        )
    if target is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}[
            str(value).lower()
        ]
    if isinstance(value, bool):
        raise ValueError
    if target is int and isinstance(value, float):
        raise ValueError
    if target is str and not isinstance(value, str):
        raise ValueError
    if target is float and not math.isfinite(float(value)):
        raise ValueError
    return target(value)


if __name__ == "__main__":
    print(keys_as_markdown(), end="")

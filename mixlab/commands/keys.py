"""`mixlab keys`, and the keys of a recipe as help and completion show them. torch is imported inside."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from cyclopts import Group, Parameter
from cyclopts.help import ColumnSpec, DefaultFormatter, DescriptionRenderer, NameRenderer

from mixlab.commands.context import Context, emit
from mixlab.settings import Level

NAME_WIDTH = 32  # the longest name of a key in one piece, in a terminal of 80 columns too


def keys(
    key: str | None = None, /, *, everything: Annotated[bool, Parameter(name="--all", negative="")] = False
) -> None:
    """What can be set in a recipe: the common keys, all of them, those of a part, or one explained.

    Parameters
    ----------
    key
        A key such as optimizer.lr, lr or epochs; or a part such as optimizer, for all of its keys.
    everything
        All keys, those for experts too.
    """
    from mixlab.report.tables import show_key, show_keys
    from mixlab.training.keys import full_key, recipe_keys

    screen = Context.screen()
    known = recipe_keys()
    if key is None:
        shown = [one for one in known.values() if everything or one.level == "common"]
    else:
        key = key.replace("-", "_")
        shown = [one for one in known.values() if one.name.startswith(f"{key}.")]
        shown = shown or [known[full_key(key, also={name.partition(".")[0] for name in known})]]
    rows = [_row(one) for one in shown]
    if len(rows) == 1:
        rows[0]["recipes"] = _in_recipes(shown[0])
        show_key(rows[0], screen)
    else:
        show_keys(rows, screen)
        screen.say("`mixlab keys KEY` explains one" + ("" if key or everything else "; --all lists all"))
    emit({"keys": rows})


def _row(key: Any) -> dict[str, Any]:
    from mixlab.training.keys import as_option, type_name

    return {
        "key": key.name,
        "options": [key.option, *map(as_option, key.other_names)],
        "takes": type_name(key.hint),
        "default": key.default_text,
        "sentence": key.sentence,
        "level": key.level,
    }


def _in_recipes(key: Any) -> dict[str, Any]:
    """What named recipes have for a key, as text, where it is not the default."""
    from mixlab.recipes import RECIPES

    values = {name: key.value_in(named.build()) for name, named in RECIPES.items()}
    return {
        name: replace(key, default=value).default_text
        for name, value in values.items()
        if value != key.default
    }


def _default_text(text: str, _: Any) -> str:
    return text


def with_keys(command: Callable[..., Any], levels: Collection[Level]) -> Callable[..., Any]:
    """`command` for help and completion, never called: its options and the recipe's keys of these levels."""
    from mixlab.training.keys import as_option, recipe_keys

    names = ColumnSpec(
        renderer=NameRenderer(max_width=NAME_WIDTH), style="cyclopts.name", max_width=NAME_WIDTH
    )
    group = Group(
        "Keys of the recipe; `mixlab keys KEY` says more of one",
        sort_key=9,
        help_formatter=DefaultFormatter(column_specs=(names, ColumnSpec(renderer=DescriptionRenderer()))),
    )
    own = inspect.signature(command)
    parameters = [parameter for parameter in own.parameters.values() if parameter.name != "overrides"]
    for key in recipe_keys().values():
        if key.level not in levels or (key.name == "init_from" and "weights" in own.parameters):
            continue
        told = Parameter(
            name=[key.option, *map(as_option, key.other_names)],
            help=key.sentence,
            group=group,
            show_default=partial(_default_text, key.default_text),
            negative="",
        )
        # A size or several numbers are one word to us, and would be several to cyclopts.
        is_one_word = any(get_origin(part) is tuple for part in (key.hint, *get_args(key.hint)))
        parameters.append(
            inspect.Parameter(
                key.name.replace(".", "__"),
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[str if is_one_word else key.hint, told],
            )
        )

    def shown() -> None:
        """Replaced by the command's."""

    shown.__doc__, shown.__name__ = command.__doc__, command.__name__
    shown.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    shown.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return shown

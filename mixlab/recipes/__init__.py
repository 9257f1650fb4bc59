"""What to train, by purpose. A recipe is a function returning a `Recipe`; its docstring states what it gave."""

import difflib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixlab.errors import UsageError
from mixlab.recipes.small import digits, few_images, small_images
from mixlab.training.loop import train as train_recipe
from mixlab.training.recipe import Recipe, from_toml, override

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "small_images": small_images,
    "few_images": few_images,
}
FEW = 5_000  # training images below which `auto` takes few_images


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`, or in the TOML file of that name; UsageError with the nearest name."""
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".toml"):
        return override(Recipe(), from_toml(Path(name)), where=name)
    close = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(RECIPES)}, and files *.toml"
    raise UsageError(f"there is no recipe called {name!r}", where="--recipe", hint=hint)


def recipe_for(data: str, *, data_dir: str | None = None, download: bool = False) -> Recipe:
    """The recipe that `auto` means for this data set."""
    from mixlab.data.sources import open_source

    if data == "digits":
        return digits()
    source = open_source(data, data_dir=data_dir, download=download)
    num_images = sum(len(split) for name, split in source.splits.items() if name in ("train", "val", "all"))
    return few_images() if num_images < FEW else small_images()


def train(recipe: Recipe | str = "auto", data: str | None = None, *, budget: str | None = None, **options: Any) -> Any:
    """Train and return what `mixlab train --json` prints.

    recipe: a `Recipe`, the name of one, a TOML file, or `auto` for the one that suits the data. data: a set's
    name, folder or CSV file; None takes the recipe's. budget: `10m`, total time from this call. options: those
    of `mixlab.training.loop.train` (run, device, download, ...), and recipe keys with `__` for the dot
    (`optimizer__lr=3e-4`).
    """
    from mixlab.training.budget import parse_duration

    arguments = ("run", "started", "device", "download", "with_pictures", "tracker", "screen")
    overrides = {key.replace("__", "."): value for key, value in options.items() if key not in arguments}
    options = {key: value for key, value in options.items() if key in arguments}
    options.setdefault("started", time.monotonic())
    if isinstance(recipe, str):
        data_dir = overrides.get("data.data_dir")
        chosen = data or "digits"
        if recipe == "auto":
            recipe = recipe_for(chosen, data_dir=data_dir, download=options.get("download", False))
        else:
            recipe = find_recipe(recipe)
    if data is not None:
        recipe = replace(recipe, data=replace(recipe.data, source=data))
    recipe = override(recipe, overrides)
    if isinstance(options.get("run"), str):
        options["run"] = Path(options["run"])
    return train_recipe(recipe, budget_seconds=None if budget is None else parse_duration(budget), **options)

"""What to train, by purpose. A recipe is a function returning a `Recipe`; `RECIPES` says what each is for."""

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from mixlab.checkpoint.store import run_path
from mixlab.data.config import DataConfig
from mixlab.data.dataset import Source
from mixlab.data.images.augment import AugmentConfig
from mixlab.data.modality import SETS
from mixlab.data.sources import open_source
from mixlab.errors import UsageError, UsageTypeError, check_type, path_text
from mixlab.language import LANGUAGES
from mixlab.planning.budget import parse_duration
from mixlab.planning.draft import Request
from mixlab.planning.lr_grid import LrGrid
from mixlab.planning.train import resume as resume_run
from mixlab.planning.train import train as train_request
from mixlab.recipes.finetune import finetune
from mixlab.recipes.pretrain import (
    pretrain_imagenet1k,
    pretrain_imagenet1k_gsam,
    pretrain_imagenet1k_sam,
    pretrain_imagenet21k,
)
from mixlab.recipes.run import Run
from mixlab.recipes.small import digits, small_data, small_images, small_images_flat
from mixlab.recipes.sounds import small_sounds, speech_commands, tones
from mixlab.report.screen import Screen
from mixlab.training.history import StartOver
from mixlab.training.keys import from_toml, full_key, override
from mixlab.training.recipe import Recipe
from mixlab.training.session import Session


@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """A recipe that has a name. result: what it gave, a row of docs/results/accuracy.csv, or what others report."""

    build: Callable[[], Recipe]
    purpose: str
    result: str
    is_measured: bool = False  # here, by the authors of mixlab


NOT_YET = "Not yet measured here"
SLOW, QUICK = "2 cores EPYC (Zen 3)", "2 cores EPYC (Zen 4)"
RECIPES: dict[str, NamedRecipe] = {
    "digits": NamedRecipe(
        build=digits,
        purpose="scikit-learn's 8 x 8 digits",
        result=f"98.38 +- 0.6 % (n=5), {SLOW}, commit 7489b51",
        is_measured=True,
    ),
    "small_images": NamedRecipe(
        build=small_images,
        purpose="Tens of thousands of small images, by a pyramid of the size that a budget has time for, else Mini",
        result=f"CIFAR-10 in ten minutes: 84.49 +- 0.22 % (n=3), {SLOW}, commit d4fb3bb",
        is_measured=True,
    ),
    "small_images_flat": NamedRecipe(
        build=small_images_flat,
        purpose="Tens of thousands of small images, by a flat Mixer",
        result=f"CIFAR-10 in ten minutes: 79.84 +- 0.20 % (n=3), {SLOW}, commit b973f10",
        is_measured=True,
    ),
    "small_data": NamedRecipe(
        build=small_data,
        purpose="A few hundred images a class, your own folder, by a pyramid",
        result=f"2,000 images of CIFAR-10: 64.69 +- 0.67 % (n=3), {SLOW}, commit 67e9e6c",
        is_measured=True,
    ),
    "tones": NamedRecipe(
        build=tones,
        purpose="The tones that come with mixlab, by a small Mixer of frames",
        result=f"99.44 +- 0.48 % (n=3), {QUICK}, commit 6beaf2e",
        is_measured=True,
    ),
    "small_sounds": NamedRecipe(
        build=small_sounds,
        purpose="Hundreds to thousands of short sounds, such as spoken words, by a Mixer of frames",
        result=f"3,000 spoken digits: 99.40 +- 0.37 % (n=5), {QUICK}, commit b25eac1",
        is_measured=True,
    ),
    "speech_commands": NamedRecipe(
        build=speech_commands,
        purpose="The 35 words of Speech Commands, by a Mixer of the size of KW-MLP",
        result=f"{NOT_YET}: KW-MLP, of gated MLPs, gives 97.56 % with 0.42 million parameters",
    ),
    "finetune": NamedRecipe(
        build=finetune,
        purpose="Fine-tuning from `--init-from WEIGHTS`, as the Mixer's authors did it",
        result=f"{NOT_YET}: the authors give 96.72 % on CIFAR-10 for Mixer-B/16 from ImageNet-1k at 224 pixels",
    ),
    "pretrain_imagenet1k": NamedRecipe(
        build=pretrain_imagenet1k,
        purpose="Mixer-B/16 on ImageNet-1k from scratch, as its authors trained it",
        result=f"{NOT_YET}: the paper gives 76.44 % at 224 pixels (Table 3), the authors' released recipe 76.3 %",
    ),
    "pretrain_imagenet1k_sam": NamedRecipe(
        build=pretrain_imagenet1k_sam,
        purpose="Mixer-B/16 on ImageNet-1k with SAM: only crops and flips, and a step takes two passes",
        result=f"{NOT_YET}: Chen et al. 2021 give 77.4 %, against 66.4 % for the same without SAM",
    ),
    "pretrain_imagenet1k_gsam": NamedRecipe(
        build=pretrain_imagenet1k_gsam,
        purpose="Mixer-B/16 on ImageNet-1k with GSAM: only crops and flips, and a step takes two passes",
        result=f"{NOT_YET}: Zhuang et al. 2022 give 77.8 %, 75.0 % for Mixer-S/16 and 76.8 % for Mixer-S/8",
    ),
    "pretrain_imagenet21k": NamedRecipe(
        build=pretrain_imagenet21k,
        purpose="Mixer-B/16 on ImageNet-21k, to be fine-tuned afterwards",
        result=f"{NOT_YET}: the paper gives 80.64 % on ImageNet-1k after fine-tuning at 224 pixels (Table 3)",
    ),
}
FEW = 5_000  # training images below which `auto` takes small_data


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`, or in the TOML file of that name; UsageError with the nearest name."""
    if name in RECIPES:
        return RECIPES[name].build()
    if name.endswith(".toml"):
        return override(Recipe(), from_toml(Path(name)), where=name)
    close = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(RECIPES)}, and files *.toml"
    raise UsageError(f"there is no recipe called {name!r}", where="--recipe", hint=hint)


def describe_recipe(name: str) -> dict[str, Any]:
    """Name, `purpose`, `result` and `is_measured` of a recipe, as `mixlab recipes --json` has them."""
    named = RECIPES[name]
    return {"name": name, "purpose": named.purpose, "result": named.result, "is_measured": named.is_measured}


def list_recipes() -> list[dict[str, Any]]:
    """`describe_recipe` of every named recipe."""
    return [describe_recipe(name) for name in RECIPES]


def recipe_for(data: DataConfig, *, download: bool = False) -> Recipe:
    """The recipe that `auto` means for this data set."""
    if data.source in SETS and data.source in RECIPES:
        return find_recipe(data.source)
    source = _open(data, download)
    num_images = _num_images(data, source)
    if source.modality.recipes is None:
        return _for_few(Recipe(), num_images) if num_images < FEW else Recipe()
    few, many = source.modality.recipes
    return find_recipe(many) if num_images >= FEW else _for_few(find_recipe(few), num_images)


def _open(data: DataConfig, download: bool) -> Source:
    return open_source(data.source, data_dir=data.data_dir, download=download, streaming=data.streaming)


def _num_images(data: DataConfig, source: Source) -> int:
    """How many examples there are to learn from, those for validation included."""
    num_images = sum(len(split) for name, split in source.splits.items() if name in ("train", "val", "all"))
    return round(data.train_fraction * num_images)


def _for_few(recipe: Recipe, num_images: int) -> Recipe:
    """The recipe with a batch so small that even these few images make several steps an epoch."""
    return replace(recipe, batch_size=max(min(recipe.batch_size, num_images // 4), 8))


def _finetune_for(data: DataConfig, *, download: bool) -> Recipe:
    """`finetune`; for few images in the authors' lengths for Pets and Flowers, and with a batch that suits them."""
    source = _open(data, download)
    recipe, num_images = finetune(), _num_images(data, source)
    if source.modality.part != "augment":  # how the authors cut and flip images says nothing of others
        recipe = replace(
            recipe, augment=AugmentConfig(), data=DataConfig(val_fraction=recipe.data.val_fraction)
        )
    if num_images >= FEW:
        return recipe
    recipe = replace(
        recipe,
        steps=500,
        accumulate=1,
        data=replace(recipe.data, val_fraction=0.1),
        schedule=replace(recipe.schedule, warmup_steps=100),
    )
    return _for_few(recipe, num_images)


def compose(
    data: str | None,
    *,
    recipe: str = "auto",
    config: Path | None = None,
    overrides: dict[str, Any] | None = None,
    has_budget: bool = False,
    download: bool = False,
) -> Recipe:
    """The recipe that a person asks for: a named one (or what suits the data), then `config`, then `overrides`.

    A length given last wins: `steps` puts `epochs` aside and the other way round, a budget puts both aside.
    """
    if download and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "several processes would fetch the set at once",
            where="--download",
            hint="`mixlab check DATA --download` first",
        )
    overrides = {full_key(key): value for key, value in (overrides or {}).items()}
    from_file = from_toml(config) if config is not None else {}
    from_file = {full_key(key, where=str(config)): value for key, value in from_file.items()}
    data = data or overrides.pop("data.source", None) or from_file.get("data.source")
    given = from_file | overrides
    where_to_look = ("data.data_dir", "data.streaming", "data.train_fraction")
    looked_at = {key: given[key] for key in where_to_look if key in given} | {"data.source": data}
    if recipe == "finetune" and data is not None:
        chosen = _finetune_for(override(Recipe(), looked_at).data, download=download)
    elif recipe != "auto":
        chosen = find_recipe(recipe)
    elif "name" in from_file:
        chosen = Recipe()  # the file of a run is a whole recipe: nothing of another one shines through
    elif data is not None:
        chosen = recipe_for(override(Recipe(), looked_at).data, download=download)
    else:
        raise UsageError("no data set is named", where="DATA", hint="such as in `mixlab train digits`")
    data = data or chosen.data.source
    named = chosen
    if from_file:
        chosen = override(chosen, from_file, where=str(config))
    chosen = override(chosen, {"data.source": data} | overrides)
    if chosen.init_from is not None:
        # The model follows from the weights; the recipe's own choice is not the person's.
        follows: dict[str, Any] = {key: None for key in ("name", "gelu") if f"model.{key}" not in given}
        chosen = replace(chosen, model=replace(chosen.model, **follows))
    chosen = _with_length(chosen, overrides, has_budget)
    return chosen if "schedule.warmup_steps" in given else _with_warmup(chosen, named)


def _with_warmup(recipe: Recipe, named: Recipe) -> Recipe:
    """A run that is not as long as its recipe, or not yet known to be, keeps the share of the warm-up instead."""
    schedule, steps = named.schedule, named.steps
    if schedule.warmup_steps is None or steps is None or (recipe.steps or 0) >= steps:
        return recipe
    share = schedule.warmup_steps / steps
    return replace(recipe, schedule=replace(recipe.schedule, warmup_steps=None, warmup_fraction=share))


def _with_length(recipe: Recipe, overrides: dict[str, Any], has_budget: bool) -> Recipe:
    """A length given by the person puts aside those of the recipe; a budget does so with both, and stands alone."""
    if has_budget:
        if any(overrides.get(key) is not None for key in ("steps", "epochs")):
            raise UsageError(
                "a budget sets the steps itself", where="--budget", hint="leave steps and epochs out"
            )
        return replace(recipe, steps=None, epochs=None)
    if "steps" in overrides and "epochs" not in overrides:
        return replace(recipe, epochs=None)
    if "epochs" in overrides and "steps" not in overrides:
        return replace(recipe, steps=None)
    return recipe


# What `train` takes beside keys of the recipe, for `check_type`.
_PATH, _NONE, _PATH_WORDS = (str, os.PathLike), type(None), "a path or a name"
_TIME = "a time of time.monotonic()"
SESSION_ARGUMENTS: dict[str, tuple[tuple[type, ...], str]] = {
    "started": ((float, int), _TIME),
    "device": ((str,), "auto, cpu, cuda or mps"),
    "with_pictures": ((bool,), "True or False"),
    "figures": ((bool,), "True or False"),
    "language": ((str,), "en or ko"),
    "tracker": ((str, _NONE), "tensorboard, wandb or None"),
    "screen": ((Screen, _NONE), "a Screen, or None"),
}
ARGUMENTS = SESSION_ARGUMENTS | {
    "run": ((*_PATH, _NONE), f"{_PATH_WORDS}, or None"),
    "lr_grid": ((LrGrid, _NONE), "an LrGrid, or None"),
    "download": ((bool,), "True or False"),
}


def train(
    data: str | os.PathLike[str] | None = None,
    recipe: Recipe | str | os.PathLike[str] = "auto",
    *,
    budget: str | None = None,
    **options: Any,
) -> Run:
    """Train and return the finished run.

    data: a set's name, folder or CSV file; None takes the recipe's. recipe: a `Recipe`, the name of one, a TOML
    file, or `auto` for the one that suits the data. budget: `10m`, total time from this call. options: run,
    download, those of a `Session` (device, screen, ...), and recipe keys with `__` for the dot
    (`optimizer__lr=3e-4`). UsageTypeError, a TypeError too, for an argument of another kind.
    """
    _check_order(data)
    check_type(recipe, (Recipe, *_PATH), "recipe", "a Recipe, the name of one, or a TOML file")
    check_type(data, (*_PATH, _NONE), "data", f"{_PATH_WORDS} of a data set, or None")
    check_type(budget, (str, _NONE), "budget", "a length of time such as '10m', or None")
    for key, (kinds, taken) in ARGUMENTS.items():
        if key in options:
            check_type(options[key], kinds, key, taken)
    data = None if data is None else os.fsdecode(data)
    session = session_of({key: options.pop(key) for key in SESSION_ARGUMENTS if key in options})
    run, download, trials = (
        options.pop("run", None),
        options.pop("download", False),
        options.pop("lr_grid", None),
    )
    overrides = {key.replace("__", "."): value for key, value in options.items()}
    if not isinstance(recipe, Recipe):
        recipe = os.fsdecode(recipe)
        recipe = compose(
            data,
            recipe=recipe,
            overrides=overrides,
            has_budget=budget is not None,
            download=download,
        )
    else:
        overrides = {full_key(key): value for key, value in overrides.items()}
        changed = override(recipe, ({} if data is None else {"data.source": data}) | overrides)
        recipe = _with_length(changed, overrides, budget is not None)
    request = Request(
        recipe=recipe,
        run=None if run is None else _run_folder(run),
        budget_seconds=None if budget is None else parse_duration(budget),
        trials=trials,
        download=download,
    )
    return Run(train_request(request, session))


def _check_order(data: Any) -> None:
    """UsageTypeError for a recipe in the place of the data, where it stood in older versions."""
    is_name = isinstance(data, str) and data in ("auto", *RECIPES) and data not in SETS
    if isinstance(data, Recipe) or (is_name and not os.path.exists(data)):
        what = repr(data) if is_name else "this argument"
        raise UsageTypeError(
            f"{what} is a recipe, and the data comes first",
            where="data",
            hint="mixlab.train(DATA, RECIPE), or mixlab.train(recipe=RECIPE) for the recipe's own data",
        )


def resume(
    run: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    start_over: StartOver = "never",
    **options: Any,
) -> Run:
    """Go on with a training exactly where it stopped, and return the finished run.

    run: its folder, or its name under ./runs. data: where its data set is now, if it was moved. start_over: `always`
    begins it again, and keeps what is there beside. options: those of a `Session` (device, screen, ...).
    """
    check_type(run, _PATH, "run", _PATH_WORDS)
    check_type(data, (*_PATH, _NONE), "data", f"{_PATH_WORDS} of a data set, or None")
    for key, value in options.items():
        if key not in SESSION_ARGUMENTS:
            raise UsageError(f"resume takes no {key!r}", hint="it goes on with the run as it is")
        check_type(value, SESSION_ARGUMENTS[key][0], key, SESSION_ARGUMENTS[key][1])
    moved_to = None if data is None else os.fsdecode(data)
    return Run(resume_run(_run_folder(run), session_of(options), data=moved_to, start_over=start_over))


def session_of(options: dict[str, Any]) -> Session:
    """A `Session` by the names that its parts have outside: `device` is one, and None for a screen is the usual."""
    if options.get("language", "en") not in LANGUAGES:
        raise UsageError(
            f"there is no report in {options['language']!r}", where="language", hint=" or ".join(LANGUAGES)
        )
    names = {key: "device_name" if key == "device" else key for key in options}
    return Session(
        **{names[key]: value for key, value in options.items() if value is not None or key != "screen"}
    )


def _run_folder(run: str | os.PathLike[str]) -> Path:
    return run_path(run) if isinstance(run, str) else Path(run)


def fine_tune(
    data: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    *,
    recipe: Recipe | str | os.PathLike[str] = "finetune",
    lr_grid: Sequence[float] = (),
    lr_share: float = 0.1,
    budget: str | None = None,
    **options: Any,
) -> Run:
    """`mixlab.finetune`: go on from `weights` on other data; returns the finished run.

    weights: a run, weights folder, file of any known format, or published name; fitted to `image_size` and the
    classes. lr_grid: rates tried first, each for `lr_share` of the steps. The rest is as for `train`.
    """
    name = path_text(weights, "weights", "a run, a path or a published name")
    data = path_text(data, "data", f"{_PATH_WORDS} of a data set")
    check_type(lr_grid, (list, tuple), "lr_grid", "a list of learning rates")
    for lr in lr_grid:
        check_type(lr, (Real,), "lr_grid", "a list of numbers")
    check_type(lr_share, (Real,), "lr_share", "a share of the steps, such as 0.1")
    grid = LrGrid(lrs=tuple(lr_grid), share=lr_share) if lr_grid else None
    return train(data, recipe, budget=budget, init_from=name, lr_grid=grid, **options)

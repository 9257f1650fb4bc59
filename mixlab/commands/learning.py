"""The commands that learn, one function each; its docstring is the command's help.

torch is imported inside the commands that need it, so that help and usage errors come at once.
"""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import mixlab
from mixlab.commands.context import Context, emit, find_run
from mixlab.errors import UsageError
from mixlab.language import Language, language_of

TRAIN_OPTIONS = (
    "data", "recipe", "config", "model", "budget", "run", "resume", "start_over",
    "device", "tracker", "download", "without_pictures", "without_figures", "lang",
)  # fmt: skip
FINETUNE_OPTIONS = (
    "weights", "lr_grid", "lr_share", "recipe", "config", "budget", "run",
    "device", "tracker", "download", "without_pictures", "without_figures", "lang",
)  # fmt: skip
RECIPE_COMMANDS = {"train": TRAIN_OPTIONS, "finetune": FINETUNE_OPTIONS}  # take keys of a recipe too


def train(
    data: str | None = None,
    /,
    *,
    recipe: str = "auto",
    config: Path | None = None,
    model: str | None = None,
    budget: str | None = None,
    run: str | None = None,
    resume: str | None = None,
    moved_to: Annotated[str | None, Parameter(name="--data")] = None,
    start_over: Annotated[bool, Parameter(negative="")] = False,
    device: str | None = None,
    tracker: str | None = None,
    download: Annotated[bool, Parameter(negative="")] = False,
    without_pictures: Annotated[bool, Parameter(negative="")] = False,
    without_figures: Annotated[bool, Parameter(negative="")] = False,
    lang: Language | None = None,
    overrides: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Train a classifier; ends with its test accuracy and report.html.

    Any key of the recipe can be set too, such as --epochs 20, --seed 1, --optimizer.lr 3e-4, --image-size
    64x64 or --val-fraction 0. The common ones stand below, --help-all has all, `mixlab keys KEY` explains one.

    Parameters
    ----------
    data
        `digits`, a folder (DATA/train/CLASS/*, or DATA/CLASS/*), a CSV file (path,label[,split]), or a set
        of torchvision such as cifar10.
    recipe
        The name of a recipe or a TOML file; `auto` takes the one that suits the data.
    config
        TOML file whose keys replace the recipe's; a run's recipe.toml is one.
    model
        A name from `mixlab models`, or timm/NAME.
    budget
        Limits the whole command, such as 90s, 10m or 2h: mixlab times the machine and plans the steps.
    run
        Folder of the run, or its name under ./runs.
    resume
        Go on with this run, exactly where it stopped; takes no other setting.
    moved_to
        With --resume: where the run's data is now, if it was moved.
    start_over
        With --resume: begin the run again; what is there is kept in a folder of its own in the run.
    device
        auto, cpu, cuda or mps.
    tracker
        tensorboard or wandb, if installed.
    download
        Fetch a torchvision set that is not there yet.
    without_pictures
        Leave images of the data set out of the report.
    without_figures
        Draw no figures for the report, which saves some seconds.
    lang
        The language of the report, en or ko; by default the locale's.
    """
    overrides = dict(overrides or {})
    if resume is not None:
        given = [data, config, model, budget, run, *overrides, *([recipe] if recipe != "auto" else [])]
        if any(given) or download:
            raise UsageError(
                "--resume goes on with the run as it is and takes no other setting", where="--resume"
            )
        from mixlab import recipes

        result = recipes.resume(
            find_run(resume),
            data=moved_to,
            start_over="always" if start_over else "never",
            **_session(device, tracker, without_pictures, without_figures, lang),
        )
        emit(result.result)
        return
    if start_over:
        raise UsageError(
            "--start-over begins a run again", where="--start-over", hint="name it: --resume RUN"
        )
    if model is not None:
        overrides["model.name"] = model
    if data is not None and moved_to is not None:
        raise UsageError("DATA and --data are both given", where=moved_to, hint="leave one of them out")
    session = _session(device, tracker, without_pictures, without_figures, lang)
    _train_new(data or moved_to, overrides, TRAIN_OPTIONS, recipe, config, budget, run, download, **session)


def finetune(
    data: str | None = None,
    /,
    *,
    weights: str,
    lr_grid: str | None = None,
    lr_share: float = 0.1,
    recipe: str = "finetune",
    config: Path | None = None,
    budget: str | None = None,
    run: str | None = None,
    device: str | None = None,
    tracker: str | None = None,
    download: Annotated[bool, Parameter(negative="")] = False,
    without_pictures: Annotated[bool, Parameter(negative="")] = False,
    without_figures: Annotated[bool, Parameter(negative="")] = False,
    lang: Language | None = None,
    overrides: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Train weights further on other data and at another image size: `train`, starting from WEIGHTS.

    Any key of the recipe can be set as for `train`, such as --image-size 448 or --epochs 20. The common ones stand
    below, --help-all has all. `mixlab train --resume RUN` goes on with a run that was stopped.

    Parameters
    ----------
    data
        As for `train`.
    weights
        A run, a weights file of any known format, or a published name (`mixlab models --pretrained`).
    lr_grid
        Learning rates with commas, such as 0.003,0.01,0.03: each is tried, and the best on validation is taken.
    lr_share
        Share of the steps that each of them is tried for; the paper's protocol is 1.
    recipe
        The name of another recipe or a TOML file.
    config
        TOML file whose keys replace the recipe's.
    budget
        Limits the whole command, trials included.
    run
        Folder of the run, or its name under ./runs.
    device
        auto, cpu, cuda or mps.
    tracker
        tensorboard or wandb, if installed.
    download
        Fetch a torchvision set that is not there yet.
    without_pictures
        Leave images of the data set out of the report.
    without_figures
        Draw no figures for the report, which saves some seconds.
    lang
        The language of the report, en or ko; by default the locale's.
    """
    overrides = dict(overrides or {})
    lr_names = ("lr", "optimizer.lr", "learning_rate") if lr_grid is not None else ()
    for key, option in (("init_from", "--weights"), *((name, "--lr-grid") for name in lr_names)):
        if key in overrides:
            raise UsageError(f"{option} sets {key}", where=f"--{key}", hint="leave one of the two out")
    options = _session(device, tracker, without_pictures, without_figures, lang)
    if lr_grid is not None:
        from mixlab.planning.lr_grid import parse_lr_grid

        options["lr_grid"] = parse_lr_grid(lr_grid, lr_share)
    overrides["init_from"] = weights
    _train_new(data, overrides, FINETUNE_OPTIONS, recipe, config, budget, run, download, **options)


def _session(
    device: str | None,
    tracker: str | None,
    without_pictures: bool,
    without_figures: bool,
    lang: Language | None,
) -> dict[str, Any]:
    """The arguments of `recipes.train` and `resume` that say how this process runs."""
    return {
        "language": lang or language_of(),
        "device": device or "auto",
        "tracker": tracker,
        "with_pictures": not without_pictures,
        "figures": not without_figures,
        "screen": Context.screen(),
    }


def _train_new(
    data: str | None,
    overrides: dict[str, Any],
    also: tuple[str, ...],
    recipe: str,
    config: Path | None,
    budget: str | None,
    run: str | None,
    download: bool,
    **options: Any,
) -> None:
    """Compose the recipe, train into a new run, print the result. also: the command's own options."""
    from mixlab import recipes
    from mixlab.training.keys import full_key

    for key in overrides:  # before the data is opened, which may take long
        full_key(key, also=also)
    chosen = recipes.compose(
        data,
        recipe=recipe,
        config=config,
        overrides=overrides,
        has_budget=budget is not None,
        download=download,
    )
    folder = None if run is None else find_run(run)
    options |= {"budget": budget, "run": folder, "download": download, "started": mixlab.STARTED}
    emit(recipes.train(recipe=chosen, **options).result)


def runs(folder: Path = Path("runs"), /) -> None:
    """List the runs in a folder, best first: by validation accuracy, or test accuracy where nothing was held out.

    Parameters
    ----------
    folder
        Where the runs are.
    """
    from mixlab.report.tables import show_runs
    from mixlab.training.run_folder import list_runs

    rows = list_runs(folder)
    screen = Context.screen()
    if rows:
        show_runs(rows, screen)
    else:
        screen.say(f"there are no runs in {folder}")
    emit({"runs": rows})


def report(run: str, /, *, lang: Language | None = None) -> None:
    """Draw the report of a finished run again, of what its folder holds; the data set is not needed.

    Parameters
    ----------
    run
        A run by name or path.
    lang
        The language of the report, en or ko; by default the locale's.
    """
    from mixlab.training.reporting import draw_report

    folder, screen = find_run(run), Context.screen()
    if not folder.is_dir():
        raise UsageError("there is no such run", where=str(folder), hint="`mixlab runs` lists them")
    result = draw_report(folder, lang or language_of(), screen)
    screen.say(f"report: {result['report']}")
    emit(result)


def recipes(recipe: str | None = None, /) -> None:
    """List the recipes, with what each is for and what it gave; or print one as TOML, for `train --config`.

    Parameters
    ----------
    recipe
        Print this one whole.
    """
    from dataclasses import asdict

    from mixlab.recipes import RECIPES, describe_recipe, find_recipe, list_recipes
    from mixlab.report.tables import show_recipes
    from mixlab.training.keys import to_toml

    screen = Context.screen()
    if recipe is None:
        rows = list_recipes()
        show_recipes(rows, screen)
        emit({"recipes": rows})
        return
    found = find_recipe(recipe)
    if recipe in RECIPES:  # as comments, so that what is printed is a file for --config
        screen.say(f"# {RECIPES[recipe].purpose}")
        screen.say(f"# {RECIPES[recipe].result}")
    screen.say_lines(to_toml(found, with_comments=True).rstrip())
    emit((describe_recipe(recipe) if recipe in RECIPES else {"name": found.name}) | {"recipe": asdict(found)})

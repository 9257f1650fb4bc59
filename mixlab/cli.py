"""The command `mixlab`. Thin: each command parses, calls one function, and shows what came back.

torch is imported inside the commands that need it, so that help and usage errors come at once.
"""

import json as jsonlib
import sys
import traceback as tracebacklib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

import mixlab
from mixlab.errors import MixlabError, UsageError

if TYPE_CHECKING:
    from mixlab.report.screen import Screen

app = App(
    name="mixlab",
    help="The all-MLP vision system: train, evaluate and use MLP-Mixer image classifiers.",
    version=mixlab.__version__,
    version_flags=["--version"],
    # --json and --traceback are understood after every command; `main` takes them out first.
    help_epilogue="Every command takes --json (one JSON object on standard output) and --traceback.",
)


class Context:
    """How the command that runs now shows its result."""

    json = False

    @classmethod
    def screen(cls) -> "Screen":
        from mixlab.report.screen import Screen

        return Screen(to_stderr=cls.json)


def _emit(value: dict[str, Any]) -> None:
    if Context.json:
        print(jsonlib.dumps(value, allow_nan=False))


def _run_path(name: str) -> Path:
    from mixlab.training.run_folder import run_path

    return run_path(name)


@app.command
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
    device: str | None = None,
    tracker: str | None = None,
    download: Annotated[bool, Parameter(negative="")] = False,
    without_pictures: Annotated[bool, Parameter(negative="")] = False,
    overrides: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Train a classifier; ends with its test accuracy and report.html.

    Any key of the recipe can be set too, such as --epochs 20, --seed 1, --optimizer.lr 3e-4, --image-size
    64x64 or --val-fraction 0; all keys stand below.

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
        Total time from start to exit, such as 90s, 10m or 2h; sets the number of steps.
    run
        Folder of the run, or its name under ./runs.
    resume
        Go on with this run, exactly where it stopped; takes no other setting.
    device
        auto, cpu, cuda or mps.
    tracker
        tensorboard or wandb, if installed.
    download
        Fetch a torchvision set that is not there yet.
    without_pictures
        Leave images of the data set out of the report.
    """
    overrides = dict(overrides or {})
    if resume is not None:
        given = [data, config, model, budget, run, *overrides, *([recipe] if recipe != "auto" else [])]
        if any(given) or download:
            raise UsageError("--resume goes on with the run as it is and takes no other setting", where="--resume")
        from mixlab.training.loop import resume as resume_training

        _emit(
            resume_training(
                _run_path(resume),
                device=device or "auto",
                with_pictures=not without_pictures,
                tracker=tracker,
                screen=Context.screen(),
            )
        )
        return
    from mixlab import recipes
    from mixlab.training.recipe import from_toml

    from_file = from_toml(config) if config is not None else {}
    data = data or from_file.get("data.source")
    if data is None:
        raise UsageError("there is nothing to train on", where="DATA", hint="name a data set: `mixlab train digits`")
    if config is not None and recipe == "auto" and "name" in from_file and "optimizer.lr" in from_file:
        chosen: Any = recipes.Recipe()  # a whole recipe: nothing of another one shines through
    elif recipe == "auto":
        chosen = recipes.recipe_for(data, data_dir=overrides.get("data_dir"), download=download)
    else:
        chosen = recipes.find_recipe(recipe)
    if from_file:
        chosen = recipes.override(chosen, from_file, where=str(config))
    if "steps" in overrides:
        overrides.setdefault("epochs", None)
    elif "epochs" in overrides or budget is not None:
        overrides.setdefault("steps", None)
    if budget is not None and "epochs" not in overrides:
        overrides["epochs"] = None
    if model is not None:
        overrides["model.name"] = model
    result = recipes.train(
        recipes.override(chosen, overrides),
        data,
        budget=budget,
        run=None if run is None else _run_path(run),
        started=mixlab.STARTED,
        device=device or "auto",
        download=download,
        with_pictures=not without_pictures,
        tracker=tracker,
        screen=Context.screen(),
    )
    _emit(result)


@app.command
def evaluate(
    run: str,
    data: str | None = None,
    /,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> int:
    """Measure a run's weights on its own test split, or on other labelled data.

    Parameters
    ----------
    run
        A run or weights folder, or a name under ./runs.
    data
        As for `train`; by default the run's own data.
    split
        train, val or test; by default test, or all of a folder that has no splits.
    data_dir
        Where torchvision's sets lie; ./data by default.
    """
    from rich.table import Table

    from mixlab.training.evaluate import evaluate as run_evaluation

    screen = Context.screen()
    result, bad = run_evaluation(
        _run_path(run), data, split=split, data_dir=data_dir, device=device, threads=threads, screen=screen
    )
    screen.say(f"accuracy {100 * result.top1:.2f} % ({result.num_correct} of {result.num_images})")
    if result.balanced_accuracy is not None:
        screen.say(f"balanced accuracy {100 * result.balanced_accuracy:.2f} %")
    screen.say(f"top-5 {100 * result.top5:.2f} %, loss {result.loss:.4f}, ECE {result.ece:.4f}")
    table = Table("class", "images", "correct", "precision", "recall", "F1")
    for row in result.per_class():
        ratios = ["-" if row[key] is None else f"{100 * row[key]:.1f} %" for key in ("precision", "recall", "f1")]
        table.add_row(row["label"], str(row["num_images"]), str(row["num_correct"]), *ratios)
    screen.show(table)
    for file in bad:
        screen.say(f"not counted, unreadable: {file.path}: {file.reason}")
    _emit(result.to_json() | {"num_bad": len(bad), "bad": [vars(file) for file in bad]})
    return 1 if bad else 0


@app.command
def predict(
    run: str,
    /,
    *images: str,
    top: int = 5,
    csv: Path | None = None,
    device: str = "auto",
) -> int:
    """Say what is in pictures: files, whole folders or quoted globs.

    Parameters
    ----------
    run
        A run or weights folder, or a name under ./runs.
    images
        Image files, folders, or globs.
    top
        How many labels for each image.
    csv
        Write path, rank, label, probability, error to this file too.
    """
    from mixlab.serving.predict import find_images, load, table_of, write_csv

    if not images:
        raise UsageError("there is no image to look at", where="IMAGE", hint="name files, a folder or a glob")
    screen = Context.screen()
    paths = find_images(images)
    rows = load(_run_path(run), device=device).predict(paths, top=top)
    screen.show(table_of(rows))
    num_bad = sum("error" in row for row in rows)
    if csv is not None:
        write_csv(rows, csv)
        screen.say(f"written to {csv}")
    if num_bad:
        screen.say(f"{num_bad} of {len(rows)} images could not be read")
    _emit({"images": rows, "num_ok": len(rows) - num_bad, "num_bad": num_bad})
    return 1 if num_bad else 0


@app.command
def info(
    model: str,
    /,
    *,
    image_size: str | None = None,
    num_classes: int = 1000,
    batch_size: int = 1,
    patch_size: int | None = None,
) -> None:
    """Parameters, multiply-accumulates and memory of a model, by name or from a run.

    Parameters
    ----------
    model
        A name from `mixlab models`, timm/NAME, or a run.
    image_size
        Side, or HxW, in pixels; by default the model's own.
    """
    from rich.table import Table

    from mixlab.checkpoint.store import load_weights
    from mixlab.models.describe import describe_settings
    from mixlab.training.recipe import parse_image_size

    path = _run_path(model)
    if (path / "config.json").is_file():
        settings = load_weights(path).model_settings
    else:
        settings = {"name": model, "num_classes": num_classes}
        if image_size is not None:
            settings["image_size"] = parse_image_size(image_size)
        if patch_size is not None:
            settings["patch_size"] = patch_size
    facts = describe_settings(settings, batch_size=batch_size)
    table = Table("fact", "value", show_header=False)
    for key, value in facts.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    Context.screen().show(table)
    _emit(facts)


@app.command
def models(*, timm: str | None = None) -> None:
    """List the models that can be trained by name.

    Parameters
    ----------
    timm
        Also list timm's models that match this pattern, such as '*mixer*'; they are used as timm/NAME.
    """
    from rich.table import Table

    from mixlab.models.describe import list_models

    rows = list_models(timm)
    table = Table("model", "name", "image side", "parameters (1000 classes)", "GMACs", "for")
    for row in rows:
        numbers = ["" if row[key] is None else f"{row[key]:,}" for key in ("image_side", "num_parameters")]
        macs = "" if row["macs"] is None else f"{row['macs'] / 1e9:.2f}"
        table.add_row(row["model"], row["display_name"], *numbers, macs, row["purpose"])
    Context.screen().show(table)
    _emit({"models": rows})


@app.command
def check(data: str, /, *, data_dir: str | None = None) -> int:
    """Look through a data set: counts, sizes, unreadable files, the same picture in two splits.

    Parameters
    ----------
    data
        As for `train`.
    data_dir
        Where torchvision's sets lie; ./data by default.
    """
    from mixlab.data.check import check as check_source
    from mixlab.data.check import show
    from mixlab.data.sources import open_source

    screen = Context.screen()
    source = open_source(data, data_dir=data_dir)
    with screen.progress("checking", sum(len(split) for split in source.splits.values())) as bar:
        result = check_source(source, progress=lambda done, total: bar.update(done))
    show(result, screen)
    _emit(result.to_json())
    return 1 if result.num_bad else 0


@app.command
def runs(folder: Path = Path("runs"), /) -> None:
    """List the runs in a folder, best first.

    Parameters
    ----------
    folder
        Where the runs are.
    """
    from rich.table import Table

    from mixlab.report.screen import format_seconds
    from mixlab.training.run_folder import list_runs

    rows = list_runs(folder)
    screen = Context.screen()
    table = Table("run", "test", "validation", "steps", "time", "finished")
    for row in rows:
        ratios = ["-" if row[k] is None else f"{100 * row[k]:.2f} %" for k in ("test_top1", "validation_top1")]
        time_spent = format_seconds(row["seconds"])
        table.add_row(row["run"], *ratios, str(row["steps"]), time_spent, "yes" if row["finished"] else "no")
    screen.show(table) if rows else screen.say(f"there are no runs in {folder}")
    _emit({"runs": rows})


@app.command
def doctor() -> None:
    """Versions, processor, device and decoder: what this installation has to work with."""
    from importlib.util import find_spec

    from rich.table import Table

    from mixlab.device import describe_machine, pick_device

    facts = describe_machine()
    facts["device"] = str(pick_device())
    facts["jpeg_decoder"] = "simplejpeg" if find_spec("simplejpeg") else "Pillow (install simplejpeg for speed)"
    table = Table("what", "value", show_header=False)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number or 'missing'}" for name, number in value.items())
        table.add_row(key, str(value))
    Context.screen().show(table)
    _emit(facts)


def split_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """`--optimizer.lr 3e-4 --compile` -> {"optimizer.lr": "3e-4", "compile": "true"}; UsageError for the rest."""
    values: dict[str, Any] = {}
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if not token.startswith("--") or len(token) < 3:
            raise UsageError(f"{token!r} is one argument too many", where=token, hint="`mixlab train --help`")
        key, equals, value = token[2:].partition("=")
        if not equals:
            value = "true"
            if position < len(tokens) and not tokens[position].startswith("--"):
                value = tokens[position]
                position += 1
        values[key.replace("-", "_")] = value
    return values


def _train_help() -> str:
    from mixlab.training.recipe import recipe_fields, type_name

    lines = [f"  --{key.replace('_', '-')} {type_name(hint)}" for key, hint in recipe_fields().items()]
    return "Keys of a recipe (a key may go without its part before the dot where that is clear):\n" + "\n".join(lines)


def run_command(tokens: list[str]) -> int:
    """Parse and run one command; its exit status. Errors are raised."""
    name = tokens[0] if tokens else ""
    if name == "train" and any(token in ("--help", "-h") for token in tokens):
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        print(_train_help())
        return 0
    options: dict[str, Any] = {"exit_on_error": False, "print_error": False}
    if name == "train":
        command, bound, unknown, _ = app.parse_known_args(tokens)
        status = command(*bound.args, **bound.kwargs, overrides=split_overrides(unknown))
    else:
        status = app(tokens, **options, result_action="return_value")
    return status if isinstance(status, int) else 0


def _fail(error: MixlabError) -> int:
    if Context.json:
        values = {"kind": error.kind, "message": error.message, "where": error.where, "hint": error.hint}
        print(jsonlib.dumps({"error": values}))
    where = f"\n  where: {error.where}" if error.where else ""
    hint = f"\n  hint: {error.hint}" if error.hint else ""
    print(f"mixlab: {error.message}{where}{hint}", file=sys.stderr)
    return error.exit_status


def _guarded(action: Callable[[], int]) -> int:
    try:
        return action()
    except CycloptsError as error:
        return _fail(UsageError(" ".join(str(error).split()), hint="`mixlab --help` lists the commands"))
    except MixlabError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("mixlab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`mixlab ... | head`); there is nobody left to tell.
        sys.stderr.close()
        return 1
    except Exception as error:  # the last line of defence: no traceback reaches a person who did not ask
        failure = MixlabError(
            f"unexpected {type(error).__name__}: {error}",
            hint="this is a fault of mixlab; --traceback shows where",
        )
        failure.kind = "internal"
        return _fail(failure)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command in `arguments` (default sys.argv) and exit with its status."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    Context.json = "--json" in tokens
    with_traceback = "--traceback" in tokens
    tokens = [token for token in tokens if token not in ("--json", "--traceback")]
    if with_traceback:
        try:
            sys.exit(run_command(tokens))
        except (MixlabError, CycloptsError) as error:
            tracebacklib.print_exc()
            sys.exit(getattr(error, "exit_status", 2))
    sys.exit(_guarded(lambda: run_command(tokens)))

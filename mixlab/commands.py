"""The commands, one function each; its docstring is the command's help.

torch is imported inside the commands that need it, so that help and usage errors come at once.
"""

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

import mixlab
from mixlab.errors import UsageError

if TYPE_CHECKING:
    from mixlab.report.screen import Screen


class Context:
    """How the command that runs now shows its result."""

    json = False
    on_error: Callable[[], Any] = staticmethod(lambda: None)  # prints the traceback if that was asked for

    @classmethod
    def screen(cls) -> "Screen":
        from mixlab.report.screen import Screen

        return Screen(to_stderr=cls.json)


TRAIN_OPTIONS = (
    "recipe", "config", "model", "budget", "run", "resume",
    "device", "tracker", "download", "without_pictures",
)  # fmt: skip


def _emit(value: dict[str, Any]) -> None:
    if Context.json:
        print(jsonlib.dumps(value, allow_nan=False))


def _run_path(name: str) -> Path:
    from mixlab.training.run_folder import run_path

    return run_path(name)


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
            raise UsageError(
                "--resume goes on with the run as it is and takes no other setting", where="--resume"
            )
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
    from mixlab.training.recipe import full_key

    for key in overrides:  # before the data is opened, which may take long
        full_key(key, also=TRAIN_OPTIONS)
    if model is not None:
        overrides["model.name"] = model
    chosen = recipes.compose(
        data,
        recipe=recipe,
        config=config,
        overrides=overrides,
        has_budget=budget is not None,
        download=download,
    )
    result = recipes.train(
        chosen,
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
    from mixlab.report.tables import show_evaluation
    from mixlab.training.evaluate import evaluate as run_evaluation

    screen = Context.screen()
    evaluation, bad = run_evaluation(
        _run_path(run), data, split=split, data_dir=data_dir, device=device, threads=threads, screen=screen
    )
    result = evaluation.to_json() | {"num_bad": len(bad), "bad": [vars(file) for file in bad]}
    show_evaluation(result, screen)
    _emit(result)
    return 1 if bad else 0


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
    from mixlab.report.tables import show_predictions
    from mixlab.serving.predict import find_images, load, write_csv

    if not images:
        raise UsageError("there is no image to look at", where="IMAGE", hint="name files, a folder or a glob")
    screen = Context.screen()
    classifier = load(_run_path(run), device=device)
    rows = classifier.predict(find_images(images), top=top)
    num_bad = sum("error" in row for row in rows)
    result = {"images": rows, "num_ok": len(rows) - num_bad, "num_bad": num_bad}
    if csv is not None:
        write_csv(rows, csv)
    show_predictions(result, screen)
    if csv is not None:
        screen.say(f"written to {csv}")
    _emit(result)
    return 1 if num_bad else 0


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
    from mixlab.checkpoint.store import load_weights
    from mixlab.models.describe import describe_settings
    from mixlab.report.tables import show_facts
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
    show_facts(facts, Context.screen())
    _emit(facts)


def models(*, timm: str | None = None) -> None:
    """List the models that can be trained by name.

    Parameters
    ----------
    timm
        Also list timm's models that match this pattern, such as '*mixer*'; they are used as timm/NAME.
    """
    from mixlab.models.describe import list_models
    from mixlab.report.tables import show_models

    rows = list_models(timm)
    show_models(rows, Context.screen())
    _emit({"models": rows})


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
    from mixlab.data.sources import open_source
    from mixlab.report.tables import show_check

    screen = Context.screen()
    source = open_source(data, data_dir=data_dir)
    with screen.progress("checking", sum(len(split) for split in source.splits.values())) as bar:
        result = check_source(source, progress=lambda done, total: bar.update(done))
    show_check(result.to_json(), screen)
    _emit(result.to_json())
    return 1 if result.num_bad else 0


def runs(folder: Path = Path("runs"), /) -> None:
    """List the runs in a folder, best first.

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
    _emit({"runs": rows})


def doctor() -> None:
    """Versions, processor, device and decoder: what this installation has to work with."""
    from importlib.util import find_spec

    from mixlab.device import describe_machine, pick_device
    from mixlab.report.tables import show_facts

    facts = describe_machine()
    facts["device"] = str(pick_device())
    facts["jpeg_decoder"] = (
        "simplejpeg" if find_spec("simplejpeg") else "Pillow (install simplejpeg for speed)"
    )
    show_facts(facts, Context.screen())
    _emit(facts)

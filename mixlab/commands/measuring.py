"""The commands that measure, one function each; its docstring is the command's help.

torch is imported inside the commands that need it, so that help and usage errors come at once.
"""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mixlab.commands.context import Context, emit, find_weights, parse_size
from mixlab.errors import UsageError


def evaluate(
    run: str,
    data: str | None = None,
    /,
    *,
    moved_to: Annotated[str | None, Parameter(name="--data")] = None,
    split: str | None = None,
    image_size: str | None = None,
    fit: Literal["resize-crop", "resmall-crop", "stretch"] | None = None,
    labels: str | None = None,
    raw_probabilities: Annotated[bool, Parameter(negative="")] = False,
    data_dir: str | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> int:
    """Measure a run's weights on its own test split, or on other labelled data.

    Exit status: 0 if every image could be read, 1 if some could not; they are not counted.

    Parameters
    ----------
    run
        A run by name or path, a weights file of any known format, or a published name (`mixlab models --pretrained`).
    data
        As for `train`; by default the run's own data, of which its own splits are taken wherever it is now.
    moved_to
        Where the run's own data is now, if it was moved.
    split
        train, val or test; by default test, or all of a folder that has no splits.
    image_size
        Side, or HxW, in pixels: resample the Mixer to it first.
    fit
        Bring images to the model's size in this way instead of the weights' own: resize-crop (for 224 pixels
        scaled to 256x256, then the centre), resmall-crop (the shorter side to 256, then the centre), stretch.
    labels
        For ImageNet's validation images: measure with ReaL's labels too, from this file, or `real` for timm's copy.
    raw_probabilities
        Without the temperature that was fitted on validation.
    data_dir
        Where torchvision's sets lie; ./data by default.
    """
    from mixlab.report.tables import show_evaluation
    from mixlab.training.evaluate import evaluate as run_evaluation

    screen = Context.screen()
    if data is not None and moved_to is not None:
        raise UsageError("DATA and --data are both given", where=moved_to, hint="leave one of them out")
    evaluation, bad = run_evaluation(
        find_weights(run),
        data,
        moved_to=moved_to,
        split=split,
        image_size=parse_size(image_size),
        fit=fit,
        labels=labels,
        calibrated=not raw_probabilities,
        data_dir=data_dir,
        device=device,
        threads=threads,
        screen=screen,
    )
    result = evaluation.to_json() | {"fit": fit, "num_bad": len(bad), "bad": [vars(file) for file in bad]}
    show_evaluation(result, screen)
    emit(result)
    return 1 if bad else 0


def fewshot(
    run: str,
    data: str | None = None,
    /,
    *,
    shots: str = "1,5,10,25",
    seeds: int = 3,
    l2: float = 1024.0,
    image_size: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
) -> None:
    """Accuracy of a linear probe on frozen features, from a few labelled images of each class.

    The authors' protocol: features before the head, whitened; ridge regression in closed form; several seeds.

    Parameters
    ----------
    run
        A run, a weights file of any known format, or a published name.
    data
        As for `train`; images are taken from its train split and measured on its test split. By default
        the run's own data.
    shots
        How many images of each class: numbers with commas, such as 1,5,10.
    seeds
        How many times the images are drawn.
    l2
        Strength of the ridge penalty.
    image_size
        Side, or HxW, in pixels: resample the Mixer to it first.
    """
    from mixlab.report.tables import show_few_shot
    from mixlab.training.few_shot import few_shot

    try:
        numbers = tuple(int(part) for part in shots.split(","))
    except ValueError:
        raise UsageError(f"{shots!r} is no list of numbers", where="--shots", hint="such as 1,5,10") from None
    screen = Context.screen()
    result = few_shot(
        find_weights(run),
        data,
        shots=numbers,
        num_seeds=seeds,
        l2=l2,
        image_size=parse_size(image_size),
        data_dir=data_dir,
        device=device,
        screen=screen,
    )
    show_few_shot(result, screen)
    emit(result)


def bench(
    *models: str,
    against: str = "timm",
    train: bool = False,
    scale: Annotated[bool, Parameter(negative="")] = False,
    batch_size: str = "16",
    image_size: str | None = None,
    gelu: Literal["tanh", "erf"] | None = None,
    rounds: int = 7,
    threads: int | None = None,
    official_code: Path | None = None,
    figure: Path | None = None,
) -> int:
    """Measure how fast models are on this machine, beside others that compute the same logits.

    Every backend runs in a warm process of its own; they take turns, and the ratio is the median over the rounds.
    Exit status: 0 if all of them ran, 1 if one failed.

    Parameters
    ----------
    models
        Names from `mixlab models`; mixer_s16 by default.
    against
        With commas: eager (the plain model), timm, timm-compile, onnxruntime, onnxruntime-int8 (8-bit products, other
        logits), openvino, jax; `none` for none.
    train
        Measure a training step (forward, backward, AdamW) instead of inference.
    scale
        Instead measure time and memory against the number of patches and the width, for Mixer, ViT and ResNet.
    batch_size
        Images at a time; `auto` finds the fastest.
    image_size
        Side, or HxW, in pixels; the model's own by default.
    gelu
        Of all sides; by default the model's own.
    rounds
        Turns of every backend.
    threads
        CPU threads; one a core by default.
    official_code
        A checkout of the authors' code, for jax.
    figure
        Draw the speeds, or the curves of --scale, into this PNG file.
    """
    from mixlab.bench.bench import bench as run_bench
    from mixlab.device import check_threads, describe_machine, num_cores
    from mixlab.models.catalog import MODELS
    from mixlab.report.figures import save_figure
    from mixlab.report.speed_figures import speeds
    from mixlab.report.speed_tables import show_bench

    size = 0 if batch_size == "auto" else int(batch_size) if batch_size.isdecimal() else -1
    if size < 0 or batch_size == "0":
        raise UsageError(f"{batch_size} is no number of images", where="--batch-size", hint="1, 16 or auto")
    if rounds < 1:
        raise UsageError(f"{rounds} is too few", where="--rounds")
    check_threads(threads)
    screen = Context.screen()
    if scale:
        if models:
            raise UsageError("--scale has models of its own", where=models[0], hint="leave the names out")
        return _scale(threads or num_cores(), train, figure)
    rows = []
    for name in models or ("mixer_s16",):
        if name.startswith("mixer_sound") and image_size is None:
            raise UsageError(
                "this model is for sounds, and bench measures images",
                where=name,
                hint="--image-size 1x96 gives it as many tokens as a second of sound has",
            )
        side = MODELS[name][0] if name in MODELS else 224
        rows += run_bench(
            name,
            () if against == "none" else tuple(against.split(",")),
            image_size=parse_size(image_size) or (side, side),
            batch_size=size,
            threads=threads or num_cores(),
            train=train,
            rounds=rounds,
            options={} if gelu is None else {"gelu": gelu},
            official_code=official_code,
            say=screen.say,
        )
    if figure is not None:
        save_figure(speeds(rows), figure)
    show_bench(rows, screen)
    emit({"machine": describe_machine(), "rows": rows})
    return 1 if any("error" in row for row in rows) else 0


def _scale(threads: int, train: bool, figure: Path | None) -> int:
    from mixlab.bench.scale import growth
    from mixlab.bench.scale import scale as run_scale
    from mixlab.device import describe_machine
    from mixlab.report.figures import save_figure
    from mixlab.report.speed_figures import growth_curves
    from mixlab.report.speed_tables import show_growth

    screen = Context.screen()
    rows = run_scale(threads=threads, train=train, say=screen.say)
    powers = growth(rows)
    if figure is not None:
        save_figure(growth_curves(rows), figure)
    show_growth(rows, powers, screen)
    emit({"machine": describe_machine(), "rows": rows, "growth": powers})
    return 0

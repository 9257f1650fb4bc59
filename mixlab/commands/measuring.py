"""The command that measures speed; torch is imported inside it, so that help and usage errors come at once."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mixlab.commands.context import Context, emit, parse_size
from mixlab.errors import UsageError


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

    Parameters
    ----------
    models
        Names from `mixlab models`; mixer_s16 by default.
    against
        With commas: eager (the plain model), timm, timm-compile, onnxruntime, openvino, jax; `none` for none.
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
    from mixlab.device import describe_machine, num_cores
    from mixlab.models.catalog import MODELS
    from mixlab.report.figures import save_figure
    from mixlab.report.speed_figures import speeds
    from mixlab.report.tables import show_bench
    from mixlab.serving.bench import bench as run_bench

    size = 0 if batch_size == "auto" else int(batch_size) if batch_size.isdecimal() else -1
    if size < 0 or batch_size == "0":
        raise UsageError(f"{batch_size} is no number of images", where="--batch-size", hint="1, 16 or auto")
    if rounds < 1:
        raise UsageError(f"{rounds} is too few", where="--rounds")
    screen = Context.screen()
    if scale:
        if models:
            raise UsageError("--scale has models of its own", where=models[0], hint="leave the names out")
        return _scale(threads or num_cores(), train, figure)
    rows = []
    for name in models or ("mixer_s16",):
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
    from mixlab.device import describe_machine
    from mixlab.report.figures import save_figure
    from mixlab.report.speed_figures import growth_curves
    from mixlab.report.tables import show_growth
    from mixlab.serving.scale import growth
    from mixlab.serving.scale import scale as run_scale

    screen = Context.screen()
    rows = run_scale(threads=threads, train=train, say=screen.say)
    powers = growth(rows)
    if figure is not None:
        save_figure(growth_curves(rows), figure)
    show_growth(rows, powers, screen)
    emit({"machine": describe_machine(), "rows": rows, "growth": powers})
    return 0

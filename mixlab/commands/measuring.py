"""The command that measures speed; torch is imported inside it, so that help and usage errors come at once."""

from mixlab.commands.context import Context, emit, parse_size
from mixlab.errors import UsageError


def bench(
    *models: str,
    against: str = "timm",
    train: bool = False,
    batch_size: int = 16,
    image_size: str | None = None,
    rounds: int = 7,
    threads: int | None = None,
) -> int:
    """Measure how fast models are on this machine, beside others that compute the same logits.

    Every backend runs in a warm process of its own; they take turns, and the ratio is the median over the rounds.

    Parameters
    ----------
    models
        Names from `mixlab models`; mixer_s16 by default.
    against
        With commas: eager (the plain model), timm, timm-compile, onnxruntime, openvino; `none` for none.
    train
        Measure a training step (forward, backward, AdamW) instead of inference.
    batch_size
        Images at a time; 1 for latency.
    image_size
        Side, or HxW, in pixels; the model's own by default.
    rounds
        Turns of every backend.
    threads
        CPU threads; one a core by default.
    """
    from mixlab.device import describe_machine, num_cores
    from mixlab.models.catalog import MODELS
    from mixlab.report.tables import show_bench
    from mixlab.serving.bench import bench as run_bench

    names = models or ("mixer_s16",)
    for key, value in (("--batch-size", batch_size), ("--rounds", rounds)):
        if value < 1:
            raise UsageError(f"{value} is too few", where=key)
    screen = Context.screen()
    rows = []
    for name in names:
        side = MODELS[name][0] if name in MODELS else 224
        rows += run_bench(
            (name,),
            () if against == "none" else tuple(against.split(",")),
            image_size=parse_size(image_size) or (side, side),
            batch_size=batch_size,
            threads=threads or num_cores(),
            train=train,
            rounds=rounds,
            say=screen.say,
        )
    show_bench(rows, screen)
    emit({"machine": describe_machine(), "rows": rows})
    return 1 if any("error" in row for row in rows) else 0

"""What the commands share: how a result is shown, and how a person's words become runs and weights."""

import json as jsonlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixlab.checkpoint.store import Weights
    from mixlab.report.screen import Screen


class Context:
    """How the command that runs now shows its result."""

    json = False
    quiet = False  # nothing is said but errors and notes of caution
    on_error: Callable[[], Any] = staticmethod(lambda: None)  # prints the traceback with --traceback

    @classmethod
    def screen(cls, *, to_stderr: bool = False) -> "Screen":
        from mixlab.report.screen import Screen

        return Screen(to_stderr=cls.json or to_stderr, quiet=cls.quiet and not to_stderr)


def emit(value: dict[str, Any]) -> None:
    from mixlab.report.screen import speaks

    if Context.json and speaks():
        print(jsonlib.dumps(value, allow_nan=False), flush=True)  # a server's reader waits for it


def find_run(name: str) -> Path:
    from mixlab.checkpoint.store import run_path

    return run_path(name)


def find_weights(name: str) -> str | Path:
    """A run by its name under ./runs, else what the person wrote: a path or a published name."""
    from mixlab.checkpoint.open import existing_path

    return existing_path(name) or name


def existing_run(name: str) -> Path | None:
    """The folder of the run of that name or path; None for other weights."""
    from mixlab.checkpoint.open import existing_path

    path = existing_path(name)
    return path if path is not None and (path / "metrics.jsonl").is_file() else None


def open_named(name: str, **options: Any) -> "Weights":
    from mixlab.checkpoint.open import open_weights

    with Context.screen().progress_if_any("downloading") as progress:
        weights = open_weights(find_weights(name), progress=progress, **options)
    say_cautions(weights.cautions)
    return weights


def say_cautions(cautions: Iterable[str]) -> None:
    """What a person should read before weights are trusted; on standard error, so that it is in no card or file."""
    for caution in cautions:
        Context.screen(to_stderr=True).say(f"note: {caution}")


def parse_size(text: str | None) -> tuple[int, int] | None:
    from mixlab.training.keys import parse_image_size

    return None if text is None else parse_image_size(text)


def plain_name(run: str) -> str:
    """What a file made of a run or of published weights is called, without its ending."""
    return Path(run).name.replace(":", "-").removesuffix(".npz").removesuffix(".safetensors")

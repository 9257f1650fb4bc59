"""The command `mixlab`: which commands there are, and how an error becomes text and an exit status."""

import atexit
import contextlib
import json as jsonlib
import os
import sys
import traceback as tracebacklib
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Group
from cyclopts.completion.detect import ShellDetectionError

import mixlab
from mixlab.commands.context import Context, emit
from mixlab.commands.keys import with_keys
from mixlab.commands.learning import RECIPE_COMMANDS
from mixlab.commands.streams import open_streams
from mixlab.errors import DiskError, MixlabError, UsageError, is_out_of_memory
from mixlab.escape import visible
from mixlab.settings import Level

OPTIONS: dict[str, Any] = {"exit_on_error": False, "print_error": False}

# In the order in which `mixlab --help` lists them, with the module of mixlab.commands that has each.
COMMANDS = {
    "Start": {
        "train": "learning", "finetune": "learning", "check": "using", "runs": "learning", "report": "learning",
        "recipes": "learning", "keys": "keys",
    },
    "Use": {
        "predict": "using", "evaluate": "measuring", "info": "weights", "models": "weights", "convert": "weights",
    },
    "Share": {
        "export": "shipping", "package": "shipping", "serve": "serving", "ui": "serving", "card": "shipping",
        "push": "shipping",
    },
    "Research": {"study": "studying", "fewshot": "measuring", "permute": "weights", "bench": "measuring"},
    "Machine": {"shard": "using", "doctor": "using"},
}  # fmt: skip
HELP = """The all-MLP vision system: train, evaluate and use MLP-Mixer image classifiers.

    mixlab train digits              # a first model, in one to three minutes
    mixlab train PATH --budget 10m   # your own images, in PATH/CLASS/*
    mixlab predict RUN photo.jpg     # what is in an image
"""
ALL_LEVELS: tuple[Level, ...] = ("common", "more", "expert")


def make_app(levels: tuple[Level, ...] | None = None) -> App:
    """The command line. Commands are imported when they are called, or at once where `levels` is given, as help and
    completion need it; those that train then have the recipe's keys of these levels among their options."""
    app = App(
        name="mixlab",
        help=HELP,
        version=mixlab.__version__,
        version_flags=["--version"],
        help_format="plaintext",  # Markdown would swallow the stars of DATA/CLASS/*
        # --json, --quiet and --traceback are understood after every command; `main` takes them out first.
        help_epilogue="Every command takes --json (one JSON object on standard output), --quiet and --traceback.",
    )
    for number, (title, names) in enumerate(COMMANDS.items(), start=1):
        group = Group(title, sort_key=number)
        for place, (name, module) in enumerate(names.items()):
            command: Any = f"mixlab.commands.{module}:{name}"
            if levels is not None:
                command = getattr(import_module(f"mixlab.commands.{module}"), name)
                if levels and name in RECIPE_COMMANDS:
                    command = with_keys(command, levels)
            app.command(command, name=name, group=group, sort_key=place)
    app.command(install_completion, name="--install-completion", group=group)
    for flag in ("--help", "--version"):
        app[flag].group = (group,)
    return app


def install_completion(
    *, shell: Literal["bash", "zsh", "fish"] | None = None, output: Path | None = None
) -> None:
    """Let the shell complete commands, options and keys.

    Parameters
    ----------
    shell
        By default the one in which this is called.
    output
        File for the script; by default the shell's own place, and its startup file is made to read it.
    """
    try:
        path = make_app(ALL_LEVELS).install_completion(
            shell=shell, output=output, add_to_startup=output is None
        )
    except ShellDetectionError:
        raise UsageError(
            "which shell this is cannot be found out", hint="--shell bash, zsh or fish"
        ) from None
    except OSError as error:
        raise DiskError(
            f"could not write: {error.strerror or error}", where=error.filename, hint="--output FILE"
        ) from error
    Context.screen().say(f"written to {path}; a new shell completes `mixlab`")
    emit({"completion": str(path)})


def split_overrides(tokens: Sequence[str], options: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the recipe's keys out of a command's arguments: `x --lr 3e-4 --compile` -> [x], {lr: 3e-4, compile: true}.

    Every --option that is not in `options` is one; a key without a value is a switch.
    """
    own = {*options, "help", "version"}
    rest: list[str] = []
    values: dict[str, Any] = {}
    waiting = list(tokens)
    while waiting:
        token = waiting.pop(0)
        key, equals, value = token[2:].partition("=")
        if not token.startswith("--") or not key or key.replace("-", "_") in own:
            rest.append(token)
            continue
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        values[key.replace("-", "_")] = value
    return rest, values


def run_command(tokens: list[str]) -> int:
    """Parse and run one command; its exit status. Errors are raised."""
    name = tokens[0] if tokens else "--help"
    if name in ("--help", "-h"):
        make_app(levels=())(["--help"], **OPTIONS, result_action="return_value")
        return 0
    if name in RECIPE_COMMANDS and "--version" in tokens:
        print(mixlab.__version__)
        return 0
    if name in RECIPE_COMMANDS and {"--help", "-h", "--help-all"} & set(tokens):
        levels: tuple[Level, ...] = ALL_LEVELS if "--help-all" in tokens else ("common",)
        make_app(levels)([name, "--help"], **OPTIONS, result_action="return_value")
        return 0
    app = make_app()
    if name in RECIPE_COMMANDS:
        tokens, overrides = split_overrides(tokens, RECIPE_COMMANDS[name])
        command, bound, _ = app.parse_args(tokens, **OPTIONS)
        status = command(*bound.args, **bound.kwargs, overrides=overrides)
    else:
        status = app(tokens, **OPTIONS, result_action="return_value")
    return status if isinstance(status, int) else 0


def _fail(error: MixlabError) -> int:
    from mixlab.report.screen import speaks

    if not speaks() and error.is_shared:
        return error.exit_status
    Context.on_error()
    if Context.json and speaks():
        values = {"kind": error.kind, "message": error.message, "where": error.where, "hint": error.hint}
        print(jsonlib.dumps({"error": values}))
    where = f"\n  where: {visible(error.where)}" if error.where else ""
    hint = f"\n  hint: {visible(error.hint)}" if error.hint else ""
    rank = "" if speaks() else f"rank {os.environ['RANK']}: "
    print(f"mixlab: {rank}{visible(error.message)}{where}{hint}", file=sys.stderr)
    return error.exit_status


def _guarded(action: Callable[[], int]) -> int:
    try:
        return action()
    except CycloptsError as error:
        error.verbose = False  # says where the function stands, which is of no use to a person
        return _fail(UsageError(" ".join(str(error).split()), hint="`mixlab --help` lists the commands"))
    except MixlabError as error:
        return _fail(error)
    except KeyboardInterrupt:
        failure = MixlabError("interrupted before there was anything to save")
        failure.kind, failure.exit_status = "interrupted", 130
        return _fail(failure)
    except Exception as error:  # the last line of defence: no traceback reaches a person who did not ask
        if is_out_of_memory(error):
            return _fail(
                MixlabError(
                    f"memory ran out: {' '.join(str(error).split())[:200]}",
                    hint="a smaller --batch-size, image size or model takes less; --device cpu has the machine's",
                )
            )
        failure = MixlabError(
            f"unexpected {type(error).__name__}: {error}",
            hint="this is a fault of mixlab; --traceback shows where",
        )
        failure.kind = "internal"
        return _fail(failure)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command in `arguments` (default sys.argv) and exit with its status."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    Context.json, Context.quiet = "--json" in tokens, "--quiet" in tokens
    with_traceback = "--traceback" in tokens
    tokens = [token for token in tokens if token not in ("--json", "--quiet", "--traceback")]
    if with_traceback:
        Context.on_error = tracebacklib.print_exc
    open_streams()
    status = _guarded(lambda: run_command(tokens))
    status = _guarded(_flush) or status
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _leave(status)
    sys.exit(status)


def _flush() -> int:
    """What was printed may still be on its way, and fail to arrive: better said here than by Python as it ends."""
    sys.stdout.flush()
    return 0


def _leave(status: int) -> NoReturn:
    """End a rank without the destructors of C++, which have aborted one whose work was done (torch 2.14, gloo).

    torchrun takes that for a failure and starts all ranks again.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)

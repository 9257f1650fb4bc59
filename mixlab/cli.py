"""The command `mixlab`: which commands there are, and how an error becomes text and an exit status."""

import json as jsonlib
import sys
import traceback as tracebacklib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cyclopts import App, CycloptsError

import mixlab
from mixlab.commands import Context
from mixlab.errors import MixlabError, UsageError

COMMANDS = ("train", "evaluate", "predict", "info", "models", "check", "runs", "doctor")

app = App(
    name="mixlab",
    help="The all-MLP vision system: train, evaluate and use MLP-Mixer image classifiers.",
    version=mixlab.__version__,
    version_flags=["--version"],
    # --json and --traceback are understood after every command; `main` takes them out first.
    help_epilogue="Every command takes --json (one JSON object on standard output) and --traceback.",
)
for name in COMMANDS:
    app.command(f"mixlab.commands:{name}", name=name)


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
    return (
        "Keys of a recipe (a key may go without its part before the dot where that is clear):\n"
        + "\n".join(lines)
    )


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

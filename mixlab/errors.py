"""What goes wrong, said so that a person can act: what, where, and what to do.

Level 0: every layer raises these, and only `cli.py` turns them into text and an exit status.
"""

import os
from typing import Any


class MixlabError(Exception):
    """A failure that a person can understand and mend. Exit status 1.

    `message` says what is wrong, `where` names the file, key or index, `hint` says what to do.
    """

    kind = "error"
    exit_status = 1
    is_shared = False  # raised by every process of a training for the same reason: one of them says it

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = self.message
        if self.where:
            text += f" ({self.where})"
        if self.hint:
            text += f"; {self.hint}"
        return text


class UsageError(MixlabError):
    """The command, a key, a name or a path does not fit together. Exit status 2."""

    kind = "usage"
    exit_status = 2


class UsageTypeError(UsageError, TypeError):
    """An argument of a call in Python is nothing of the kind that is taken."""


class DataError(MixlabError):
    """The images or labels cannot be used."""

    kind = "data"


class ExampleError(DataError):
    """One example, such as an image, cannot be read; `message` is the reason written to bad_files.csv."""

    kind = "example"


class WeightsError(MixlabError):
    """A weights file, a checkpoint or a run folder cannot be used."""

    kind = "weights"


class TrainingError(MixlabError):
    """Training cannot go on."""

    kind = "training"


class DiskError(MixlabError):
    """Something could not be written; what was there before is still there."""

    kind = "disk"


# What the allocators of CPUs and GPUs say, and the libraries that want memory of their own on a GPU.
_OUT_OF_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, the CPU's or a GPU's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def check_type(value: Any, kinds: tuple[type, ...], where: str, taken: str) -> None:
    """UsageTypeError, saying what is `taken`, if `value` is of none of `kinds`; True and False are no numbers."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UsageTypeError(f"{where} takes {taken}, not {type(value).__name__}", where=where)


def path_text(value: Any, where: str, taken: str = "a path") -> str:
    """A path, or a name, as text. UsageTypeError for anything else: a number would be opened as a file descriptor."""
    check_type(value, (str, os.PathLike), where, taken)
    return os.fsdecode(value)

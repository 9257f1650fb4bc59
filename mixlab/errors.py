"""What goes wrong, said so that a person can act: what, where, and what to do.

Level 0: every room raises these, and only `cli.py` turns them into text and an exit status.
"""


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


class DataError(MixlabError):
    """The images or labels cannot be used."""

    kind = "data"


class ImageError(DataError):
    """One image cannot be read; `message` is the reason written to bad_files.csv."""

    kind = "image"


class WeightsError(MixlabError):
    """A weights file, a checkpoint or a run folder cannot be used."""

    kind = "weights"


class TrainingError(MixlabError):
    """Training cannot go on."""

    kind = "training"


class DiskError(MixlabError):
    """Something could not be written; what was there before is still there."""

    kind = "disk"

"""Standard streams that a command can always write to: closed ones, and ones whose reader has gone.

The work goes on where nobody listens: a training must not end because `head` has seen enough of it.
"""

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

from mixlab.errors import DiskError

ERRORS = "backslashreplace"  # file names may hold bytes that are no text
GONE = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that was closed


class _Raw(io.FileIO):
    """A standard stream's file, which becomes /dev/null when it can no longer be written to."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also what stands in the buffers, at the end of the process too
            os.close(nowhere)
            if error.errno in GONE or self.fileno() == 2:  # nobody is left who could be told
                return len(data)
            raise DiskError(f"could not write: {error.strerror}", where="standard output") from error


def open_streams() -> None:
    """Give this process standard streams of that kind. Those that a caller in Python has put in place stay."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed (`>&-`): the next file opened would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _open(number, None))
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
                setattr(sys, name, _open(number, stream))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)


def _open(number: int, like: io.TextIOWrapper | None) -> TextIO:
    """A text stream on descriptor `number`, with the encoding and the buffering of the one before."""
    raw = _Raw(number, "w", closefd=False)
    if like is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors=ERRORS)
    is_unbuffered = isinstance(like.buffer, io.RawIOBase)  # python -u
    return io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),
        encoding=like.encoding,
        errors=ERRORS,
        line_buffering=like.line_buffering,
        write_through=like.write_through,
    )

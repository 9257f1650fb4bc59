"""Ctrl-C and SIGTERM: noted, so that training can save its state at the end of the step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixlab.errors import MixlabError


class Interrupted(MixlabError):  # noqa: N818 (nothing went wrong)
    """A signal asked for the end; the state is saved. Exit status 128 + the signal's number."""

    kind = "interrupted"

    def __init__(self, signal_number: int, run: Path, step: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} after step {step}", where=str(run), hint=f"go on with --resume {run}"
        )
        self.exit_status = 128 + signal_number


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying; a second one acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

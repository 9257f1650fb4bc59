"""Ctrl-C, SIGTERM and SIGUSR1: noted, so that training can save its state at the end of the step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixlab.errors import MixlabError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(MixlabError):  # noqa: N818 (nothing went wrong)
    """A signal asked for the end; the state is saved. Exit status 130 after Ctrl-C, else 143.

    Schedulers warn of the end with SIGTERM or, as one asks SLURM to, SIGUSR1: to scripts they are the same.
    """

    kind = "interrupted"
    is_shared = True

    def __init__(self, signal_number: int, run: Path, step: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} after step {step}", where=str(run), hint=f"go on with --resume {run}"
        )
        self.exit_status = 130 if signal_number == signal.SIGINT else 143


@contextmanager
def catch_signals(*, every: bool = False) -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list instead of dying; a second one acts as usual.

    every: so does no second one. torchrun passes on what the process group has got already, and kills after a while.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if not every:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if every and received else handler)

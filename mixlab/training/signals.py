"""Ctrl-C, SIGTERM and SIGUSR1: noted, so that training can save its state at the end of the step.

Where there is nothing more to save, they end the work at once, with a word on what is there.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixlab.errors import MixlabError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(MixlabError):  # noqa: N818 (nothing went wrong)
    """A signal came to end it; what there was to save is saved. Exit status 130 after Ctrl-C, else 143.

    Schedulers warn of the end with SIGTERM or, as one asks SLURM to, SIGUSR1: to scripts they are the same.
    """

    kind = "interrupted"
    is_shared = True

    def __init__(self, signal_number: int, run: Path, when: int | str, hint: str | None = None) -> None:
        """when: the last step, or the end of a sentence that begins "stopped by SIGINT"."""
        name = signal.Signals(signal_number).name
        when = when if isinstance(when, str) else f"after step {when}"
        super().__init__(
            f"stopped by {name} {when}",
            where=str(run),
            hint=hint or f"go on with mixlab train --resume {run}",
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


@contextmanager
def stopped_at_once(run: Path, when: str, hint: str, *, every: bool = False) -> Iterator[None]:
    """In this block the same signals end the work where it stands, with `Interrupted`; a second one acts as usual.

    run, when, hint: what it says of what is there. every: as in `catch_signals`.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if every and received else handler)

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        restore()
        raise KeyboardInterrupt  # no `except Exception` on the way takes it for a fault

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(received[0] if received else signal.SIGINT, run, when, hint) from None
    finally:
        restore()

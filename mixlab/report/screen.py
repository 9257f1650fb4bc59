"""What a command shows while it works: one live line on a terminal and in a notebook, plain lines elsewhere."""

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mixlab.escape import visible
from mixlab.language import Sentence

LOGGER = logging.getLogger("mixlab")
LOGGER.addHandler(logging.NullHandler())  # a program that has not set up logging hears nothing
LINE_SECONDS = 10.0  # between two plain progress lines, at least
NUM_LINES = 20  # plain lines of a whole piece of work, about
NOTEBOOK_SECONDS = 0.2  # between two updates of the line in a notebook


def speaks() -> bool:
    """Whether this process is the one of its job, started by torchrun or alone, that talks to the person."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


class _Console(Console):
    """rich's, which goes on in silence when the reader of its text has gone, instead of ending the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Screen:
    """Text for the person at the command. With `to_stderr` standard output stays free for one JSON object.

    to_log: nothing is printed; lines and tables go to `logging.getLogger("mixlab")` as INFO. quiet: to nobody.
    """

    def __init__(self, *, to_stderr: bool = False, to_log: bool = False, quiet: bool = False) -> None:
        stream = sys.stderr if to_stderr else sys.stdout
        # A service may have no standard output (None), or a closed one: then there is nobody to tell.
        is_gone = stream is None or getattr(stream, "closed", False)
        self.quiet = quiet or not speaks() or (is_gone and not to_log)
        self.to_log = to_log
        self._said: set[str] = set()
        # A log file gets whole lines; only a terminal has a width to wrap at.
        is_terminal = not is_gone and hasattr(stream, "isatty") and stream.isatty()
        width = None if is_terminal else 10_000
        self.console = _Console(stderr=to_stderr, highlight=False, soft_wrap=True, width=width)

    def say(self, text: str = "") -> None:
        """One line of text; what would not be seen in it, or would move the rest, is shown as an escape."""
        if self.quiet:
            return
        if self.to_log:
            LOGGER.info("%s", visible(text))
        else:
            self.console.print(visible(text), markup=False)

    def say_lines(self, text: str) -> None:
        """Text of several lines, as `say` shows it."""
        for line in text.split("\n"):
            self.say(line)

    def say_once(self, text: str) -> None:
        """The same, but only the first time."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def show(self, renderable: Any) -> None:
        """A rich table."""
        if self.quiet:
            return
        if self.to_log:
            text = io.StringIO()
            Console(file=text, width=200, highlight=False).print(renderable)
            LOGGER.info("%s", text.getvalue().rstrip())
        elif not self.console.is_terminal:
            # Without a terminal a table is as wide as its content.
            Console(file=self.console.file, width=200, highlight=False).print(renderable)
        else:
            self.console.print(renderable)

    @contextmanager
    def progress(self, label: str, total: int, start: int = 0) -> Iterator["Bar"]:
        """A bar for `total` units of work; on a terminal it is gone afterwards."""
        if self._is_notebook:
            line = NotebookLine(label)
            yield Bar(self, label, total, start, line)
            line.close()
            return
        if not self._is_live:
            yield Bar(self, label, total, start, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # what is said beside it matters more
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=total, completed=start, note="")
            yield Bar(self, label, total, start, partial(progress.update, task))

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Says what is being done: a line that goes when it is done, or a plain one where lines stay."""
        if self._is_live:
            with self.console.status(text):
                yield
            return
        self.say(text)
        yield

    @property
    def _is_live(self) -> bool:
        return self.console.is_terminal and not self.quiet and not self.to_log

    @property
    def _is_notebook(self) -> bool:
        return self.console.is_jupyter and not self.quiet and not self.to_log

    @contextmanager
    def progress_if_any(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A function of (done, total) that shows a bar from its first call on, for work that may not be needed."""
        with ExitStack() as stack:
            bars: list[Bar] = []

            def update(done: int, total: int) -> None:
                if not bars:
                    bars.append(stack.enter_context(self.progress(label, total, done)))
                bars[0].update(done)

            yield update


class NotebookLine:
    """One line of a notebook that is shown anew; by IPython alone, since rich would want ipywidgets for it."""

    def __init__(self, label: str) -> None:
        from IPython.display import Pretty, display

        self._as_line = Pretty
        self._label = label
        self._handle = display(Pretty(label), display_id=True)
        self._last = 0.0

    def __call__(self, *, completed: int, total: int, note: str) -> None:
        now = time.monotonic()
        if now - self._last >= NOTEBOOK_SECONDS:
            self._last = now
            self._handle.update(self._as_line(visible(f"{self._label} {note}")))

    def close(self) -> None:
        self._handle.update(self._as_line(""))


class Bar:
    """One running piece of work; `update` tells how far it is, of `total`, which may change.

    show: where its line lives, called with completed, total and note; None where only lines that stay can be written.
    """

    def __init__(
        self, screen: Screen, label: str, total: int, start: int, show: Callable[..., None] | None
    ) -> None:
        self._screen, self._label, self.total, self._start = screen, label, total, start
        self._show = show
        self._started = self._last_line = time.monotonic()
        self._last_done: int | None = None

    def update(self, done: int, note: str = "", *, is_news: bool = False) -> None:
        """Show `done` of the total, with `note`, and the time left at the speed so far.

        is_news: worth a line that stays even right after another one; there are about NUM_LINES of all kinds.
        """
        now = time.monotonic()
        fresh = done - self._start
        left = (now - self._started) / fresh * (self.total - done) if fresh > 0 else None
        eta = f"  {format_seconds(left)} left" if left is not None and done < self.total else ""
        note = f"{done:,}/{self.total:,}{eta}  {note}".rstrip()
        if self._show is not None:
            self._show(completed=done, total=self.total, note=note)
        elif (is_news or now - self._last_line >= LINE_SECONDS) and self._is_far_enough(done):
            self._screen.say(f"{self._label} {note}")
            self._last_line, self._last_done = now, done

    def _is_far_enough(self, done: int) -> bool:
        last = self._last_done
        return last is None or done >= self.total or (done - last) * NUM_LINES >= self.total


def format_seconds(seconds: float) -> str:
    """`95.2` -> `1m 35s`."""
    return str(duration(seconds))


def duration(seconds: float) -> Sentence:
    """The same, for whatever language it will be read in."""
    whole = round(seconds)
    if whole < 60:
        return Sentence("{seconds}s", seconds=whole)
    if whole < 3600:
        return Sentence("{minutes}m {seconds:02d}s", minutes=whole // 60, seconds=whole % 60)
    return Sentence("{hours}h {minutes:02d}m", hours=whole // 3600, minutes=whole % 3600 // 60)

"""Items of a data set through worker processes, in order, whatever happens to the workers."""

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from mixlab.errors import DataError, UsageError

MAX_WORKER_DEATHS = 5  # times that workers died, in one training of this process
LOCK_SECONDS = 1.0
IMPORTED_AGAIN = 77  # exit status of a worker that would train itself


def leave_if_imported_again() -> None:
    """End this process if it is a worker on its way, which begins by importing the script that trains.

    So it is where processes are spawned (macOS, Windows; Linux from Python 3.14), if that script has no guard.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(IMPORTED_AGAIN)


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; workers end when the parent tells them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _DoneEvent:
    """torch's word to its workers that all is done, which waits for no lock: a killed worker may hold it for good."""

    def __init__(self, event: Any) -> None:
        self._event, self._is_set = event, False

    def is_set(self) -> bool:
        return self._is_set  # the parent alone sets it

    def set(self) -> None:
        self._is_set = True
        setter = threading.Thread(target=self._event.set, daemon=True)
        setter.start()
        setter.join(LOCK_SECONDS)


def items_of_workers(
    dataset: torch.utils.data.Dataset[Any],
    first_step: int,
    num_steps: int,
    num_workers: int,
    timeout_seconds: float,
    max_deaths: int = MAX_WORKER_DEATHS,
) -> Iterator[Any]:
    """The items of all steps, in order. Workers that were killed are replaced: an item needs only its step.

    DataError where they died more than `max_deaths` times, or gave nothing for `timeout_seconds`.
    """
    step, deaths = first_step, 0
    hung = threading.Event()
    while step < num_steps:
        items, workers = _begin(dataset, range(step, num_steps), num_workers)
        try:
            while step < num_steps:
                # torch's own `timeout` would also be how long a dead worker goes unnoticed.
                timer = threading.Timer(timeout_seconds, _give_up, (workers, hung))
                timer.start()
                try:
                    item = next(items)
                finally:
                    timer.cancel()
                yield item
                step += 1
        except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: killed while handing over
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise  # an error of the worker's own code
            if hung.is_set():
                raise DataError(
                    f"the processes that read the examples gave none for {timeout_seconds:.0f} s at step {step}",
                    hint="does the storage of the data set answer? --timeout-seconds waits longer",
                ) from error
            if any(worker.exitcode == IMPORTED_AGAIN for worker in workers):
                raise UsageError(
                    "the processes that read the examples import this script first, and it would train again in each",
                    where=str(getattr(sys.modules["__main__"], "__file__", "the main script")),
                    hint='put the call under `if __name__ == "__main__":`, or give data__num_workers=0',
                ) from None
            deaths += 1
            if deaths > max_deaths:
                raise DataError(
                    f"the processes that read the examples died {deaths} times: {' '.join(str(error).split())[:200]}",
                    hint="is memory running out? --num-workers 0 reads them in the training process",
                ) from error
        finally:
            if not all(worker.is_alive() for worker in workers):  # a dead one may hold a lock of the others
                _kill(workers)


def _begin(dataset: torch.utils.data.Dataset[Any], steps: range, num_workers: int) -> tuple[Any, list[Any]]:
    """torch's iterator over the items of these steps, and its workers."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=4,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    others = multiprocessing.active_children()
    items: Any = iter(loader)
    items._workers_done_event = _DoneEvent(items._workers_done_event)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise wherever the main thread happens to be, in the middle of an update too.
        # Without it a death is noticed where an item is waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return items, workers


def _give_up(workers: list[Any], hung: threading.Event) -> None:
    """Kill workers that give nothing: the one who waits for them then hears of their end."""
    hung.set()
    _kill(workers)


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        with contextlib.suppress(ValueError):  # it is over, and forgotten
            worker.kill()

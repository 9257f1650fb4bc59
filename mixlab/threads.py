"""Work shared out to threads of one core each, so that nobody waits for another within an operation.

A region that torch computes by several threads ends with the slowest of them. Beside another program that is a thread
whose core is taken: a step of hundreds of short regions then waits hundreds of times, and two threads are slower than
one. Whole pieces of work have no such waits: the thread that is free takes the next.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()
_here = threading.local()
_drawing = threading.RLock()


def _forget() -> None:
    """Threads are not copied into a forked process, and one of them may have held a lock."""
    global _pools_lock, _drawing
    _pools_lock, _drawing = threading.Lock(), threading.RLock()
    _pools.clear()
    _here.__dict__.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def num_cores_here() -> int:
    """How many cores compute for this thread: torch's number of threads, also within `one_core_each`."""
    return getattr(_here, "num_cores", 0) or torch.get_num_threads()


@contextlib.contextmanager
def one_core_each() -> Iterator[None]:
    """Inside, an operation of this thread takes one core; `shared` gives pieces of work to as many as torch had."""
    if hasattr(_here, "num_cores") or torch.get_num_threads() == 1:
        yield
        return
    _here.num_cores = number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)
        del _here.num_cores


def num_sharing() -> int:
    """To how many threads `shared` gives pieces of work; 1 outside of `one_core_each`."""
    return getattr(_here, "num_cores", 1)


def shared(function: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
    """The results of `function` for all pieces, in order; within `one_core_each` by a core for each at a time.

    Gradients are recorded where they are recorded here.
    """
    return list(in_turn(function, pieces))


def in_turn(function: Callable[[Any], Any], pieces: Iterable[Any]) -> Iterator[Any]:
    """The results of `shared` one by one, as soon as those before them are there: not all are kept."""
    pieces, number = list(pieces), num_sharing()
    if number == 1 or len(pieces) < 2:
        return map(function, pieces)
    return pool_of_cores(number).map(partial(_as_here, torch.is_grad_enabled(), function), pieces)


def _as_here(has_gradients: bool, function: Callable[[Any], Any], piece: Any) -> Any:
    with torch.set_grad_enabled(has_gradients):
        return function(piece)


@contextlib.contextmanager
def seeded(seed: int, *, restores: bool = False) -> Iterator[None]:
    """Inside, torch's generator begins with `seed` and is this thread's alone: all threads of a process share it.

    restores: only the CPU's is seeded, and the next draw gets what would have come without this.
    """
    with _drawing:
        if not restores:
            torch.manual_seed(seed)
            yield
            return
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.default_generator.set_state(before)


def pool_of_cores(num_threads: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each."""
    with _pools_lock:
        if num_threads not in _pools:
            before, ready = torch.get_num_threads(), threading.Barrier(num_threads)

            def begin() -> None:
                torch.get_num_threads()  # else a thread's first operation takes the number of the others again
                torch.set_num_threads(1)  # of this thread, but also of MKL in all of them: put right below
                ready.wait()

            pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fast", initializer=begin)
            list(pool.map(lambda _: None, range(num_threads)))
            torch.set_num_threads(before)
            _pools[num_threads] = pool
        return _pools[num_threads]

"""Files written beside the training: one thread, in order; a full disk costs a warning, not the training."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from mixlab.errors import DiskError

MAX_PENDING = 2  # the weights and the checkpoint of one moment


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory, of this moment: what they were made from may change while they are written."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


class Saver:
    """Runs writing jobs in a thread, one after the other. Not for use from several threads.

    report: called, from the thread, with every DiskError; the files from before the failed job are still there.
    A job that failed is tried again before the next of another kind, which may rely on it (a checkpoint on the best
    weights being written), until a newer one of its own kind takes its place; and once more by `close`.
    """

    def __init__(self, report: Callable[[DiskError], None]) -> None:
        self._report = report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: list[Future[None]] = []
        self._failed: dict[str, Callable[[], object]] = {}  # in the order in which they were submitted

    @property
    def is_busy(self) -> bool:
        """Whether a job is still being written. Raises what a finished one raised, if that was no DiskError."""
        waiting = [future for future in self._pending if not future.done()]
        for future in self._pending:
            if future.done():
                future.result()
        self._pending = waiting
        return bool(waiting)

    def submit(self, kind: str, job: Callable[[], object]) -> None:
        """Write soon. Waits only where MAX_PENDING jobs are not written yet: each holds a copy in memory."""
        if self.is_busy and len(self._pending) >= MAX_PENDING:
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(self._run, kind, job))

    def _run(self, kind: str, job: Callable[[], object]) -> None:
        self._failed.pop(kind, None)
        self._failed[kind] = job
        try:
            self._try_all()
        except DiskError as error:
            self._report(error)

    def _try_all(self) -> None:
        for kind in list(self._failed):
            self._failed[kind]()
            del self._failed[kind]

    def wait(self) -> None:
        """Until all that was submitted is written or has failed."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def close(self) -> None:
        """Wait, and try once more what failed last. DiskError if it fails again."""
        self.wait()
        self._pool.shutdown()
        self._try_all()

    def abandon(self) -> None:
        """Wait for what is being written, when training ends by an error of its own."""
        self._pool.shutdown()

"""Several processes that train as one: who is who, and what they must agree on. `torchrun` starts them.

Every process runs the same code on its share of each batch. What touches the run folder or the person is done by
the first one (rank 0). GPU paths (nccl) follow PyTorch's conventions and are not run on a GPU yet.
"""

import ast
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from mixlab.cpu.workers import end_programs
from mixlab.data.loader import Batch, evaluation_batches
from mixlab.data.modality import BadFile
from mixlab.data.reading import Examples
from mixlab.device import pick_device
from mixlab.errors import MixlabError, TrainingError, UsageError
from mixlab.evaluation.classify import classify
from mixlab.evaluation.metrics import Predictions

T = TypeVar("T")
BEAT_SECONDS = 1.0  # between two signs of life of a rank


@dataclass(frozen=True)
class World:
    """All processes of one training, as one of them sees them; the default is a process on its own.

    rank: number of this process of `size`; local_rank of local_size: the same within its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    life: "Heartbeat | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device that this process trains on: of several GPUs its own."""
        device = pick_device(name)
        if device.type == "cuda" and self.size > 1:
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            card = str(torch.cuda.get_device_properties(device).uuid)
            check_own_cards(self.gather((socket.gethostname(), card)))
        return device

    def share(self, count: int) -> range:
        """Which of `count` things this rank takes: neighbours, in the order of the ranks."""
        bounds = [part[0] if len(part) else count for part in np.array_split(np.arange(count), self.size)]
        return range(int(bounds[self.rank]), int([*bounds, count][self.rank + 1]))

    def now(self, doing: str) -> None:
        """What this process is about to do, for the others to read if it never ends."""
        if self.life is not None:
            self.life.doing = doing

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """For each value the largest of all ranks."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(value) for value in tensor]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor in the CPU's memory over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def run_on_main(self, make: Callable[[], T]) -> T:
        """What `make` returns, or the MixlabError that it raises, on rank 0; it is called nowhere else."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except MixlabError as error:
                error.is_shared = True
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def check_same(self, value: Any, what: str) -> None:
        """TrainingError on every rank if `value` is not the same on all of them."""
        values = self.gather(value)
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            raise TrainingError(
                f"rank {different[0]} has other {what} than rank 0",
                where=f"{values[different[0]]!r} and {values[0]!r}"[:200],
                hint="all machines must see the same files and run the same versions",
            )


def check_own_cards(cards: Sequence[tuple[str, str]]) -> None:
    """UsageError if two ranks have the same GPU, given as host and number: nccl gives up on that later."""
    for rank, card in enumerate(cards):
        other = cards.index(card)
        if other != rank:
            raise UsageError(
                f"ranks {other} and {rank} have the same GPU of {card[0]}",
                where="--device",
                hint="start as many processes as there are GPUs, or --device cpu",
            )


ALONE = World()


class Heartbeat:
    """Signs of life: each rank says once a second, from a thread of its own, that it lives and what it is doing."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store.clone(), rank, size
        self.doing = "starting"
        self._beats = 0
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="signs of life", daemon=True).start()

    def _beat(self) -> None:
        facts = (socket.gethostname(), os.getpid())
        while not self._ended.is_set():
            self._beats += 1
            try:
                self._store.set(f"life/{self._rank}", repr((self._beats, *facts, self.doing)).encode())
            except RuntimeError:  # the store is gone, and soon this process too
                return
            self._ended.wait(BEAT_SECONDS)

    def end(self) -> None:
        """Stop beating."""
        self._ended.set()

    def describe(self) -> str:
        """Who does not live any more, or else what each rank is doing."""
        try:
            first = self._read()
            time.sleep(2.5 * BEAT_SECONDS)
            second = self._read()
        except RuntimeError:  # it is kept by torchrun or, without that, by rank 0
            return "the process that keeps their signs of life is gone too"
        dead = [rank for rank in range(self._size) if first.get(rank) == second.get(rank)]
        lines = []
        for rank in dead or range(self._size):
            _, host, process, doing = second.get(rank) or (0, "?", "?", "starting")
            lines.append(f"rank {rank} (process {process} on {host}) was {doing}")
        return ("no sign of life from " if dead else "") + "; ".join(lines)

    def _read(self) -> dict[int, Any]:
        names = {rank: f"life/{rank}" for rank in range(self._size)}
        return {
            rank: ast.literal_eval(self._store.get(name).decode())
            for rank, name in names.items()
            if self._store.check([name])
        }


def classify_shared(
    world: World,
    model: nn.Module,
    examples: Examples,
    batch_size: int,
    device: torch.device,
    *,
    on_bad: Callable[[BadFile], None],
    equally_often: bool = False,
    temperature: float = 1.0,
    keep_logits: bool = False,
) -> Predictions:
    """Predictions for every example, each counted once, on every rank.

    Whole batches are shared out, so that the last bits of a logit do not depend on the number of ranks.
    equally_often: the ranks must call the model as often as each other. The last two: as for `classify`.
    """

    def batches() -> Iterator[Batch]:
        count = 0
        for batch in evaluation_batches(examples, batch_size, on_bad, first=world.rank, every=world.size):
            count += 1
            yield batch
        num_batches = -(-len(examples) // batch_size)
        while equally_often and count < -(-num_batches // world.size):
            count += 1
            blank = torch.zeros(1, examples.preprocess.channels, *examples.preprocess.input_size)
            yield Batch(blank, torch.zeros(0, dtype=torch.int64), np.zeros(0, dtype=np.int64))

    return classify(model, batches(), device, world.gather, temperature=temperature, keep_logits=keep_logits)


def is_launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def joined(timeout_seconds: float) -> Iterator[World]:
    """Join the other processes, if there are any. TrainingError says which rank was lost, and doing what.

    Programs that computed for this process alone end with it.

    timeout_seconds: how long any rank waits for the others before it gives up.
    """
    if dist.is_initialized():
        raise UsageError(
            "this process trains already", hint="one training at a time in a job of several processes"
        )
    size = int(os.environ["WORLD_SIZE"]) if is_launched() else 1
    if size == 1:
        try:
            yield World()
        finally:
            end_programs()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout_seconds)
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun (2.14) keeps one store over all its restarts: the addresses of the dead are still in it.
            store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:  # DistError is one too
        raise TrainingError(
            f"rank {os.environ['RANK']} of {size} did not find the others: {' '.join(str(error).split())[:200]}",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            hint="did all processes start, and can their machines reach this address and each other?",
        ) from error
    life = Heartbeat(store, rank, size)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        yield World(rank, size, local_rank, local_size, life)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        if threading.current_thread() is threading.main_thread():
            # torchrun asks the others to end as soon as one is gone, and kills them later: first say what happened.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise TrainingError(
            f"rank {rank} of {size} got no answer from the others: {life.describe()}",
            where=" ".join(str(error).split())[:200],
            hint=f"ranks wait {timeout_seconds:.0f} s for each other (--timeout-seconds); the last checkpoint is "
            "safe: --resume, or torchrun --max-restarts, goes on from it",
        ) from error
    else:
        dist.destroy_process_group()  # not after a failure: it could wait for a rank that is no more
    finally:
        life.end()


def is_under_torchrun() -> bool:
    """Whether torchrun runs this command, and so runs it again where a process or a machine was lost."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_lost(error: Exception) -> bool:
    """Whether `error` says that another process does not answer: gloo raises plain RuntimeErrors."""
    text = str(error).lower()
    words = (
        "gloo",
        "connection closed by peer",
        "connection reset by peer",
        "broken pipe",
        "timed out waiting",
    )
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def same_everywhere(value: Any) -> str:
    """A short name of a value's content, to compare between ranks."""
    import hashlib

    return hashlib.sha256(pickle.dumps(value)).hexdigest()[:16]

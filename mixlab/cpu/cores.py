"""A core for each few images: threads or programs that compute alone, and the gradient of a batch by them.

No thread waits for another within an operation, so activations stay in a core's cache, and a core that something else
keeps busy slows a step by no more than its share: the core that is free takes the next images.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mixlab.cpu.parts import MODEL, Loss, SharedBatch, cut, gradient
from mixlab.cpu.passes import Passes
from mixlab.cpu.worker import describe
from mixlab.cpu.workers import MAX_PARTS, TIMEOUT_SECONDS, Workers, are_spare, why_none
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.models.pyramid import PyramidConfig
from mixlab.threads import in_turn, num_cores_here, one_core_each, shared

CHUNK_BYTES = 13 << 20  # of the widest activation of one chunk of images; with MAX_CHUNK measured (LOG.md)
MAX_CHUNK = 32  # images
SHORT = 1 << 15  # hidden_dim x channel_mlp_dim of a Mixer up to which this is so; measured (LOG.md)
COLUMNS = 1 << 17  # numbers of a row that a core adds at a time
START_SECONDS = 1.0  # of work, before programs are started: a shorter training would end before they begin
WAIT_SECONDS = 30.0  # for programs to begin, where what follows is measured


def images_at_once(config: MixerConfig) -> int:
    """As many images as a core computes best at a time: as much as its cache holds of the widest layer."""
    widest = max(config.num_patches * config.channel_mlp_dim, config.hidden_dim * config.token_mlp_dim)
    return min(max(CHUNK_BYTES // (4 * widest), 1), MAX_CHUNK)


def number_of_parts(num_images: int, at_once: int, num_threads: int) -> int:
    """Into how many equal parts a batch is cut: none larger than `at_once`, as many for each thread."""
    num_parts = -(-num_images // at_once)
    return max(min(-(-num_parts // num_threads) * num_threads, num_images), 1)


def are_short(config: MixerConfig) -> bool:
    """Whether the operations on a few images are so short that threads would mostly wait for each other."""
    return isinstance(config, PyramidConfig) or config.hidden_dim * config.channel_mlp_dim <= SHORT


class Cores:
    """Backward passes of `model` by as many threads as torch has when they begin, or as many processes.

    A batch is cut into parts, computed by one core each, and their gradients are added in order, so the bits depend
    on the number of threads alone. Where a model's operations are short (`are_short`) programs of their own take the
    place of the threads once they have begun (workers.py); the parameters are then in memory that all of them see.
    Where they cannot be had, threads go on, and `problem` says why. dtype: as Passes has it.
    timeout_seconds: as Workers has it.
    """

    def __init__(
        self,
        model: Mixer,
        dtype: torch.dtype = torch.float32,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self._model = Passes(model, dtype)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._at_once = images_at_once(model.config)
        self._job: _Job | None = None
        self._began: float | None = None  # time.monotonic() of the first batch that programs could have taken
        self._wanted: tuple[Any, ...] | None = None  # by it, as long as none are started
        self._are_apart = are_short(model.config) and num_cores_here() > 1
        self.problem = why_none() if self._are_apart else None

    def draw(self, num_images: int) -> list[Tensor | None]:
        """Which residual branches so many images keep, see `Passes.draw`."""
        return self._model.draw(num_images)

    def backward(
        self,
        image: Tensor,
        target: Tensor,
        loss: Loss,
        share: float = 1.0,
        keep: list[Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of `share` times the mean loss of the batch to the parameters' own.

        image (B, channels, H, W), target (B, K) or (B, N, K) -> that product, and the number of correct answers
        (`parts.num_correct`). loss: the mean loss of logits and targets of some of the images; a value that has a
        name, for other processes to find it by (`worker.describe`), else threads compute. keep: what `draw` gave;
        None draws.
        """
        with one_core_each():
            keep = self.draw(len(image)) if keep is None else keep
            return self._backward(image, target, loss, share, keep)

    def _backward(
        self, image: Tensor, target: Tensor, loss: Loss, share: float, keep: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        num_parts = number_of_parts(len(image), self._at_once, num_cores_here())
        rows: Any = None
        if self._are_apart and self.problem is None and 1 < num_parts <= MAX_PARTS:
            rows = self._by_programs(image, target, keep, loss, num_parts, share)
        if rows is None:

            def compute(part: tuple[Any, ...]) -> Tensor:
                images, targets, kept = part
                return gradient(self._model, images, targets, kept, loss, share * len(images) / len(image))

            rows = in_turn(compute, cut(image, target, keep, num_parts))
        value, num_correct, *gradients = _sum(rows).split([1, 1, *(p.numel() for p in self._parameters)])
        for parameter, found in zip(self._parameters, gradients, strict=True):
            found = found.view_as(parameter)
            parameter.grad = found if parameter.grad is None else parameter.grad + found
        return value[0], num_correct[0].long()

    def _by_programs(
        self,
        image: Tensor,
        target: Tensor,
        keep: list[Tensor | None],
        loss: Loss,
        num_parts: int,
        share: float,
    ) -> Tensor | None:
        """The rows of all parts, or None as long as the programs have not begun."""
        wanted = (image, target, keep, loss, num_parts)
        if self._began is None:
            self._began = time.monotonic()
        is_early = time.monotonic() - self._began < START_SECONDS
        if self._job is None and is_early and not are_spare():
            if self._wanted is None or len(image) > len(self._wanted[0]):  # the largest part of a batch
                self._wanted = wanted
            return None
        try:
            if self._wanted is not None:
                self._started(self._wanted)
            job = self._started(wanted)
            if not job.workers.are_ready():
                return None
        except (OSError, ValueError) as error:
            self._go_on_by_threads(error)
            return None
        job.batch.put(image, target, keep, num_parts, share)
        try:
            return job.workers.compute(num_parts, job.batch.compute)
        except BaseException:
            self.close(is_whole=False)  # parts of this batch may still be on their way
            raise

    def _started(self, wanted: tuple[Any, ...]) -> "_Job":
        """Programs for such batches, which may not be ready yet."""
        self._wanted = None
        if self._job is None or not self._job.fits(*wanted):
            self.close()
            self._job = _Job(self._model, self.timeout_seconds, *wanted)
        return self._job

    def _go_on_by_threads(self, error: Exception) -> None:
        self.close(is_whole=False)
        self.problem = str(error)

    def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Until there are programs for batches like the last, at most so long: before something is measured."""
        if self._wanted is not None or self._job is not None:
            try:
                job = self._job if self._wanted is None else self._started(self._wanted)
                if job is not None:
                    job.workers.wait(seconds)
            except (OSError, ValueError) as error:
                self._go_on_by_threads(error)

    def close(self, *, is_whole: bool = True) -> None:
        """Let the programs go, if there are any; the next call takes others. is_whole: see `Workers.close`."""
        if self._job is not None:
            self._job.workers.close(is_whole=is_whole)
            self._job = None
        self._wanted = None


def _sum(rows: Tensor | Iterator[Tensor]) -> Tensor:
    """The rows added from first to last. Those that are all there have columns shared out, which changes no bit."""
    if not isinstance(rows, Tensor):  # few are kept at a time: a large model's are gigabytes
        found = next(rows).clone()
        for row in rows:
            found += row
        return found
    found = rows[0].clone()

    def add(columns: slice) -> None:
        part = found[columns]
        for row in rows[1:]:
            part += row[columns]

    shared(add, [slice(start, start + COLUMNS) for start in range(0, len(found), COLUMNS)])
    return found


class _Job:
    """What the programs compute for a `Cores`, and for which batches."""

    def __init__(
        self,
        passes: Passes,
        timeout_seconds: float,
        image: Tensor,
        target: Tensor,
        keep: list[Tensor | None],
        loss: Loss,
        num_parts: int,
    ) -> None:
        """OSError where no program can be started, ValueError where the loss or the model has no name."""
        model, num_cores = passes.model, num_cores_here()
        self.drops = [kept is not None for kept in keep]
        self.loss, self.max_parts, self.num_cores = loss, num_parts, num_cores
        parameters = dict(model.named_parameters())
        facts = {
            "kind": describe(type(model)),
            "config": describe(model.config),
            "trained": [name for name, parameter in parameters.items() if parameter.requires_grad],
            "checkpoint_blocks": model.checkpoint_blocks,
            "dtype": str(passes.dtype).removeprefix("torch."),
            "loss": describe(loss),
            "drops": self.drops,
        }
        tensors = {
            "image": torch.zeros_like(image),
            "target": torch.zeros_like(target),
            "kept": torch.zeros(len(keep), len(image), dtype=torch.float32),
            "numbers": torch.zeros(3, dtype=torch.float64),  # images, parts, share of a batch
        } | {MODEL + name: parameter.detach() for name, parameter in parameters.items()}
        size = 2 + sum(p.numel() for p in parameters.values() if p.requires_grad)
        num_others = min(num_cores, num_parts) - 1
        self.workers = Workers(facts, tensors, size, num_parts, num_others, timeout_seconds)
        for name, parameter in parameters.items():
            parameter.data = self.workers.tensors[MODEL + name]
        self.batch = SharedBatch(passes, loss, self.drops, self.workers.tensors)

    def fits(
        self, image: Tensor, target: Tensor, keep: list[Tensor | None], loss: Loss, num_parts: int
    ) -> bool:
        """Whether it computes such a batch too."""
        own = self.batch.tensors
        if [kept is not None for kept in keep] != self.drops or loss != self.loss:
            return False
        same = all(
            mine.shape[1:] == other.shape[1:] and mine.dtype == other.dtype
            for mine, other in ((own["image"], image), (own["target"], target))
        )
        small = len(image) <= len(own["image"]) and num_parts <= self.max_parts
        return same and small and num_cores_here() == self.num_cores

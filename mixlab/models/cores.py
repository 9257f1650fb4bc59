"""A core for each few images: threads or processes that compute alone, and the gradient of a batch by them.

No thread waits for another within an operation, so activations stay in a core's cache, and a core that something else
keeps busy slows a step by no more than its share: whoever is free takes the next images.
"""

import builtins
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mixlab.models.fast_training import FastTraining
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.models.processes import MAX_PARTS, Processes, can_fork
from mixlab.models.pyramid import PyramidConfig

CHUNK_BYTES = 13 << 20  # of the widest activation of one chunk of images; with MAX_CHUNK measured (LOG.md)
MAX_CHUNK = 32  # images
SHORT = 1 << 15  # hidden_dim x channel_mlp_dim of a Mixer up to which this is so; measured (LOG.md)
_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads are not copied into a forked process


def images_at_once(config: MixerConfig) -> int:
    """As many images as a core computes best at a time: as much as its cache holds of the widest layer."""
    widest = max(config.num_patches * config.channel_mlp_dim, config.hidden_dim * config.token_mlp_dim)
    return min(max(CHUNK_BYTES // (4 * widest), 1), MAX_CHUNK)


def number_of_parts(num_images: int, at_once: int, num_threads: int) -> int:
    """Into how many equal parts a batch is cut: none larger than `at_once`, as many for each thread."""
    num_parts = -(-num_images // at_once)
    return max(min(-(-num_parts // num_threads) * num_threads, num_images), 1)


def pool_of_cores(num_threads: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each."""
    with _pools_lock:
        if num_threads not in _pools:
            ready = threading.Barrier(num_threads)

            def begin() -> None:
                torch.get_num_threads()  # else a thread's first operation takes the number of the others again
                torch.set_num_threads(1)  # of this thread, but also of MKL in all of them: put right below
                ready.wait()

            pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fast", initializer=begin)
            list(pool.map(lambda _: None, range(num_threads)))
            torch.set_num_threads(num_threads)
            _pools[num_threads] = pool
        return _pools[num_threads]


class Cores:
    """Backward passes of `model` by as many threads as torch has when they begin, or as many processes.

    A batch is cut into parts, computed by one core each, and their gradients are added in order, so the bits depend
    on the number of threads alone. Processes are taken where a model's operations are short (`are_short`) and this
    machine can fork; its parameters are then moved into memory that all of them see. dtype: as FastTraining has it.
    """

    def __init__(self, model: Mixer, dtype: torch.dtype = torch.float32) -> None:
        self._model = FastTraining(model, dtype)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._at_once = images_at_once(model.config)
        self._apart = are_short(model.config) and can_fork()
        self._batch: _SharedBatch | None = None

    def backward(
        self,
        image: Tensor,
        target: Tensor,
        mean_loss: Callable[[Tensor, Tensor], Tensor],
        share: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of `share` times the mean loss of the batch to the parameters' own.

        image (B, channels, H, W), target (B, K or more) -> that product, and the number of correct answers by the
        first K. mean_loss: of logits and targets of some of the images; the same function at every call, not holding
        this object.
        """
        num_threads = torch.get_num_threads()
        num_parts = number_of_parts(len(image), self._at_once, num_threads)
        keep = self._model.draw(len(image))
        if self._apart and num_threads > 1 and 1 < num_parts <= MAX_PARTS:
            if self._batch is None or not self._batch.fits(image, target, keep, num_threads):
                self.close()
                self._batch = _SharedBatch(self, image, target, keep, mean_loss, num_threads)
            try:
                results = iter(self._batch.compute(image, target, keep, num_parts, share))
            except BaseException:
                self.close()  # parts of this batch may still be on their way
                raise
        else:
            parts = [
                (*part, mean_loss, share * len(part[0]) / len(image))
                for part in _cut(image, target, keep, num_parts)
            ]
            pool: Any = pool_of_cores(num_threads) if num_threads > 1 else builtins
            results = pool.map(lambda part: self.gradient(*part), parts)
        found = next(results).clone()
        for result in results:
            found += result
        loss, num_correct, *gradients = found.split([1, 1, *(p.numel() for p in self._parameters)])
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            gradient = gradient.view_as(parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss[0], num_correct[0].long()

    def gradient(
        self, image: Tensor, target: Tensor, keep: list[Tensor | None], mean_loss: Any, share: float
    ) -> Tensor:
        """Of some images: the loss, the number of correct answers and all gradients in one row."""
        with torch.enable_grad():
            logits = self._model(image, keep)
            loss = share * mean_loss(logits, target)
            gradients = torch.autograd.grad(loss, self._parameters)
        correct = (logits.argmax(dim=1) == target[:, : logits.shape[1]].argmax(dim=1)).sum()
        return torch.cat([torch.stack([loss.detach(), correct]), *(g.flatten() for g in gradients)])

    def close(self) -> None:
        """End the processes, if there are any; the next call begins others."""
        if self._batch is not None:
            self._batch.processes.close()
            self._batch = None


def are_short(config: MixerConfig) -> bool:
    """Whether the operations on a few images are so short that threads would mostly wait for each other."""
    return isinstance(config, PyramidConfig) or config.hidden_dim * config.channel_mlp_dim <= SHORT


def _cut(
    image: Tensor, target: Tensor, keep: list[Tensor | None], num_parts: int
) -> Iterator[tuple[Any, ...]]:
    kept_parts = zip(
        *([None] * num_parts if kept is None else kept.tensor_split(num_parts) for kept in keep), strict=True
    )
    parts = zip(image.tensor_split(num_parts), target.tensor_split(num_parts), kept_parts, strict=True)
    return ((images, targets, list(kept)) for images, targets, kept in parts)


class _SharedBatch:
    """What the processes of a `Cores` compute, in memory that all of them see."""

    def __init__(
        self,
        cores: Cores,
        image: Tensor,
        target: Tensor,
        keep: list[Tensor | None],
        mean_loss: Any,
        num_threads: int,
    ) -> None:
        self.num_threads = num_threads
        self.drops = drops = [kept is not None for kept in keep]
        self.image, self.target = shared_image, shared_target = (
            torch.empty_like(image),
            torch.empty_like(target),
        )
        self.kept = shared_kept = torch.empty(len(keep), len(image))
        self.numbers = numbers = torch.zeros(3, dtype=torch.float64)  # images, parts, share of this batch
        # Weak, and without self: else they would keep each other, and so the processes, alive.
        weak = weakref.WeakMethod(cores.gradient)

        def compute(part: int) -> Tensor:
            num_images, num_parts = int(numbers[0]), int(numbers[1])
            kept = [shared_kept[i, :num_images, None, None] > 0 if on else None for i, on in enumerate(drops)]
            parts = list(_cut(shared_image[:num_images], shared_target[:num_images], kept, num_parts))[part]
            gradient: Any = weak()
            return gradient(*parts, mean_loss, float(numbers[2]) * len(parts[0]) / num_images)

        inputs = [self.image, self.target, self.kept, self.numbers, *cores._model.parameters()]
        size = 2 + sum(p.numel() for p in cores._parameters)
        self.processes = Processes(compute, size, MAX_PARTS, inputs, num_threads - 1)

    def fits(self, image: Tensor, target: Tensor, keep: list[Tensor | None], num_threads: int) -> bool:
        if [kept is not None for kept in keep] != self.drops:
            return False
        same = image.shape[1:] == self.image.shape[1:] and target.shape[1:] == self.target.shape[1:]
        return same and len(image) <= len(self.image) and num_threads == self.num_threads

    def compute(
        self, image: Tensor, target: Tensor, keep: list[Tensor | None], num_parts: int, share: float
    ) -> Tensor:
        num_images = len(image)
        self.image[:num_images], self.target[:num_images] = image, target
        for row, kept in zip(self.kept, keep, strict=True):
            if kept is not None:
                row[:num_images] = kept.flatten()
        self.numbers.copy_(torch.tensor([num_images, num_parts, share], dtype=torch.float64))
        return self.processes.compute(num_parts)

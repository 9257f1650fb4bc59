"""A core for each few images: threads that compute alone, and the gradient of a batch by them.

No thread waits for another within an operation, so activations stay in a core's cache, and a core that something else
keeps busy slows a step by no more than its share: whoever is free takes the next images.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mixlab.models.fast_training import FastTraining
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.models.pyramid import PyramidConfig

CHUNK_BYTES = 13 << 20  # of the widest activation of one chunk of images; with MAX_CHUNK measured (LOG.md)
MAX_CHUNK = 32  # images
TOGETHER_CHUNK = 64  # images, where all cores compute each operation together; measured (LOG.md)
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
    """Backward passes of `model` by as many threads as torch has when they begin.

    A pyramid's many short operations would wait for Python's lock in threads of their own: all cores compute each of
    them together, still a few images at a time.
    """

    def __init__(self, model: Mixer) -> None:
        self._model = FastTraining(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._together = isinstance(model.config, PyramidConfig)
        self._at_once = TOGETHER_CHUNK if self._together else images_at_once(model.config)

    def backward(
        self,
        image: Tensor,
        target: Tensor,
        mean_loss: Callable[[Tensor, Tensor], Tensor],
        share: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of `share` times the mean loss of the batch to the parameters' own.

        image (B, channels, H, W), target (B, K or more) -> that product, and the number of correct answers by the
        first K. mean_loss: of logits and targets of some of the images. Parts are added in their order, so the bits
        depend on the number of threads alone.
        """
        num_threads = 1 if self._together else torch.get_num_threads()
        num_parts = number_of_parts(len(image), self._at_once, num_threads)
        keep = self._model.draw(len(image))
        kept_parts = zip(
            *([None] * num_parts if kept is None else kept.tensor_split(num_parts) for kept in keep),
            strict=True,
        )
        parts = list(
            zip(image.tensor_split(num_parts), target.tensor_split(num_parts), kept_parts, strict=True)
        )

        def compute(
            part: tuple[Tensor, Tensor, tuple[Any, ...]],
        ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            images, targets, kept = part
            with torch.enable_grad():
                logits = self._model(images, list(kept))
                loss = share * len(images) / len(image) * mean_loss(logits, targets)
                gradients = torch.autograd.grad(loss, self._parameters)
            correct = (logits.argmax(dim=1) == targets[:, : logits.shape[1]].argmax(dim=1)).sum()
            return loss.detach(), correct, gradients

        results = map(compute, parts) if num_threads == 1 else pool_of_cores(num_threads).map(compute, parts)
        loss_sum, num_correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for loss, correct, gradients in results:
            loss_sum += loss
            num_correct += correct
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient
        return loss_sum, num_correct

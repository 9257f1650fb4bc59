"""Works measured in turns, so that what else the machine does falls on all of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def alternate(works: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds that each of `works` takes, turn by turn, after one turn that is not counted."""
    times: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for work, found in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            if number:
                found.append(time.perf_counter() - began)
    return times


def forward(model: Any, image: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(image)

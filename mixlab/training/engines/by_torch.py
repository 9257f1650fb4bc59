"""torch computes: any model, any device; autocast, a scaler for fp16, torch.compile."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mixlab.cpu.parts import num_correct
from mixlab.device import autocast
from mixlab.language import Sentence
from mixlab.threads import seeded
from mixlab.training.objectives import Objective


class TorchEngine:
    """The forward pass of `module` and autograd's way back.

    note: why it is slower than it could be, if it is. precision: as the recipe has it. scale: of the loss, for who
    takes means over ranks where sums are wanted.
    """

    note: Sentence | None = None

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        device: torch.device,
        precision: str,
        scaler: torch.amp.GradScaler,
        scale: float,
        is_compiled: bool,
    ) -> None:
        self.forward: Any = torch.compile(module) if is_compiled else module
        self._objective, self._device, self._precision = objective, device, precision
        self._scaler, self._scale = scaler, scale

    def stepping(self) -> AbstractContextManager[object]:
        return nullcontext()  # torch's own threads compute

    def backward(self, image: Tensor, target: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
        with seeded(seed):
            with autocast(self._device, self._precision):
                logits = self.forward(image)
            if logits.dtype != torch.float64:  # half precision ends here; a model in float64 stays exact
                logits = logits.float()
            loss = share * self._objective.loss(logits, target)
            self._scaler.scale(loss * self._scale if self._scale > 1 else loss).backward()
        correct = num_correct(logits, target)
        return loss.detach(), correct if share else torch.zeros_like(correct)

    def wait(self, seconds: float) -> None:
        pass

    def problem(self) -> Sentence | None:
        return self.note

    def close(self) -> None:
        pass

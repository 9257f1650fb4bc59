"""One optimizer step, and the state it works on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mixlab.data.augment import mix
from mixlab.data.loader import Batch
from mixlab.data.random import torch_seed
from mixlab.device import autocast
from mixlab.errors import TrainingError
from mixlab.training.losses import balanced_class_weights, loss_per_batch
from mixlab.training.optimizer import build_optimizer
from mixlab.training.recipe import Recipe
from mixlab.training.schedule import lr_factor


def warmed_ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """A moving average whose decay is min(decay, (1 + n) / (10 + n)) at update n, so that it forgets its start."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, num_averaged: Any) -> None:
        number = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + number) / (10 + number)))

    return update


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Mean loss of the batch, and how many of its images were classified as their larger target says."""

    loss: float
    num_correct: int
    num_images: int
    lr: float


class TrainState:
    """Everything that a step changes, and what it needs to know. `steps` of the recipe is set."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, labels: Any, num_classes: int, device: torch.device
    ) -> None:
        self.model = model.to(device)
        self.recipe, self.num_classes, self.device = recipe, num_classes, device
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.forward: Any = torch.compile(self.model) if recipe.compile else self.model
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.ema: AveragedModel | None = None
        if recipe.ema_decay:
            self.ema = AveragedModel(self.model, multi_avg_fn=warmed_ema(recipe.ema_decay))
        self.class_weights: Tensor | None = None
        if recipe.loss.class_weights == "balanced":
            self.class_weights = balanced_class_weights(labels, num_classes).to(device)

    @property
    def best_guess(self) -> nn.Module:
        """The model to evaluate: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the state, by checkpoint file."""
        optimizer = {
            f"{number}.{key}": value
            for number, values in self.optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        files = {"model": self.model.state_dict(), "optimizer": optimizer}
        if self.ema is not None:
            files["ema"] = self.ema.state_dict()
        return files

    def load(self, tensors: dict[str, dict[str, Tensor]], scaler: dict[str, Any]) -> None:
        """The inverse of `tensors`."""
        self.model.load_state_dict(tensors["model"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors["optimizer"].items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self.scaler.load_state_dict(scaler)


def train_step(state: TrainState, batch: Batch, step: int) -> StepResult:
    """Forward, backward and update on one batch; TrainingError before the update if the loss is not finite."""
    recipe, device = state.recipe, state.device
    assert recipe.steps is not None
    factor = lr_factor(step, recipe.steps, recipe.schedule)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    image, label = batch.image.to(device, non_blocking=True), batch.label.to(device, non_blocking=True)
    image, target = mix(image, label, state.num_classes, recipe.augment, seed=recipe.seed, step=step, shard=0)
    state.optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), dtype=torch.float64 if image.dtype == torch.float64 else None, device=device)
    num_correct = torch.zeros((), dtype=torch.int64, device=device)
    for part in range(recipe.accumulate):
        images, targets = (whole.tensor_split(recipe.accumulate)[part] for whole in (image, target))
        if not len(images):  # a batch with fewer images than parts
            continue
        torch.manual_seed(torch_seed(recipe.seed, step, part))  # stochastic depth and dropout draw from it
        with autocast(device, recipe.precision):
            logits = state.forward(images)
        share = len(images) / len(image)
        if logits.dtype != torch.float64:  # half precision ends here; a model in float64 stays exact
            logits = logits.float()
        loss = share * loss_per_batch(logits, targets.to(logits.dtype), recipe.loss, state.class_weights)
        state.scaler.scale(loss).backward()
        loss_sum += loss.detach()
        num_correct += (logits.argmax(dim=1) == targets.argmax(dim=1)).sum()
    _check_finite(float(loss_sum), batch, step)
    _update(state)
    return StepResult(
        loss=float(loss_sum),
        num_correct=int(num_correct),
        num_images=len(image),
        lr=recipe.optimizer.lr * factor,
    )


def _update(state: TrainState) -> None:
    state.scaler.unscale_(state.optimizer)
    if state.recipe.optimizer.grad_clip_norm:
        nn.utils.clip_grad_norm_(state.model.parameters(), state.recipe.optimizer.grad_clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update_parameters(state.model)


def _check_finite(loss: float, batch: Batch, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} at step {step}",
            where=f"training images {', '.join(str(i) for i in batch.index[:8])}, ...",
            hint="lower --optimizer.lr, or lengthen the warm-up; the last checkpoint is from before",
        )

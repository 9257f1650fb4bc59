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
from mixlab.training.run_folder import NONFINITE_NAME
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
    """Forward, backward and update on one batch; NonFiniteError before the update if it would do harm."""
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
    if not math.isfinite(float(loss_sum)):
        raise NonFiniteError("loss", f"the loss became {float(loss_sum)} at step {step}")
    _update(state, step)
    return StepResult(
        loss=float(loss_sum),
        num_correct=int(num_correct),
        num_images=len(image),
        lr=recipe.optimizer.lr * factor,
    )


def _update(state: TrainState, step: int) -> None:
    """Clip and apply the gradients; NonFiniteError before anything changes if they are not finite."""
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not state.scaler.is_enabled() and not math.isfinite(float(norm)):  # a scaler skips these by itself
        raise NonFiniteError("gradient", f"the gradient's norm became {float(norm)} at step {step}")
    if state.recipe.optimizer.grad_clip_norm:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), state.recipe.optimizer.grad_clip_norm, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update_parameters(state.model)


class NonFiniteError(TrainingError):
    """The loss or the gradient of a batch is NaN or infinite; no weight has changed. what: `loss` or `gradient`."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(
            message,
            where=f"the batch's images are in {NONFINITE_NAME} of the run",
            hint="lower --optimizer.lr, or lengthen the warm-up; --skip-nonfinite N leaves out up to N such batches; "
            "the last checkpoint is from before",
        )
        self.what = what


def explain_out_of_memory(error: Exception, state: TrainState) -> TrainingError | None:
    """What to do about `error`, if it says that memory ran out."""
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
        word in text for word in words
    ):
        return None
    recipe = state.recipe
    parts = 2 * recipe.accumulate
    return TrainingError(
        f"memory ran out on {state.device} with batch_size {recipe.batch_size} in {recipe.accumulate} part(s)",
        where="batch_size",
        hint=f"--accumulate {parts} computes the same batch in {parts} parts; or make --batch-size smaller; "
        "--resume goes on from the last checkpoint",
    )

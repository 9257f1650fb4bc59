"""One optimizer step, and the state it works on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mixlab.data.loader import Batch
from mixlab.data.mixing import mix
from mixlab.data.random import torch_seed
from mixlab.errors import DataError, WeightsError
from mixlab.threads import num_sharing, shared
from mixlab.training.choose import engine_of, exchange_of
from mixlab.training.clock import Clock
from mixlab.training.distributed import ALONE, World
from mixlab.training.dtensors import distributed_like, full_tensor
from mixlab.training.engines import Engine
from mixlab.training.failures import NonFiniteError
from mixlab.training.objectives import Objective
from mixlab.training.optimizer import build_optimizer, check_keeps, state_keys
from mixlab.training.recipe import Recipe
from mixlab.training.sam import check_sam, sam_radius, sharp_backward
from mixlab.training.schedule import lr_factor


def warmed_ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """A moving average whose decay is min(decay, (1 + n) / (10 + n)) at update n, so that it forgets its start."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, num_averaged: Any) -> None:
        number = int(num_averaged)
        weight = 1 - min(decay, (1 + number) / (10 + number))
        num_pieces = min(num_sharing(), len(averaged))
        pieces = [slice(start, None, num_pieces) for start in range(num_pieces)]
        shared(lambda piece: torch._foreach_lerp_(averaged[piece], current[piece], weight), pieces)

    return update


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Mean loss of the batch, and how many of its images were classified as their larger target says."""

    loss: float
    num_correct: int
    num_images: int
    lr: float


class TrainState:
    """Everything that a step changes, and what it needs to know."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        objective: Objective,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.recipe, self.objective, self.device, self.world = recipe, objective, device, world
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.exchange = exchange_of(recipe, world)
        self.exchange.check(model, recipe)
        check_sam(recipe, self.exchange)
        self.ema: AveragedModel | None = None
        if recipe.ema_decay:
            self.ema = AveragedModel(model, multi_avg_fn=warmed_ema(recipe.ema_decay))
            self.exchange.place(self.ema.module, device)
        self.model = self.exchange.place(model, device)
        wide_dtype = torch.bfloat16 if recipe.precision == "bf16" else None
        self.optimizer = build_optimizer(self.model, recipe.optimizer, wide_dtype)
        self.exchange.attach(self.model, device)
        self.is_checked = False  # that the optimizer stores what it says (`check_keeps`)
        self.engine: Engine = engine_of(self.exchange, recipe, device, objective, self.scaler)

    @property
    def shards(self) -> range:
        """The shards of every batch that this process computes."""
        return self.world.share(self.exchange.num_shards)

    @property
    def eval_model(self) -> nn.Module:
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

    def like(self, name: str) -> Tensor:
        """The tensor of this state that one called `file.name` in `tensors` belongs to, or WeightsError."""
        file, _, inner = name.partition(".")
        try:
            if file == "optimizer":
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                number = inner.split(".")[0]
                found: Tensor = parameters[int(number) if number.isdecimal() else len(parameters)]
            elif file == "ema" and self.ema is not None:
                found = self.ema.state_dict()[inner]
            else:
                found = {"model": self.model.state_dict()}[file][inner]
        except (KeyError, IndexError, ValueError):
            raise WeightsError(f"{name} belongs to another model or recipe") from None
        return found

    def place(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for the tensor `name` of a checkpoint, on this rank its part. WeightsError if it fits nowhere."""
        return distributed_like(torch.zeros(size, dtype=dtype), self._fitting(name, size))

    def _fitting(self, name: str, size: torch.Size) -> Tensor:
        like = self.like(name)
        if size != like.shape and not (name.startswith("optimizer.") and size.numel() == 1):
            raise WeightsError(f"{name} has {tuple(size)} where {tuple(like.shape)} belongs")
        return like

    def check(self, found: dict[str, torch.Size], has_stepped: bool) -> None:
        """WeightsError if tensors of these names, `file.name`, and shapes are not all that this state consists of.

        has_stepped: the optimizer has taken a step, and so keeps something.
        """
        for name, size in found.items():
            self._fitting(name, size)
        own = {"model": self.model.state_dict()}
        if self.ema is not None:
            own["ema"] = self.ema.state_dict()
        needed = [f"{file}.{name}" for file, tensors in own.items() for name in tensors]
        kept: dict[int, set[str]] = {}
        for name in found:
            if name.startswith("optimizer."):
                kept.setdefault(int(name.split(".")[1]), set()).add(name.split(".", 2)[2])
        number = 0
        for group in self.optimizer.param_groups:
            keys = state_keys(self.recipe.optimizer, group)
            for _ in group["params"]:
                # One without a gradient so far has nothing; but not all of them, after a step.
                if number in kept or (has_stepped and keys and not kept):
                    needed += [f"optimizer.{number}.{key}" for key in sorted(keys)]
                number += 1
        if missing := [name for name in needed if name not in found]:
            raise WeightsError(f"it is incomplete: {missing[0]} is missing, one of {len(missing)}")
        if extra := sorted(found.keys() - set(needed)):
            raise WeightsError(f"{extra[0]} belongs to another recipe")

    def load(self, tensors: dict[str, dict[str, Tensor]], scaler: dict[str, Any]) -> None:
        """The inverse of `tensors`."""
        tensors = {
            file: {
                name: distributed_like(tensor, self.like(f"{file}.{name}")) for name, tensor in group.items()
            }
            for file, group in tensors.items()
        }
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


def train_step(state: TrainState, batch: Batch, clock: Clock) -> StepResult:
    """Forward, backward and update on one batch; NonFiniteError before the update if it would do harm.

    `batch` holds this process's shards of it; losses and gradients are those of the whole. Reads the clock's step and
    number of steps, and changes neither.
    """
    with state.engine.stepping():
        factor = lr_factor(clock.step, clock.num_steps, state.recipe.schedule)
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        rows = _gradient(state, batch, clock.step, factor)
        loss, num_correct, num_images = (sum(column) for column in state.world.sum_(rows).T.tolist())
        if not num_images:
            raise DataError(
                f"no example of step {clock.step} can be read any more",
                hint="was the data set moved or deleted during training?",
            )
        if not math.isfinite(loss):
            raise NonFiniteError("loss", f"the loss became {loss} at step {clock.step}")
        state.exchange.finish()
        _update(state, clock.step)
    lr = state.recipe.optimizer.lr * factor
    return StepResult(loss=loss, num_correct=int(num_correct), num_images=int(num_images), lr=lr)


def _gradient(state: TrainState, batch: Batch, step: int, factor: float) -> Tensor:
    """Leave the gradient of this process's shards; (shards, 3): their losses, correct answers and images.

    A row for each shard of the batch: a sum over ranks with zeros elsewhere is exact, in any order.
    """
    recipe, exchange = state.recipe, state.exchange
    state.optimizer.zero_grad(set_to_none=True)
    exchange.begin()
    rows = torch.zeros(exchange.num_shards, 3, dtype=torch.float64)
    sizes = batch.shard_sizes or (len(batch.inputs),)
    target = state.objective.targets(batch, state.device)
    parts = zip(batch.inputs.split(sizes), target.split(sizes), strict=True)
    radius, share_of = sam_radius(recipe, factor), batch.step_size or len(batch.inputs)
    for shard, (images, targets) in zip(state.shards, parts, strict=True):
        backward = partial(_backward, state, images, targets, step, shard, share_of=share_of)
        rows[shard] = sharp_backward(state.model, backward, radius, recipe.optimizer.gsam_alpha)
        exchange.end_shard()
    return rows


def _backward(
    state: TrainState, image: Tensor, target: Tensor, step: int, shard: int, share_of: int
) -> Tensor:
    """Add the gradient of one shard; its part of the batch's loss, its correct answers, its images.

    target: its rows of the objective's. share_of: number of images in the whole batch.
    """
    recipe, device, exchange = state.recipe, state.device, state.exchange
    num_images = len(image)
    if not num_images:  # every example of it went bad
        if not exchange.needs_blank:
            return torch.zeros(3, dtype=torch.float64)
        image, target = _blank(image, target)
    image = image.to(device, non_blocking=True)
    image, target = mix(image, target, recipe.augment, seed=recipe.seed, step=step, shard=shard)
    loss_sum = torch.zeros((), dtype=torch.float64 if image.dtype == torch.float64 else None, device=device)
    num_correct = torch.zeros((), dtype=torch.int64, device=device)
    num_parts = recipe.accumulate if exchange.needs_every_part else min(recipe.accumulate, len(image))
    for part in range(num_parts):
        images, targets = (all_.tensor_split(num_parts)[part] for all_ in (image, target))
        share = len(images) / share_of if num_images else 0.0
        if not len(images):
            images, targets = _blank(images, targets)
        # Stochastic depth and dropout draw from it.
        seed = torch_seed(recipe.seed, step, shard * recipe.accumulate + part)
        with exchange.part(is_last=part == num_parts - 1):
            loss, correct = state.engine.backward(images, targets, share, seed)
        loss_sum += loss
        num_correct += correct
    facts = torch.stack([loss_sum, num_correct.to(loss_sum.dtype)]).cpu().double().tolist()
    return torch.tensor([*facts, num_images], dtype=torch.float64)


def _blank(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One example and target of zeros, to be computed and to count for nothing."""
    return image.new_zeros(1, *image.shape[1:]), target.new_zeros(1, *target.shape[1:])


def _update(state: TrainState, step: int) -> None:
    """Clip and apply the gradients; NonFiniteError before anything changes if they are not finite."""
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norm = full_tensor(nn.utils.get_total_norm(gradients))
    if not state.scaler.is_enabled() and not math.isfinite(float(norm)):  # a scaler skips these by itself
        raise NonFiniteError("gradient", f"the gradient's norm became {float(norm)} at step {step}")
    if state.recipe.optimizer.grad_clip_norm:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), state.recipe.optimizer.grad_clip_norm, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if not state.is_checked:  # once: after the first update that was not left out
        state.is_checked = check_keeps(state.optimizer, state.recipe.optimizer)
    if state.ema is not None:
        state.ema.update_parameters(state.model)

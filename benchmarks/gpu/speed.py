"""Speeds on the device: sides that take turns, a batch size each, beside a large product in the same turns."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlab.bench.backends import NUM_CLASSES, build_model, timm_twin
from mixlab.cpu.cost import count_macs
from mixlab.data.loader import Batch
from mixlab.device import pick_device, synchronize
from mixlab.errors import is_out_of_memory
from mixlab.training.clock import Clock
from mixlab.training.objectives.labels import Labels
from mixlab.training.recipe import Recipe
from mixlab.training.step import TrainState, train_step

GROWTH = 1.03  # a larger batch must give this much more speed
PRODUCT_SIDE, ROUNDS, TURN_SECONDS, LARGEST = 8192, 7, 0.25, 4096
Write = Callable[[dict[str, Any]], None]


@dataclass
class Side:
    """One of those who take turns.

    make: a batch size to a callable that computes one such batch. flops: of one image, of all that is computed.
    """

    name: str
    make: Callable[[int], Callable[[], Any]]
    flops: float
    batch_size: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    call: Callable[[], Any] = print
    count: int = 1  # calls in a turn


@dataclass(frozen=True)
class Size:
    """How large everything is: real, or tiny for a rehearsal."""

    rehearse: bool

    @property
    def device(self) -> torch.device:
        return pick_device("cpu" if self.rehearse else "cuda")

    @property
    def rounds(self) -> int:
        return 2 if self.rehearse else ROUNDS

    @property
    def turn_seconds(self) -> float:
        return 0.002 if self.rehearse else TURN_SECONDS

    @property
    def largest(self) -> int:
        return 4 if self.rehearse else LARGEST

    @property
    def product_side(self) -> int:
        return 128 if self.rehearse else PRODUCT_SIDE


def seconds_of(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Mean seconds of one call of `count`, by the device's own clock where it has one."""
    if device.type != "cuda":
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(device)
        return (time.perf_counter() - began) / count
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / count


def free_memory() -> None:
    """Give back what tensors that are no more have left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find_batch_size(side: Side, device: torch.device, largest: int, end: float) -> dict[int, float]:
    """Images a second by batch size, doubled until that grows no more or memory is out; sets the side's."""
    speeds: dict[int, float] = {}
    size = min(8, largest)
    while size <= largest and time.monotonic() < end:
        call = None
        try:
            call = side.make(size)
            seconds_of(call, 2, device)  # warm
            once = seconds_of(call, 1, device)
            speeds[size] = size / min(
                seconds_of(call, max(min(round(0.05 / once), 20), 2), device) for _ in range(2)
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            side.facts["out_of_memory_at"] = size
            break
        finally:
            del call
            free_memory()
        if size // 2 in speeds and speeds[size] < GROWTH * speeds[size // 2] and size >= 64:
            break
        size *= 2
    if not speeds:
        raise RuntimeError(f"{side.name}: not even {size} images fit in memory, or there was no time")
    side.batch_size = next(size for size, speed in speeds.items() if GROWTH * speed >= max(speeds.values()))
    return speeds


def product(size: Size) -> Side:
    """A product of two square matrices of random bf16 numbers."""
    side = size.product_side
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=size.device).unbind()
    out = torch.empty_like(a)

    def make(_: int) -> Callable[[], Any]:
        return lambda: torch.mm(a, b, out=out)

    return Side(f"product {side}^3", make, 2.0 * side**3, batch_size=1)


def take_turns(group: str, sides: Sequence[Side], size: Size, write: Write) -> None:
    """A row for each side, and how many times faster the first one is than each other, round by round."""
    device = size.device
    sides = [*sides, product(size)]
    for side in sides:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        side.call = side.make(side.batch_size)
        seconds_of(side.call, 2, device)
        side.facts["first_calls_seconds"] = round(time.perf_counter() - began, 2)
        if device.type == "cuda":
            side.facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        once = seconds_of(side.call, 2, device)
        side.count = max(min(round(size.turn_seconds / once), 200), 1)
    turns: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(size.rounds):
        for side in sides:
            turns[side.name].append(seconds_of(side.call, side.count, device))
    rates = {
        side.name: [side.flops * side.batch_size / seconds for seconds in turns[side.name]] for side in sides
    }
    best = rates[sides[-1].name]
    for side in sides:
        seconds = turns[side.name]
        shares = [rate / peak for rate, peak in zip(rates[side.name], best, strict=True)]
        speeds = [side.batch_size / one for one in seconds]
        write(
            {"group": group, "side": side.name, "batch_size": side.batch_size, "rounds": size.rounds}
            | {"images_per_second": statistics.median(speeds), "range": [min(speeds), max(speeds)]}
            | {"ms_per_batch": 1000 * statistics.median(seconds), "gflops_per_image": side.flops / 1e9}
            | {
                "tflops": statistics.median(rates[side.name]) / 1e12,
                "share_of_product": statistics.median(shares),
            }
            | side.facts
        )
    first = sides[0]
    for other in sides[1:-1]:
        ratios = [
            (first.batch_size / a) / (other.batch_size / b)
            for a, b in zip(turns[first.name], turns[other.name], strict=True)
        ]
        write(
            {"group": group, "ratio": [first.name, other.name], "median": statistics.median(ratios)}
            | {"range": [min(ratios), max(ratios)]}
        )
    for side in sides:
        side.call = print
    free_memory()


def _model(name: str, image_size: int, device: torch.device) -> nn.Module:
    """With random weights, made on the device: a large one takes long to draw on a CPU."""
    with torch.device(device):
        return build_model(name, (image_size, image_size))


def _images(size: Size, model: nn.Module, count: int, image_size: int, dtype: torch.dtype) -> Tensor:
    images = torch.randn(count, 3, image_size, image_size, device=size.device, dtype=dtype)
    is_convolutional = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    return images.to(memory_format=torch.channels_last) if is_convolutional else images


def inference_side(name: str, model: nn.Module, image_size: int, size: Size) -> Side:
    """Eager inference; weights, images and activations bf16."""
    flops = 2.0 * count_macs(model, (image_size, image_size))
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    if any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts = {"image_size": image_size, "dtype": "bf16"}
    return Side(name, _inference(model, model, image_size, size), flops, facts=facts)


def _inference(
    forward: Any, model: nn.Module, image_size: int, size: Size
) -> Callable[[int], Callable[[], Any]]:
    def make(count: int) -> Callable[[], Any]:
        images = _images(size, model, count, image_size, torch.bfloat16)

        def call() -> None:
            with torch.inference_mode():
                forward(images)

        return call

    return make


# name of the group: sides (our name or timm's, image size), the first one compared with each other
GROUPS: dict[str, tuple[tuple[str, int], ...]] = {
    "B/16": (("mixer_b16", 224), ("timm/vit_base_patch16_224", 224), ("timm's mixer_b16", 224)),
    "S/16": (("mixer_s16", 224), ("timm/vit_small_patch16_224", 224), ("timm/resnet50", 224)),
    "L/16": (("mixer_l16", 224), ("timm/vit_large_patch16_224", 224)),
    "H/14": (("mixer_h14", 224), ("timm/vit_huge_patch14_224", 224)),
    "L/16, fine-tuning": (("mixer_l16", 448), ("timm/vit_large_patch16_224", 512)),
    "H/14, fine-tuning": (("mixer_h14", 448), ("timm/vit_huge_patch14_224", 518)),
}
TINY = (("mixer_micro4", 32), ("timm/baseline_vit_micro", 32), ("timm's mixer_micro4", 32))
TINY_GROUPS = {
    "tiny": TINY,
    "tiny, with convolutions": (("mixer_micro4", 64), ("timm/baseline_resnet_micro", 64)),
}


def _sides(
    members: Sequence[tuple[str, int]], size: Size, make: Callable[..., Side], write: Write, end: float
) -> list[Side]:
    """Sides with their batch sizes; those that cannot be made are told and left out."""
    sides: list[Side] = []
    for name, image_size in members:
        try:
            if name.startswith("timm's "):
                model = _twin(name, image_size, size, write)
            else:
                model = _model(name, image_size, size.device)
            side = make(name, model, image_size, size)
            speeds = find_batch_size(side, size.device, size.largest, end)
            side.facts["tried"] = {str(count): round(speed, 1) for count, speed in speeds.items()}
            sides.append(side)
        except Exception as error:
            write(
                {"side": name, "image_size": image_size, "failed": f"{type(error).__name__}: {error}"[:500]}
            )
            free_memory()
    return sides


def _twin(name: str, image_size: int, size: Size, write: Write) -> nn.Module:
    """timm's own model with the same weights; |ours - theirs| / |ours| of the float32 logits is written."""
    ours = _model(name.removeprefix("timm's "), image_size, size.device)
    theirs = timm_twin(ours).to(size.device)
    images = _images(size, ours, 2, image_size, torch.float32)
    with torch.inference_mode():
        a, b = ours.eval()(images).double(), theirs.eval()(images).double()
    write({"side": name, "relative_difference_of_logits": float((a - b).norm() / a.norm())})
    return theirs


def inference(write: Write, *, rehearse: bool, end: float) -> None:
    """Eager bf16 inference of all groups, as long as there is time."""
    size = Size(rehearse)
    for group, members in (TINY_GROUPS if rehearse else GROUPS).items():
        sides = _sides(members, size, inference_side, write, end)
        if sides:
            take_turns(group, sides, size, write)
        del sides
        free_memory()
        if time.monotonic() > end - 5:
            write({"group": group, "note": "there was no time for the groups after this one"})
            return


def compiled(write: Write, *, rehearse: bool, end: float) -> None:
    """Compiled bf16 inference: the Mixer beside the ViT, then beside timm's, at the sizes that eager ones like."""
    size = Size(rehearse)
    members = TINY if rehearse else GROUPS["B/16"]
    sides: list[Side] = []
    for other, side_of in members:
        is_twin = other.startswith("timm's ")
        own = _twin(other, side_of, size, write) if is_twin else _model(other, side_of, size.device)
        side = inference_side(other, own, side_of, size)
        find_batch_size(side, size.device, size.largest, end)
        # A rehearsal leaves out the compiler of C++, which takes a minute.
        forward = torch.compile(own, dynamic=False, backend="aot_eager" if size.rehearse else "inductor")
        side.make = _inference(forward, own, side_of, size)
        side.facts["compiled"] = True
        sides.append(side)
        if len(sides) > 1:
            take_turns(f"B/16 compiled, beside {other}", [sides[0], side], size, write)


def training_side(name: str, model: nn.Module, image_size: int, size: Size) -> Side:
    """A step: forward in bf16 by autocast, backward, AdamW on float32 weights. Three times the forward's products."""
    flops = 6.0 * count_macs(model, (image_size, image_size))
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def make(count: int) -> Callable[[], Any]:
        images = _images(size, model, count, image_size, torch.float32)
        labels = torch.arange(count, device=size.device) % NUM_CLASSES

        def call() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(size.device.type, dtype=torch.bfloat16):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        return call

    return Side(
        name, make, flops, facts={"image_size": image_size, "dtype": "bf16 (autocast)", "mode": "training"}
    )


def own_step_side(name: str, image_size: int, size: Size) -> Side:
    """The same step as `mixlab train` takes it, from a batch in the CPU's memory to a loss that a person may read."""
    model = _model(name, image_size, size.device)
    flops = 6.0 * count_macs(model, (image_size, image_size))
    recipe = Recipe(precision="bf16", steps=1_000_000, fast=False)
    state = TrainState(model.train(), recipe, Labels(recipe.loss, None, NUM_CLASSES), size.device)
    steps = iter(range(1_000_000))

    def make(count: int) -> Callable[[], Any]:
        batch = Batch(
            torch.randn(count, 3, image_size, image_size), torch.arange(count) % NUM_CLASSES, np.arange(count)
        )

        def call() -> None:
            result = train_step(state, batch, Clock(1_000_000, step=next(steps)))
            assert math.isfinite(result.loss)

        return call

    return Side(
        f"{name}, mixlab's train_step", make, flops, facts={"image_size": image_size, "mode": "training"}
    )


def training(write: Write, *, rehearse: bool, end: float) -> None:
    """Eager training steps of the Mixer, timm's Mixer and the ViT, and of mixlab's own loop."""
    size = Size(rehearse)
    (name, image_size), vit, twin = TINY if rehearse else GROUPS["B/16"]
    sides = _sides(((name, image_size), twin, vit), size, training_side, write, end)
    if sides and sides[0].name == name:
        own = own_step_side(name, image_size, size)
        own.batch_size = sides[0].batch_size
        sides.append(own)
    if sides:
        take_turns("B/16, training", sides, size, write)

"""Time and memory against the number of patches and against the width, for Mixer, ViT and ResNet.

The paper's claim (section 2) is that a Mixer's cost is linear in the number of patches, where attention's is
quadratic. All three are run by torch as they stand (and the Mixer by its fast copy too), each point in a process of
its own.
"""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from mixlab.cpu.inference import fast
from mixlab.device import current_memory_bytes, peak_memory_bytes
from mixlab.errors import MixlabError
from mixlab.models.catalog import create_model

FAMILIES = ("mixer", "mixer, fast copy", "vit", "resnet")
PATCHES = (49, 196, 784, 3136)  # of 16 pixels: images of 112 to 896
WIDTHS = (128, 256, 512, 1024)
BLOCKS, PATCH_SIZE, USUAL_PATCHES, USUAL_WIDTH = 8, 16, 196, 512
BATCH_SIZE, REPEATS = 2, 5


def build(family: str, patches: int, width: int) -> nn.Module:
    """A Mixer-S/16 or ViT of 8 blocks, or a ResNet-26 that is `width` channels wide before its last expansion."""
    import timm

    side = math.isqrt(patches) * PATCH_SIZE
    if family.startswith("mixer"):
        return create_model("mixer_s16", image_size=side, hidden_dim=width, channel_mlp_dim=4 * width)
    if family == "vit":
        model: nn.Module = timm.create_model(
            "vit_small_patch16_224",
            img_size=side,
            embed_dim=width,
            num_heads=max(width // 64, 1),
            depth=BLOCKS,
        )
        return model
    channels = tuple(width // divisor for divisor in (8, 4, 2, 1))
    network: nn.Module = timm.create_model("resnet26", channels=channels)
    return network


def _measure(
    connection: Connection, family: str, patches: int, width: int, threads: int, train: bool
) -> None:
    try:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        model = build(family, patches, width).train(train)
        side = math.isqrt(patches) * PATCH_SIZE
        image = torch.randn(BATCH_SIZE, 3, side, side)
        call = fast(model) if family == "mixer, fast copy" and not train else model
        before, seconds = current_memory_bytes(), []
        with torch.set_grad_enabled(train):
            for _ in range(REPEATS + 1):
                began = time.perf_counter()
                output = call(image)
                if train:
                    output.square().mean().backward()
                    model.zero_grad(set_to_none=True)
                seconds.append(time.perf_counter() - began)
        memory = max(peak_memory_bytes() - before, 0)
        connection.send((statistics.median(seconds[1:]) / BATCH_SIZE, memory / BATCH_SIZE))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}"[:300])


def scale(
    *, threads: int, train: bool = False, say: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """A row for each point: seconds an image, and memory an image takes beyond the model."""
    context = multiprocessing.get_context("spawn")
    rows = []
    points = [("patches", patches, USUAL_WIDTH) for patches in PATCHES]
    points += [("width", USUAL_PATCHES, width) for width in WIDTHS]
    families = [family for family in FAMILIES if not (train and family == "mixer, fast copy")]
    for axis, patches, width in points:
        for family in families:
            say(f"{family}, {patches} patches, {width} channels")
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_measure, args=(theirs, family, patches, width, threads, train), daemon=True
            )
            process.start()
            theirs.close()
            try:
                found = ours.recv()
            except EOFError:
                found = "its process ended; was there enough memory?"
            process.join()
            if isinstance(found, str):
                raise MixlabError(found, where=f"{family}, {patches} patches, {width} channels")
            rows.append(
                {
                    "family": family, "axis": axis, "patches": patches, "width": width,
                    "mode": "train" if train else "inference", "batch_size": BATCH_SIZE,
                    "seconds_per_image": found[0], "bytes_per_image": found[1],
                }
            )  # fmt: skip
    return rows


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each family and axis the power with which time and memory grow between its last two points."""
    found = []
    for axis in ("patches", "width"):
        for family in dict.fromkeys(row["family"] for row in rows):
            *_, before, last = [row for row in rows if row["family"] == family and row["axis"] == axis]
            steps = math.log(last[axis] / before[axis])
            powers = {
                name: math.log(max(last[key], 1e-9) / max(before[key], 1e-9)) / steps
                for name, key in (("time", "seconds_per_image"), ("memory", "bytes_per_image"))
            }
            found.append({"family": family, "axis": axis} | powers)
    return found

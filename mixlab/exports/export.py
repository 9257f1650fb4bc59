"""A model for other runtimes, with its preprocessing and class names inside: `mixlab export`.

The graph takes uint8 pixels at model size, (batch, height, width, channels), and gives logits. What is written is
opened again in its own runtime and compared with the model on real pictures before it gets its name.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mixlab.checkpoint.store import Weights
from mixlab.data.preprocess import Preprocess
from mixlab.errors import MixlabError, UsageError
from mixlab.escape import without_places
from mixlab.exports.graph import PictureModel, PixelModel, Scale
from mixlab.exports.runtimes import OPENERS, WRITERS, Free, Runner
from mixlab.files import write_atomically, written_whole
from mixlab.models.catalog import display_name
from mixlab.version import __version__

INPUT, PICTURE = "pixels", "picture"
BATCHES = (1, 3, 64)
TOLERANCE = 1e-4  # largest difference of a logit, as a share of the largest logit where that is above 1
PIXEL_TOLERANCE, AGREEMENT = 2, 0.99  # of a graph that scales the pictures too
ENDINGS = {"onnx": ".onnx", "openvino": "_openvino", "torch-export": ".pt2"}


def export(
    weights: Weights,
    destination: Path,
    *,
    to: str,
    pictures: Sequence[np.ndarray],
    batch: int | None = None,
    resize_in_graph: bool = False,
) -> dict[str, Any]:
    """Write `weights` for another runtime to `destination`; what `mixlab export --json` prints.

    to: a key of ENDINGS; for OpenVINO, whose models are two files, `destination` is a folder. pictures: real ones,
    uint8 (height, width, 3) of any size, on which the result is compared. batch: a fixed number of pictures, None for
    any. resize_in_graph: one picture of any size goes in, and is cropped and scaled inside.
    The result is kept beside it too, as DESTINATION.json. MixlabError, and no file, if what was written computes
    something else.
    """
    if to not in ENDINGS:
        raise UsageError(f"there is no target {to!r}", where="--to", hint=f"one of {', '.join(ENDINGS)}")
    if destination.exists():
        raise UsageError("it exists already", where=str(destination), hint="choose another name")
    if batch is not None and (batch < 1 or resize_in_graph):
        what = "a graph that scales takes one picture" if resize_in_graph else "it must be at least 1"
        raise UsageError(what, where="--batch", hint="leave --batch out")
    if not pictures:
        raise UsageError("there is no picture to compare on", where="--pictures")
    model, preprocess = weights.model.cpu().eval(), weights.preprocess
    (height, width), channels = preprocess.image_size, preprocess.channels
    free: Free = {}
    if resize_in_graph:
        graph: nn.Module = PictureModel(model, preprocess).eval()
        example = torch.zeros(height + 3, width + 5, 3, dtype=torch.uint8)
        free = {axis: torch.export.Dim(name, min=2) for axis, name in enumerate(("height", "width"))}
    else:
        graph = PixelModel(model, preprocess).eval()
        example = torch.zeros(batch or 2, height, width, channels, dtype=torch.uint8)
        free = {} if batch else {0: torch.export.Dim("batch")}
    name = PICTURE if resize_in_graph else INPUT
    about = description(weights, resize_in_graph)
    with written_whole(destination) as temporary:
        WRITERS[to](graph, example, temporary, name, free, json.dumps(about))
        runner = open_exported(temporary, to)
        if resize_in_graph:
            result = _compare_pictures(weights, runner, pictures)
        else:
            pixels = np.stack([preprocess.pixels(picture).transpose(1, 2, 0) for picture in pictures])
            result = compare_pixels(graph, runner, pixels, BATCHES if batch is None else (batch,))
        files = [temporary] if temporary.is_file() else list(temporary.iterdir())
        result["num_bytes"] = sum(file.stat().st_size for file in files)
        result = {"destination": str(destination), "to": to, "batch": batch, "input": name} | result
        keep_record(result)
    return result


def keep_record(result: dict[str, Any]) -> None:
    """What was compared and found, as DESTINATION.json beside what was written."""
    destination = Path(result["destination"])
    path = destination.with_name(f"{destination.name}.json")
    write_atomically(path, (json.dumps(without_places(result), indent=2) + "\n").encode())


def description(weights: Weights, resize_in_graph: bool = False) -> dict[str, Any]:
    """What travels inside an exported model, as JSON under the key `mixlab`."""
    return {
        "format_version": 1,
        "model": display_name(weights.model_settings["name"]),
        "input": PICTURE if resize_in_graph else INPUT,
        "class_names": list(weights.class_names),
        "preprocess": weights.preprocess.to_json(),
        "provenance": without_places(weights.provenance),
        "written_by": f"mixlab {__version__}",
    }


def compare_pixels(
    graph: nn.Module, runner: Runner, pixels: np.ndarray, batches: Sequence[int]
) -> dict[str, Any]:
    """Both on `pixels` uint8 (n, height, width, channels), in batches of each size. MixlabError if they differ."""
    largest, difference, same, num_compared = 0.0, 0.0, 0, 0
    for batch in batches:
        count = -(-len(pixels) // batch) * batch if batch <= len(pixels) else batch
        taken = np.resize(pixels, (count, *pixels.shape[1:]))  # pictures come again where a batch wants more
        for start in range(0, count if batch > 1 else min(count, 8), batch):
            part = taken[start : start + batch]
            with torch.inference_mode():
                expected = graph(torch.from_numpy(part)).numpy()
            found = runner(part)
            largest = max(largest, float(np.abs(expected).max()))
            difference = max(difference, float(np.abs(found - expected).max()))
            same += int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
            num_compared += batch
    result = {
        "num_pictures": len(pixels), "batches": list(batches), "num_compared": num_compared, "same_top1": same,
        "max_difference": difference, "largest_logit": largest,
    }  # fmt: skip
    if not difference <= TOLERANCE * max(largest, 1.0) or same < num_compared:
        raise MixlabError(
            f"what was written computes something else: logits differ by {difference:.2g} (the largest is "
            f"{largest:.2g}), {same} of {num_compared} have the same top-1",
            hint="nothing was kept; another version of the runtime may do better",
        )
    return result


def _compare_pictures(weights: Weights, runner: Runner, pictures: Sequence[np.ndarray]) -> dict[str, Any]:
    """A graph that scales, against the model on what `Preprocess` makes of the pictures."""
    preprocess = weights.preprocess
    graph, scale = PixelModel(weights.model, preprocess).eval(), Scale(preprocess)
    worst, same, largest, difference = 0, 0, 0.0, 0.0
    for picture in pictures:
        pixels = preprocess.pixels(picture).transpose(1, 2, 0)
        with torch.inference_mode():
            ours = scale(torch.from_numpy(np.ascontiguousarray(_rgb(picture)))).numpy()
            expected = graph(torch.from_numpy(pixels[None].copy())).numpy()
        worst = max(worst, int(np.abs(ours - pixels).max()))
        found = runner(_rgb(picture))
        same += int(found.argmax() == expected.argmax())
        largest = max(largest, float(np.abs(expected).max()))
        difference = max(difference, float(np.abs(found - expected).max()))
    agreement = same / len(pictures)
    result = {
        "num_pictures": len(pictures), "same_top1": same, "agreement": agreement, "max_pixel_difference": worst,
        "max_difference": difference, "largest_logit": largest,
    }  # fmt: skip
    if worst > PIXEL_TOLERANCE or agreement < AGREEMENT:
        raise MixlabError(
            f"scaling inside the graph gives other pixels (by {worst} of 255 at most) or other answers "
            f"({same} of {len(pictures)} the same)",
            hint="nothing was kept; leave --resize-in-graph out and scale with the reader",
        )
    return result


def _rgb(picture: np.ndarray) -> np.ndarray:
    return picture if picture.shape[2] == 3 else np.repeat(picture, 3, axis=2)


def open_exported(path: Path, to: str) -> Runner:
    """What was written, in its own runtime: an array of pixels in, logits out."""
    return OPENERS[to](path)


def sample_pictures(count: int, preprocess: Preprocess) -> list[np.ndarray]:
    """Parts of the two photos that come with scikit-learn, at random places and sizes: (height, width, 3) each."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    draws, pictures = np.random.default_rng(0), []
    for number in range(count):
        photo = photos[number % len(photos)]
        smallest = min(*photo.shape[:2], 2 * max(preprocess.image_size))
        height, width = (int(draws.integers(min(smallest, 16), side + 1)) for side in photo.shape[:2])
        top, left = (
            int(draws.integers(0, s - part + 1))
            for s, part in zip(photo.shape, (height, width), strict=False)
        )
        pictures.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return pictures

"""A model for other runtimes, with its preprocessing and class names inside: `mixlab export`.

The graph takes examples as memory keeps them, such as uint8 pixels at model size (batch, height, width, channels),
and gives logits. What is written is opened again in its own runtime and compared with the model on real examples
before it gets its name.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mixlab.checkpoint.store import Weights
from mixlab.data.images.preprocess import ImagePreprocess, for_images
from mixlab.errors import MixlabError, UsageError
from mixlab.escape import without_places
from mixlab.exports.graph import ImageModel, PixelModel, Scale, graph_of
from mixlab.exports.runtimes import OPENERS, WRITERS, Free, Runner
from mixlab.files import write_atomically, written_whole
from mixlab.models.catalog import display_name
from mixlab.version import __version__

ANY_SIZE = "picture"  # the input of a graph that scales
BATCHES = (1, 3, 64)
TOLERANCE = 1e-4  # largest difference of a logit, as a share of the largest logit where that is above 1
PIXEL_TOLERANCE, AGREEMENT = 2, 0.99  # of a graph that scales the images too
ENDINGS = {"onnx": ".onnx", "openvino": "_openvino", "torch-export": ".pt2"}


def export(
    weights: Weights,
    destination: Path,
    *,
    to: str,
    examples: Sequence[np.ndarray],
    batch: int | None = None,
    resize_in_graph: bool = False,
) -> dict[str, Any]:
    """Write `weights` for another runtime to `destination`; what `mixlab export --json` prints.

    to: a key of ENDINGS; for OpenVINO, whose models are two files, `destination` is a folder. examples: real ones,
    decoded, such as uint8 (height, width, 3) of any size, on which the result is compared. batch: a fixed number of
    them, None for any. resize_in_graph: one image of any size goes in, and is cropped and scaled inside.
    The result is kept beside it too, as DESTINATION.json. MixlabError, and no file, if what was written computes
    something else.
    """
    if to not in ENDINGS:
        raise UsageError(f"there is no target {to!r}", where="--to", hint=f"one of {', '.join(ENDINGS)}")
    if destination.exists():
        raise UsageError("it exists already", where=str(destination), hint="choose another name")
    if batch is not None and (batch < 1 or resize_in_graph):
        what = "a graph that scales takes one image" if resize_in_graph else "it must be at least 1"
        raise UsageError(what, where="--batch", hint="leave --batch out")
    if not examples:
        raise UsageError("there is nothing to compare on", where="--pictures")
    model, preprocess = weights.model.cpu().eval(), weights.preprocess
    free: Free = {}
    if resize_in_graph:
        own = for_images(preprocess, "scaling in the graph", "--resize-in-graph")
        graph: nn.Module = ImageModel(model, own).eval()
        height, width = own.image_size
        example = torch.zeros(height + 3, width + 5, 3, dtype=torch.uint8)
        free = {axis: torch.export.Dim(name, min=2) for axis, name in enumerate(("height", "width"))}
    else:
        graph = graph_of(model, preprocess).eval()
        kept = np.zeros((batch or 2, *preprocess.kept_shape), dtype=preprocess.kept_dtype)
        example = torch.from_numpy(preprocess.to_graph(kept))
        free = {} if batch else {0: torch.export.Dim("batch")}
    about = description(weights, resize_in_graph)
    name = str(about["input"])
    with written_whole(destination) as temporary:
        WRITERS[to](graph, example, temporary, name, free, json.dumps(about))
        runner = open_exported(temporary, to)
        if resize_in_graph:
            result = _compare_any_size(weights.model, own, runner, examples)
        else:
            taken = preprocess.to_graph(np.stack([preprocess.keep(one) for one in examples]))
            result = compare_kept(graph, runner, taken, BATCHES if batch is None else (batch,))
        files = [temporary] if temporary.is_file() else list(temporary.iterdir())
        result["num_bytes"] = sum(file.stat().st_size for file in files)
        own_facts = {"destination": str(destination), "to": to, "batch": batch, "input": name}
        result = own_facts | {"modality": preprocess.modality_name} | result
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
        "input": ANY_SIZE if resize_in_graph else weights.preprocess.graph_input,
        "class_names": list(weights.class_names),
        "preprocess": weights.preprocess.to_json(),
        "temperature": weights.temperature,
        "provenance": without_places(weights.provenance),
        "written_by": f"mixlab {__version__}",
    }


def compare_kept(
    graph: nn.Module, runner: Runner, kept: np.ndarray, batches: Sequence[int]
) -> dict[str, Any]:
    """Both on `kept` (n, ...), as the graph takes examples, in batches of each size. MixlabError if they differ."""
    largest, difference, same, num_compared = 0.0, 0.0, 0, 0
    for batch in batches:
        count = -(-len(kept) // batch) * batch if batch <= len(kept) else batch
        taken = np.resize(kept, (count, *kept.shape[1:]))  # they come again where a batch wants more
        for start in range(0, count if batch > 1 else min(count, 8), batch):
            part = taken[start : start + batch]
            with torch.inference_mode():
                expected = graph(torch.from_numpy(part)).numpy()
            found = runner(part)
            largest = max(largest, float(np.abs(expected).max()))
            difference = float(
                np.maximum(difference, np.abs(found - expected).max())
            )  # keeps what is no number
            same += int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
            num_compared += batch
    result = {
        "num_pictures": len(kept), "batches": list(batches), "num_compared": num_compared, "same_top1": same,
        "max_difference": difference, "largest_logit": largest,
    }  # fmt: skip
    if not difference <= TOLERANCE * max(largest, 1.0) or same < num_compared:
        raise MixlabError(
            f"what was written computes something else: logits differ by {difference:.2g} (the largest is "
            f"{largest:.2g}), {same} of {num_compared} have the same top-1",
            hint="nothing was kept; another version of the runtime may do better",
        )
    return result


def _compare_any_size(
    model: nn.Module, preprocess: ImagePreprocess, runner: Runner, images: Sequence[np.ndarray]
) -> dict[str, Any]:
    """A graph that scales, against the model on what `preprocess` makes of the images."""
    graph, scale = PixelModel(model, preprocess).eval(), Scale(preprocess)
    worst, same, largest, difference = 0, 0, 0.0, 0.0
    for image in images:
        pixels = preprocess.keep(image).transpose(1, 2, 0)
        with torch.inference_mode():
            ours = scale(torch.from_numpy(np.ascontiguousarray(_rgb(image)))).numpy()
            expected = graph(torch.from_numpy(pixels[None].copy())).numpy()
        worst = max(worst, int(np.abs(ours - pixels).max()))
        found = runner(_rgb(image))
        same += int(found.argmax() == expected.argmax())
        largest = max(largest, float(np.abs(expected).max()))
        difference = max(difference, float(np.abs(found - expected).max()))
    agreement = same / len(images)
    result = {
        "num_pictures": len(images), "same_top1": same, "agreement": agreement, "max_pixel_difference": worst,
        "max_difference": difference, "largest_logit": largest,
    }  # fmt: skip
    if worst > PIXEL_TOLERANCE or agreement < AGREEMENT:
        raise MixlabError(
            f"scaling inside the graph gives other pixels (by {worst} of 255 at most) or other answers "
            f"({same} of {len(images)} the same)",
            hint="nothing was kept; leave --resize-in-graph out and scale with the reader",
        )
    return result


def _rgb(image: np.ndarray) -> np.ndarray:
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def open_exported(path: Path, to: str) -> Runner:
    """What was written, in its own runtime: an array of examples in, logits out."""
    return OPENERS[to](path)

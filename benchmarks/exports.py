"""Exports against the model that they come from: targets x models x batches, on real images.

    python -m benchmarks.exports [--targets onnx openvino torch-export] [--models mixer_s16 ...] [--scaled 1000]

Models: the shipped weights, and sizes whose weights are drawn here, heads too. Images: parts of scikit-learn's two
photos. Each graph takes any number of images; a row is of one number. A second table is of the graphs that scale
images of any size themselves (`--resize-in-graph`), on `--scaled` images. Prints both; minutes.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.images.samples import sample_images
from mixlab.errors import MixlabError
from mixlab.exports.export import BATCHES, ENDINGS, compare_kept, export, open_exported
from mixlab.exports.graph import PixelModel
from mixlab.models.catalog import create_model, display_name, settings_of
from mixlab.models.mixer import Mixer

SHIPPED = ("mixer_cifar:cifar10", "mixer_pyramid_cifar:cifar10")
# Name -> height and width in pixels.
DRAWN = {
    "mixer_s32": (224, 224), "mixer_s16": (224, 224), "mixer_b32": (224, 224), "mixer_b16": (224, 224),
    "mixer_s16 160 x 288": (160, 288),
}  # fmt: skip
NUM_PICTURES = 64


def weights_of(model: str) -> Weights:
    """Those that ship, or a size at initialisation, but for its head, which would be zero."""
    if model in SHIPPED:
        return open_weights(model)
    size = DRAWN[model]
    torch.manual_seed(0)
    network = create_model(model.split()[0], num_classes=1000, image_size=size).eval()
    assert isinstance(network, Mixer)
    torch.nn.init.normal_(network.head.weight, std=0.05)
    return Weights(
        model=network,
        model_settings=settings_of(network.config),
        preprocess=ImagePreprocess(image_size=size),
        class_names=tuple(map(str, range(1000))),
        provenance={},
    )


def show(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def compare(weights: Weights, to: str, path: Path) -> list[dict[str, Any]]:
    """One graph for all batches, written and compared; what `compare_kept` says of each batch."""
    pictures = sample_images(NUM_PICTURES, weights.preprocess.input_size)
    export(weights, path, to=to, examples=pictures[:1])
    runner, graph = open_exported(path, to), PixelModel(weights.model, weights.preprocess).eval()
    pixels = np.stack([weights.preprocess.keep(picture).transpose(1, 2, 0) for picture in pictures])
    return [compare_kept(graph, runner, pixels, (batch,)) for batch in BATCHES]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=ENDINGS, default=list(ENDINGS))
    parser.add_argument("--models", nargs="+", choices=(*SHIPPED, *DRAWN), default=[*SHIPPED, *DRAWN])
    parser.add_argument(
        "--scaled", type=int, default=1000, help="images of the second table; 0: leave it out"
    )
    options = parser.parse_args(arguments)
    show("model", "pixels", "target", "batch", "largest difference", "largest logit", "same top-1")
    show(*["---"] * 7)
    for model in options.models:
        weights = weights_of(model)
        name = display_name(weights.model_settings["name"])
        pixels = " x ".join(map(str, weights.preprocess.image_size))
        for to in options.targets:
            with tempfile.TemporaryDirectory() as folder:
                for found in compare(weights, to, Path(folder) / "model"):
                    show(
                        name,
                        pixels,
                        to,
                        found["batches"][0],
                        f"{found['max_difference']:.1e}",
                        f"{found['largest_logit']:.1f}",
                        f"{found['same_top1']} of {found['num_compared']}",
                    )
    if not options.scaled:
        return
    print()
    show("model", "target", "pictures", "largest difference of a pixel", "same top-1")
    show(*["---"] * 5)
    for model in filter(SHIPPED.__contains__, options.models):
        weights = weights_of(model)
        pictures = sample_images(options.scaled, weights.preprocess.input_size)
        for to in options.targets:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = export(
                        weights, Path(folder) / "model", to=to, examples=pictures, resize_in_graph=True
                    )
                except MixlabError as error:
                    show(model, to, len(pictures), error, "")
                    continue
            same = f"{found['same_top1']} of {found['num_pictures']}"
            show(model, to, found["num_pictures"], f"{found['max_pixel_difference']} of 255", same)


if __name__ == "__main__":
    main()

"""In-memory training batches of CIFAR-size images: images a second on one core.

    python benchmarks/loader.py [--images 50000] [--batch-size 128] [--repeats 5]

Prints the median and range over repeated passes of one epoch each, for crop + flip as uint8 (what the loader
makes) and with normalisation to float32 (what the model takes). Pixels are random: their values change nothing.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from mixlab.data.dataset import Split
from mixlab.data.images.augment import AugmentConfig
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.loader import TrainingDataset, training_batches
from mixlab.data.order import steps_per_epoch
from mixlab.data.reading import load_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels = np.random.default_rng(0).integers(0, 256, (options.images, 32, 32, 3), dtype=np.uint8)
    names = tuple(f"index {i}" for i in range(options.images))
    split = Split(names=names, labels=np.zeros(options.images, dtype=np.int64), arrays=pixels)
    images = load_examples(split, ImagePreprocess(image_size=(32, 32)))
    steps = steps_per_epoch(options.images, options.batch_size)
    for title, augment in (
        ("crop + flip", AugmentConfig(crop="pad", flip=True)),
        (
            "crop + flip + erase + mixed policy",
            AugmentConfig(crop="pad", flip=True, erase_prob=0.25, policy="trivialaugment"),
        ),
    ):
        dataset = TrainingDataset(examples=images, augment=augment, batch_size=options.batch_size, seed=0)
        uint8, float32 = [], []
        for _ in range(options.repeats):  # A B A B
            began = time.perf_counter()
            for step in range(steps):
                dataset[step]
            uint8.append(steps * options.batch_size / (time.perf_counter() - began))
            began = time.perf_counter()
            for _ in training_batches(dataset, first_step=0, num_steps=steps, num_workers=0, on_bad=print):
                pass
            float32.append(steps * options.batch_size / (time.perf_counter() - began))
        for kind, speeds in (("uint8", uint8), ("float32", float32)):
            print(
                f"{title}, {kind}: {statistics.median(speeds):,.0f} images/s "
                f"({min(speeds):,.0f} to {max(speeds):,.0f}, n={len(speeds)}), one thread"
            )


if __name__ == "__main__":
    main()

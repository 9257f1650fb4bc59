"""Fine-tune weights on a folder of images, and write the model as ONNX for programs without mixlab.

    pip install '.[export]'
    python examples/finetune_and_export.py PATH model.onnx

The weights are those that come with mixlab (small images); --weights mixer_b16:imagenet1k downloads larger ones.
"""

import argparse
from pathlib import Path

import mixlab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--weights", default="mixer_pyramid_cifar:cifar10")
    parser.add_argument("--steps", type=int, default=None)
    given = parser.parse_args()

    length = {} if given.steps is None else {"steps": given.steps}
    run = mixlab.finetune(given.data, given.weights, **length)
    print(f"test accuracy {run.accuracy:.1%}, run {run.path}")

    # An export is compared with the model on real images before it is kept.
    exported = mixlab.export(run, out=given.destination, pictures=given.data)
    print(f"{exported['destination']}: {exported['num_bytes'] / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()

"""What saving costs a training that goes on beside it.

    python -m benchmarks.reliability.saving [--model mixer_micro4] [--batch-size 128] [--steps 40] [--repeats 7]

Runs the same training steps on one batch of random images, alternately without a save and with one checkpoint
after the second step, written by the thread that training uses (copy in memory, write, fsync, rename, read back).
Prints the medians, and what the difference is of a minute: the share lost at a save every 60 seconds.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mixlab.checkpoint.checkpoints import Checkpoint, save_checkpoint
from mixlab.data.loader import Batch
from mixlab.models.catalog import create_model
from mixlab.training.clock import Clock
from mixlab.training.objectives.labels import Labels
from mixlab.training.recipe import Recipe
from mixlab.training.saver import Saver, snapshot
from mixlab.training.step import TrainState, train_step


def measure(state: TrainState, batch: Batch, steps: int, folder: Path, saves: bool) -> tuple[float, float]:
    """Seconds of `steps` steps, and of the save until it is whole (0 without one)."""
    saver = Saver(lambda error: print(error))
    began = time.perf_counter()
    saved: list[float] = []
    for step in range(steps):
        train_step(state, batch, Clock(state.recipe.steps, step=step))
        if saves and step == 1:
            tensors = {name: snapshot(group) for name, group in state.tensors().items()}
            checkpoint = Checkpoint(step=round(time.time() * 1000), tensors=tensors, state={})

            def save(checkpoint: Checkpoint = checkpoint) -> None:
                start = time.perf_counter()
                save_checkpoint(folder, checkpoint)
                saved.append(time.perf_counter() - start)

            saver.submit("checkpoint", save)
    seconds = time.perf_counter() - began
    saver.close()
    return seconds, sum(saved)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mixer_micro4")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = create_model(options.model, num_classes=10)
    height, width = model.config.image_size  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.standard_normal((options.batch_size, 3, height, width), dtype=np.float32))
    label = torch.from_numpy(rng.integers(0, 10, options.batch_size))
    batch = Batch(image, label, np.arange(options.batch_size))
    recipe = Recipe(steps=options.steps, batch_size=options.batch_size, ema_decay=0.99)
    state = TrainState(model, recipe, Labels(recipe.loss, label.numpy(), 10), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure(state, batch, 3, folder, True)  # warm
        rows = [
            (
                measure(state, batch, options.steps, folder, False)[0],
                *measure(state, batch, options.steps, folder, True),
            )
            for _ in range(options.repeats)
        ]
        size = sum(f.stat().st_size for f in sorted(folder.iterdir())[-1].iterdir()) / 2**20
    without, with_save, save = (statistics.median(column) for column in zip(*rows, strict=True))
    lost = [b - a for a, b, _ in rows]
    print(
        f"{options.model}, checkpoint {size:.0f} MiB, {options.steps} steps of {options.batch_size}, "
        f"n={options.repeats}: {without:.2f} s without, {with_save:.2f} s with one save ({save:.2f} s beside); "
        f"of a minute {statistics.median(lost) / 60:.2%} (range {min(lost) / 60:.2%} to {max(lost) / 60:.2%})"
    )


if __name__ == "__main__":
    main()

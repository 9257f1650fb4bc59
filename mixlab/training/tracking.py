"""From steps to rows of the log, and to the trackers that people already use."""

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from mixlab.errors import UsageError
from mixlab.training.step import StepResult
from mixlab.words import install_hint


class Rows:
    """Collects steps into rows of the log: mean loss and accuracy since the last row, and images a second."""

    def __init__(self, every: int, many: str = "images") -> None:
        self.every, self._many, self.text = every, many, ""
        self.restart()

    def restart(self) -> None:
        """Begin a new row now; time spent outside training steps is not counted."""
        self.began = time.monotonic()
        self.loss, self.num_correct, self.num_images, self.num_steps = 0.0, 0, 0, 0

    def add(self, result: StepResult, step: int, per_epoch: int, seconds: float) -> dict[str, Any] | None:
        """Add a step; the finished row when there is one."""
        self.loss += result.loss * result.num_images
        self.num_correct += result.num_correct
        self.num_images += result.num_images
        self.num_steps += 1
        if self.num_steps < self.every and step % per_epoch:
            return None
        speed = self.num_images / max(time.monotonic() - self.began, 1e-9)
        row = {
            "step": step,
            "epoch": step / per_epoch,
            "loss": self.loss / self.num_images,
            "accuracy": self.num_correct / self.num_images,
            "lr": result.lr,
            "images_per_second": speed,
            "seconds": seconds,
        }
        self.text = f"training loss {row['loss']:.3f}  {speed:,.0f} {self._many}/s"
        self.restart()
        return row


TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_tracker(name: str | None) -> None:
    """UsageError if there is no such tracker or it is not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise UsageError(
            f"there is no tracker {name!r}", where="--tracker", hint="choose tensorboard or wandb"
        )
    try:
        import_module(TRACKERS[name])
    except ImportError as error:
        hint = install_hint(name)
        raise UsageError(f"the tracker {name} is not installed", where="--tracker", hint=hint) from error


def open_tracker(name: str | None, run: Path) -> Callable[[str, dict[str, Any]], None]:
    """A function (event, values) that also sends rows to the tracker; by default one that does nothing."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run / "tensorboard")

        def to_tensorboard(event: str, values: dict[str, Any]) -> None:
            for key, value in values.items():
                if key != "step":
                    writer.add_scalar(f"{event}/{key}", value, values["step"])
            writer.flush()

        return to_tensorboard
    if name == "wandb":
        import wandb

        wandb_run = wandb.init(project="mixlab", name=run.name, dir=run)

        def to_wandb(event: str, values: dict[str, Any]) -> None:
            wandb_run.log({f"{event}/{key}": value for key, value in values.items()}, step=values["step"])

        return to_wandb
    return lambda event, values: None

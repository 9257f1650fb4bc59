"""mixlab: train, evaluate, compare and use MLP-Mixer image classifiers.

`train`, `resume`, `finetune`, `load`, `create_model` and `accelerate` are found here; importing mixlab itself imports
neither torch nor timm.

The rest by subject: `mixlab.models`, `mixlab.cpu`, `mixlab.data`, `mixlab.checkpoint`, `mixlab.training`,
`mixlab.planning`, `mixlab.recipes`, `mixlab.evaluation`, `mixlab.serving`, `mixlab.exports`, `mixlab.bench`,
`mixlab.studies`, `mixlab.report`, `mixlab.commands`.
"""

import time
from typing import TYPE_CHECKING, Any

from mixlab.version import __version__

if TYPE_CHECKING:
    from mixlab.checkpoint.open import create_model
    from mixlab.cpu.accelerate import accelerate
    from mixlab.recipes import fine_tune as finetune
    from mixlab.recipes import resume, train
    from mixlab.serving.predict import load

__all__ = ["__version__", "accelerate", "create_model", "finetune", "load", "resume", "train"]
STARTED = time.monotonic()  # as near to the start of the process as we can know; budgets count from here

_LAZY = {
    "train": ("mixlab.recipes", "train"),
    "resume": ("mixlab.recipes", "resume"),
    "finetune": ("mixlab.recipes", "fine_tune"),
    "load": ("mixlab.serving.predict", "load"),
    "create_model": ("mixlab.checkpoint.open", "create_model"),
    "accelerate": ("mixlab.cpu.accelerate", "accelerate"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mixlab' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    globals()[name] = found = getattr(import_module(module), attribute)
    return found

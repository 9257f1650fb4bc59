"""mixlab: train, evaluate, compare and use MLP-Mixer image classifiers.

`train`, `resume`, `finetune`, `load`, `evaluate`, `check`, `export`, `create_model`, `accelerate`, `list_models`,
`list_recipes` and `MixlabError` are found here; importing mixlab itself imports neither torch nor timm.

The rest by subject: `mixlab.models`, `mixlab.cpu`, `mixlab.data`, `mixlab.checkpoint`, `mixlab.training`,
`mixlab.planning`, `mixlab.recipes`, `mixlab.evaluation`, `mixlab.serving`, `mixlab.exports`, `mixlab.bench`,
`mixlab.studies`, `mixlab.report`, `mixlab.commands`.
"""

import time
from typing import TYPE_CHECKING, Any

from mixlab.version import __version__

if TYPE_CHECKING:
    from mixlab.api import check, evaluate
    from mixlab.checkpoint.open import create_model
    from mixlab.commands.shipping import export_run as export
    from mixlab.cpu.accelerate import accelerate
    from mixlab.cpu.describe import list_models
    from mixlab.errors import MixlabError
    from mixlab.recipes import fine_tune as finetune
    from mixlab.recipes import list_recipes, resume, train
    from mixlab.serving.predict import load

__all__ = [
    "MixlabError", "__version__", "accelerate", "check", "create_model", "evaluate", "export", "finetune",
    "list_models", "list_recipes", "load", "resume", "train",
]  # fmt: skip
STARTED = time.monotonic()  # as near to the start of the process as we can know; budgets count from here

_LAZY = {
    "train": ("mixlab.recipes", "train"),
    "resume": ("mixlab.recipes", "resume"),
    "finetune": ("mixlab.recipes", "fine_tune"),
    "load": ("mixlab.serving.predict", "load"),
    "evaluate": ("mixlab.api", "evaluate"),
    "check": ("mixlab.api", "check"),
    "export": ("mixlab.commands.shipping", "export_run"),
    "create_model": ("mixlab.checkpoint.open", "create_model"),
    "accelerate": ("mixlab.cpu.accelerate", "accelerate"),
    "list_models": ("mixlab.cpu.describe", "list_models"),
    "list_recipes": ("mixlab.recipes", "list_recipes"),
    "MixlabError": ("mixlab.errors", "MixlabError"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mixlab' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    globals()[name] = found = getattr(import_module(module), attribute)
    return found


def __dir__() -> list[str]:
    return list(__all__)  # what completion offers; imports and private names are not for users

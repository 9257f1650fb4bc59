"""Weights as an older mixlab wrote them: without the digest that ties config.json to them."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixlab.checkpoint.store import DIGEST_KEY, WEIGHTS_NAME


def untie(folder: Path) -> None:
    """Take the digest of config.json out of the weights in `folder`, which may then be changed."""
    path = folder / WEIGHTS_NAME
    with safe_open(path, framework="pt") as file:
        digest = file.metadata()[DIGEST_KEY]
    save_file(load_file(path), path, metadata={DIGEST_KEY: digest})

"""The versions that mixlab was tested with: constraints.txt, made of what is installed in this environment.

    python -m benchmarks.constraints

writes it, for `pip install -c constraints.txt .`: what mixlab and its extras need, and what those need in turn, on
this platform. NVIDIA's libraries and triton are left out: they come with the wheel of torch that pip chooses.
"""

import platform
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
EXTRAS = ("shards", "heic", "hf", "export", "openvino", "serve", "tensorboard", "wandb")
OF_TORCH = re.compile(r"nvidia-.*|cuda-.*|triton")


def needed(name: str, extras: tuple[str, ...] = ()) -> dict[str, str]:
    """Version by name of what is needed for `name` with `extras`, itself not; what is not installed is left out."""
    versions: dict[str, str] = {}
    waiting = [(name, frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            found = distribution(one[0])
        except PackageNotFoundError:
            continue
        versions[canonicalize_name(one[0])] = found.version.partition("+")[0]
        for text in found.requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *one[1])):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    del versions[canonicalize_name(name)]
    return {name: version for name, version in sorted(versions.items()) if not OF_TORCH.fullmatch(name)}


def main() -> None:
    versions = needed("mixlab", EXTRAS)
    lines = [
        "# Versions that mixlab was tested with: pip install -c constraints.txt .",
        f"# Written by `python -m benchmarks.constraints` with Python {platform.python_version()} on"
        f" {platform.system()} {platform.machine()}; do not edit.",
        *(f"{name}=={version}" for name, version in versions.items()),
    ]
    (ROOT / "constraints.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

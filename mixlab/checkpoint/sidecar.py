"""FILE.json beside a file that holds tensors only: what `mixlab convert` could not say in the file itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlab.checkpoint.store import Weights, read_json
from mixlab.data.preprocess import Preprocess
from mixlab.errors import WeightsError
from mixlab.files import write_atomically
from mixlab.models.layers import Gelu

FORMAT = "mixlab sidecar 1"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What belongs to the tensors. gelu, layer_norm_eps: as they were trained, whatever the file's format implies."""

    preprocess: Preprocess
    class_names: tuple[str, ...]
    gelu: Gelu
    layer_norm_eps: float
    converted_from: dict[str, Any]


def sidecar_path(path: Path) -> Path:
    """`FILE.json` for `FILE`."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> Sidecar | None:
    """What stands beside the weights file `path`, if it is ours (a download's record is not); or WeightsError."""
    beside = sidecar_path(path)
    values = read_json(beside) if beside.is_file() else {}
    if values.get("format") != FORMAT:
        return None
    try:
        if values["gelu"] not in ("tanh", "erf"):
            raise ValueError(f"gelu {values['gelu']!r}")
        return Sidecar(
            preprocess=Preprocess.from_json(values["preprocess"]),
            class_names=tuple(str(name) for name in values["class_names"]),
            gelu=values["gelu"],
            layer_norm_eps=float(values["layer_norm_eps"]),
            converted_from=dict(values["converted_from"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"a key is missing or wrong: {error}", where=str(beside)) from error


def write_sidecar(path: Path, weights: Weights, record: dict[str, Any]) -> None:
    """Write it for the weights file `path`; `record`: gelu, layer_norm_eps, converted_from, and notes for people."""
    own = {
        "format": FORMAT,
        "preprocess": weights.preprocess.to_json(),
        "class_names": list(weights.class_names),
    }
    write_atomically(sidecar_path(path), (json.dumps(own | record, indent=2) + "\n").encode())

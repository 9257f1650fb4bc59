"""FILE.json beside a file that holds tensors only: what `mixlab convert` could not say in the file itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlab.checkpoint.store import Weights, take_temperature
from mixlab.data.modality import Preprocess, read_preprocess
from mixlab.errors import WeightsError
from mixlab.escape import without_places
from mixlab.files import write_atomically
from mixlab.models.layers import Gelu
from mixlab.records import read_json, take, take_list

FORMAT = "mixlab sidecar 1"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What belongs to the tensors. gelu, layer_norm_eps: as they were trained, whatever the file's format implies."""

    preprocess: Preprocess
    class_names: tuple[str, ...]
    gelu: Gelu
    layer_norm_eps: float
    converted_from: dict[str, Any]
    temperature: float = 1.0


def sidecar_path(path: Path) -> Path:
    """`FILE.json` for `FILE`."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> Sidecar | None:
    """What stands beside the weights file `path`, if it is ours (a download's record is not); or WeightsError."""
    beside = sidecar_path(path)
    values = read_json(beside, follow=True) if beside.is_file() else {}
    if values.get("format") != FORMAT:
        return None
    where = str(beside)
    gelu = take(values, "gelu", str, where)
    if gelu not in ("tanh", "erf"):
        raise WeightsError(f"gelu must be tanh or erf, got {gelu[:60]!r}", where=where)
    return Sidecar(
        preprocess=read_preprocess(take(values, "preprocess", dict, where), where),
        class_names=take_list(values, "class_names", str, where),
        gelu=gelu,
        layer_norm_eps=take(values, "layer_norm_eps", float, where, low=0.0, high=1.0),
        converted_from=take(values, "converted_from", dict, where),
        temperature=take_temperature(values, where),
    )


def write_sidecar(path: Path, weights: Weights, record: dict[str, Any]) -> None:
    """Write it for the weights file `path`; `record`: gelu, layer_norm_eps, converted_from, and notes for people."""
    own: dict[str, Any] = {
        "format": FORMAT,
        "preprocess": weights.preprocess.to_json(),
        "class_names": list(weights.class_names),
    }
    if weights.temperature != 1:
        own["temperature"] = weights.temperature
    write_atomically(sidecar_path(path), (json.dumps(own | without_places(record), indent=2) + "\n").encode())

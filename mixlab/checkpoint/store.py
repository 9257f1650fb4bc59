"""Weights, the deliverable of a run, on disk: `weights.safetensors` and `config.json`.

The second says what is needed to use them: model, preprocess, class names, provenance.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mixlab.checkpoint.readers import open_tensors
from mixlab.data.preprocess import Preprocess
from mixlab.errors import MixlabError, WeightsError
from mixlab.files import write_atomically, written_whole
from mixlab.models.catalog import create_model

WEIGHTS_NAME = "weights.safetensors"
CONFIG_NAME = "config.json"
DIGEST_KEY = "mixlab_sha256"
MAX_CONFIG_BYTES = 64 * 2**20  # 21,843 class names take 1 MB
MAX_BLOCKS = 10_000  # of a model that a file describes: more would only keep the machine busy
FORMAT_VERSION = 1
RUNS = Path("runs")  # where runs go that are given by a bare name, or by none


def run_path(name: str) -> Path:
    """RUN as a person gives it: a path, or a bare name under ./runs."""
    path = Path(name)
    if len(path.parts) > 1 or path.is_absolute() or name in (".", ".."):
        return path
    return RUNS / name if not path.is_dir() or (RUNS / name).is_dir() else path


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model with everything that is needed to use it.

    model_settings: keyword arguments of `create_model`. provenance: where the weights come from, for people.
    """

    model: nn.Module
    model_settings: dict[str, Any]
    preprocess: Preprocess
    class_names: tuple[str, ...]
    provenance: dict[str, Any]


def save_weights(
    folder: Path, weights: Weights, tensors: dict[str, Tensor] | None = None, *, half: bool = False
) -> None:
    """Write weights.safetensors and config.json into `folder`; `tensors` replaces the model's own state.

    half: as float16, in half the space; they are read as float32 again.
    """
    tensors = weights.model.state_dict() if tensors is None else tensors
    if half:
        tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    config = {
        "format": "mixlab",
        "format_version": FORMAT_VERSION,
        "model": weights.model_settings,
        "preprocess": weights.preprocess.to_json(),
        "class_names": list(weights.class_names),
        "provenance": weights.provenance,
    }
    with written_whole(folder / WEIGHTS_NAME) as temporary:
        save_tensors(tensors, temporary, with_digest=True)
    write_atomically(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


def load_weights(path: Path) -> Weights:
    """The weights in a run or weights folder; WeightsError names what is missing or does not fit."""
    if not path.exists():
        raise WeightsError(
            "there is no such run or weights folder", where=str(path), hint="`mixlab runs` lists runs"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise WeightsError(
                f"{name} is missing", where=str(path), hint="a run has it once its first epoch is over"
            )
    config = _read_config(path / CONFIG_NAME)
    try:
        settings = dict(config["model"])
        settings["image_size"] = tuple(settings["image_size"])
        if int(settings.get("num_blocks") or 0) > MAX_BLOCKS:
            raise ValueError(f"{settings['num_blocks']} blocks")
        preprocess = Preprocess.from_json(config["preprocess"])
        class_names = tuple(str(name) for name in config["class_names"])
        # Without memory for the weights: a Mixer's come from the file. timm models keep values outside theirs.
        with torch.device("cpu" if settings["name"].startswith("timm/") else "meta"):
            model = create_model(**settings)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"a key is missing or wrong: {error}", where=str(path / CONFIG_NAME)) from error
    except MixlabError as error:
        raise WeightsError(f"the model cannot be built: {error}", where=str(path / CONFIG_NAME)) from error
    if next(model.parameters()).is_meta:
        give_memory(model)
    _fill(model, path / WEIGHTS_NAME)
    model.eval()
    return Weights(
        model=model,
        model_settings=settings,
        preprocess=preprocess,
        class_names=class_names,
        provenance=dict(config.get("provenance", {})),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that nobody vouches for."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise WeightsError("it is too large for a description of a model", where=str(path))
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"it cannot be read: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise WeightsError("it does not describe a model", where=str(path))
    return config


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("format") != "mixlab":
        raise WeightsError("it does not describe mixlab weights", where=str(path))
    if config.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"format version {config.get('format_version')} is unknown; this mixlab reads {FORMAT_VERSION}",
            where=str(path),
            hint="use the mixlab that wrote it, or a newer one",
        )
    return config


def give_memory(model: nn.Module) -> None:
    """Tensors on the CPU, of any values, in place of a model's on the meta device.

    `Module.to_empty` does the same and imports sympy for it, two thirds of the time that loading takes.
    """
    own = model.state_dict()
    model.load_state_dict(
        {key: torch.empty(own[key].shape, dtype=own[key].dtype) for key in own}, assign=True
    )


def _fill(model: nn.Module, path: Path) -> None:
    """Read `path` into the model, tensor by tensor, after checking names and shapes; then the file's digest."""
    own = model.state_dict()
    with open_tensors(path) as file, torch.no_grad():
        check_shapes(file.shapes, {name: tuple(tensor.shape) for name, tensor in own.items()}, str(path))
        for name, tensor in own.items():
            tensor.copy_(file.read(name))
        stored = file.metadata.get(DIGEST_KEY)
    if stored is not None and stored != _digest(own):
        raise WeightsError(
            "the weights are damaged: they differ from the SHA-256 stored with them",
            where=str(path),
            hint="copy the file again, or go back to a checkpoint of the run with --resume",
        )


def check_shapes(
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    where: str,
    what: str = "the weights are of another model;",
) -> None:
    """WeightsError naming missing, extra and misshapen tensors with the expected shapes, if any."""
    missing = [f"{name} {expected[name]}" for name in sorted(set(expected) - set(found))]
    extra = [f"{name} {found[name]}" for name in sorted(set(found) - set(expected))]
    wrong = [
        f"{name}: has {found[name]}, needs {expected[name]}"
        for name in sorted(set(found) & set(expected))
        if found[name] != expected[name]
    ]
    parts = []
    for title, names in (("missing", missing), ("not expected", extra), ("wrong shape", wrong)):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{title}: {'; '.join(names[:3])}{rest}")
    if parts:
        raise WeightsError(f"{what} " + "; ".join(parts), where=where)


def save_tensors(tensors: dict[str, Tensor], path: Path, *, with_digest: bool = False) -> None:
    """Tensors from any device to a safetensors file, with their digest if wanted; OSError if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors has no checksum of its own: one flipped bit would be another number. A checkpoint's files have
    # theirs in the manifest; weights travel alone, so they carry it inside.
    # One entry only: with two, the library's order of them differs from process to process, and so the bytes.
    metadata = {DIGEST_KEY: _digest(tensors)} if with_digest else None
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names; of float16 as it is read, float32."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

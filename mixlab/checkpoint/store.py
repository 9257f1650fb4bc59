"""Weights, the deliverable of a run, on disk: `weights.safetensors` and `config.json`.

The second says what is needed to use them: model, preprocess, class names, provenance.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mixlab.checkpoint.described import build_described
from mixlab.checkpoint.readers import open_tensors
from mixlab.checkpoint.tensor_file import TensorFile
from mixlab.data.modality import Preprocess, read_preprocess
from mixlab.errors import WeightsError
from mixlab.escape import without_places
from mixlab.files import write_atomically, written_whole
from mixlab.records import read_json, take, take_list

WEIGHTS_NAME = "weights.safetensors"
CONFIG_NAME = "config.json"
NEXT_CONFIG_NAME = ".config.json.next"  # while new weights and what describes them take their places
DIGEST_KEY, CONFIG_DIGEST_KEY = "mixlab_sha256", "mixlab_config_sha256"
FORMAT_VERSION = 1
WITHOUT_DIGEST = "these weights are of an older mixlab: only shapes tie class names and preprocessing to them"
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
    cautions: sentences that a person should read before the weights are trusted. temperature: divides the logits
    before the softmax, 1 where none was fitted. thresholds: of confidence, from validation (`find_thresholds`).
    """

    model: nn.Module
    model_settings: dict[str, Any]
    preprocess: Preprocess
    class_names: tuple[str, ...]
    provenance: dict[str, Any]
    cautions: tuple[str, ...] = ()
    temperature: float = 1.0
    thresholds: tuple[dict[str, float], ...] = ()


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
        "provenance": without_places(weights.provenance),
    }
    if weights.temperature != 1:
        config["temperature"] = weights.temperature
    if weights.thresholds:
        config["thresholds"] = list(weights.thresholds)
    content = (json.dumps(config, indent=2) + "\n").encode()
    # A kill between the two would leave weights beside what describes others: the new description is there first,
    # under another name, and `load_weights` takes the one that the weights name.
    write_atomically(folder / NEXT_CONFIG_NAME, content)
    with written_whole(folder / WEIGHTS_NAME) as temporary:
        save_tensors(tensors, temporary, with_digest=True, config=config)
    write_atomically(folder / CONFIG_NAME, content)
    (folder / NEXT_CONFIG_NAME).unlink(missing_ok=True)


def load_weights(path: Path) -> Weights:
    """The weights in a run or weights folder; WeightsError names what is missing or does not fit."""
    if not path.exists():
        raise WeightsError(
            "there is no such run or weights folder", where=str(path), hint="`mixlab runs` lists runs"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file() and not (path / NEXT_CONFIG_NAME).is_file():
            raise WeightsError(
                f"{name} is missing", where=str(path), hint="a run has it once its first epoch is over"
            )
    with open_tensors(path / WEIGHTS_NAME) as file:
        config, where, cautions = _find_config(path, file.metadata.get(CONFIG_DIGEST_KEY))
        settings = dict(take(config, "model", dict, where))
        preprocess = read_preprocess(take(config, "preprocess", dict, where), where)
        class_names = take_list(config, "class_names", str, where)
        model, settings = build_described(settings, file, where)
        _check_together(settings, preprocess, class_names, where)
        provenance = dict(take(config, "provenance", dict, where, optional=True) or {})
        for key, kind in (
            ("validation_top1", float),
            ("assumed", dict),
            ("notes", list),
        ):  # what is made use of
            take(provenance, key, kind, f"{where}, provenance", optional=True)
        temperature, thresholds = _read_calibration(config, where)
        _fill(model, file)
    model.eval()
    return Weights(
        model=model,
        model_settings=settings,
        preprocess=preprocess,
        class_names=class_names,
        provenance=provenance,
        cautions=cautions,
        temperature=temperature,
        thresholds=thresholds,
    )


def _read_calibration(config: dict[str, Any], where: str) -> tuple[float, tuple[dict[str, float], ...]]:
    """The temperature and the thresholds of a config.json; 1 and none of those that were written without."""
    temperature = take_temperature(config, where)
    thresholds = take(config, "thresholds", list, where, optional=True) or []
    for one in thresholds:
        if not isinstance(one, dict):
            raise WeightsError("thresholds must be objects", where=where)
        for key in ("target", "min_confidence", "coverage"):
            take(one, key, float, f"{where}, thresholds", low=0.0, high=1.0)
    return temperature, tuple(thresholds)


def take_temperature(values: dict[str, Any], where: str) -> float:
    """The optional key `temperature`, 1 where it is absent; WeightsError for what divides no logits."""
    found = take(values, "temperature", float, where, low=1e-3, high=1e3, optional=True)
    return 1.0 if found is None else float(found)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of mixlab weights, as it is; WeightsError if it is of something else."""
    config = read_json(path, follow=True)
    if config.get("format") != "mixlab":
        raise WeightsError("it does not describe mixlab weights", where=str(path))
    if config.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"format version {config.get('format_version')} is unknown; this mixlab reads {FORMAT_VERSION}",
            where=str(path),
            hint="use the mixlab that wrote it, or a newer one",
        )
    return config


def _find_config(path: Path, digest: str | None) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """What describes the weights in `path`, its place, and what is to be said of it. digest: that they name."""
    if digest is None:
        return read_config(path / CONFIG_NAME), str(path / CONFIG_NAME), (WITHOUT_DIGEST,)
    if os.path.lexists(path / NEXT_CONFIG_NAME):
        with contextlib.suppress(WeightsError):
            config = read_config(path / NEXT_CONFIG_NAME)
            if _config_digest(config) == digest:
                return config, str(path / NEXT_CONFIG_NAME), ()
    config = read_config(path / CONFIG_NAME)
    if _config_digest(config) == digest:
        return config, str(path / CONFIG_NAME), ()
    raise WeightsError(
        "it is not what was written with these weights: its SHA-256 is another one",
        where=str(path / CONFIG_NAME),
        hint="bring the file of these weights back; of a run, `mixlab train --resume` writes both again",
    )


def _check_together(
    settings: dict[str, Any], preprocess: Preprocess, class_names: tuple[str, ...], where: str
) -> None:
    """WeightsError if a model, known to fit its tensors, and what stands beside it are of different ones."""
    size = "x".join(map(str, preprocess.input_size))
    for what, stated, found in (
        ("class names", len(class_names), settings["num_classes"]),
        ("the preprocessing's input size", size, "x".join(map(str, settings["image_size"]))),
        ("the preprocessing's channels", preprocess.channels, settings["in_channels"]),
    ):
        if stated != found:
            raise WeightsError(f"{what}: {stated}, where the model has {found}", where=where)


def _fill(model: nn.Module, file: TensorFile) -> None:
    """Read the tensors into the model, one after the other, then compare their digest."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(file.read(name))
    stored = file.metadata.get(DIGEST_KEY)
    if stored is not None and stored != _digest(own):
        raise WeightsError(
            "the weights are damaged: they differ from the SHA-256 stored with them",
            where=str(file.path),
            hint="copy the file again, or go back to a checkpoint of the run with --resume",
        )


def save_tensors(
    tensors: dict[str, Tensor], path: Path, *, with_digest: bool = False, config: dict[str, Any] | None = None
) -> None:
    """Tensors from any device to a safetensors file; OSError if it cannot be written.

    with_digest: of the tensors, into the metadata. config: what describes them, whose digest goes there too.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors has no checksum of its own: one flipped bit would be another number. A checkpoint's files have
    # theirs in the manifest; weights travel alone, so they carry it inside.
    metadata = {DIGEST_KEY: _digest(tensors)} if with_digest else {}
    if config is not None:
        metadata[CONFIG_DIGEST_KEY] = _config_digest(config)
    try:
        save_file(tensors, path, metadata=metadata or None)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    if len(metadata) > 1:
        _sort_metadata(path, metadata)


def _sort_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Put two entries in order: the library's differs from process to process, and so would the bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        entries = [f'"{key}":"{value}"'.encode() for key, value in sorted(metadata.items())]
        sorted_, reverse = (
            b'"__metadata__":{' + b",".join(order) + b"}" for order in (entries, entries[::-1])
        )
        if reverse in header:
            file.seek(8)
            file.write(header.replace(reverse, sorted_, 1))


def _config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of what a config.json says, however it is laid out."""
    same = json.dumps(json.loads(json.dumps(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(same.encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names; of float16 as it is read, float32."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

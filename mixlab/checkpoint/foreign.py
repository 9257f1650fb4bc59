"""Weights of other projects: bare files in any known layout, and timm's folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from mixlab.checkpoint.described import give_memory
from mixlab.checkpoint.readers import open_tensors
from mixlab.checkpoint.recognise import Recognised, recognise
from mixlab.checkpoint.sidecar import Sidecar, read_sidecar, sidecar_path
from mixlab.checkpoint.store import CONFIG_NAME, Weights
from mixlab.checkpoint.tensor_file import TensorFile
from mixlab.data.images.decode import GREY16_MAX
from mixlab.data.images.imagenet import usual_class_names
from mixlab.data.images.preprocess import Fit, ImagePreprocess, for_images
from mixlab.errors import UsageError, WeightsError
from mixlab.models.catalog import config_of, make_mixer, settings_of
from mixlab.models.layers import Gelu
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.records import read_json

TIMM_WEIGHTS_NAME = "model.safetensors"


def open_file(path: Path, image_size: tuple[int, int] | None) -> Weights:
    """Weights of a file, with what stands beside it (sidecar.py), or else what its layout implies."""
    sidecar = read_sidecar(path)
    if sidecar is None:
        return _open_bare(path, image_size)
    try:
        return _with_sidecar(_open_bare(path, sidecar.preprocess.input_size), sidecar, path)
    except UsageError as error:
        raise WeightsError(f"it belongs to another file: {error}", where=str(sidecar_path(path))) from error


def _with_sidecar(weights: Weights, sidecar: Sidecar, path: Path) -> Weights:
    """The weights with what stands beside their file; WeightsError where the two are of different models."""
    own = weights.preprocess
    for what, stated, found in (
        ("class names", len(sidecar.class_names), len(weights.class_names)),
        ("image size", sidecar.preprocess.input_size, own.input_size),
        ("channels", sidecar.preprocess.channels, own.channels),
    ):
        if stated != found:
            raise WeightsError(
                f"its {what} are {stated}, those of the weights {found}",
                where=str(sidecar_path(path)),
                hint=f"it belongs to another file; without it {path.name} is opened by what its format implies",
            )
    provenance = {key: value for key, value in weights.provenance.items() if key != "assumed"}
    weights = replace(
        weights,
        preprocess=sidecar.preprocess,
        class_names=sidecar.class_names,
        provenance=provenance | {"converted_from": sidecar.converted_from},
        temperature=sidecar.temperature,
    )
    return with_numerics(weights, sidecar.gelu, sidecar.layer_norm_eps)


def _open_bare(path: Path, image_size: tuple[int, int] | None) -> Weights:
    """Weights of a bare file, with what its layout implies; named as assumed in the provenance."""
    with open_tensors(path) as file:
        found = recognise(file.shapes, where=str(path))
        config = found.config(image_size, where=str(path))
        model = _read_model(file, found, config)
    assumed = {
        "gelu": config.gelu,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": f"{config.image_size[0]}x{config.image_size[1]}",
        "preprocess": "pixels to [-1, 1], the centre 87.5 % of the image",
        "class_names": "by their number",
    }
    return Weights(
        model=model,
        model_settings=settings_of(config),
        preprocess=ImagePreprocess(
            image_size=config.image_size,
            channels=config.in_channels,
            crop_fraction=0.875,
            mean=(0.5,) * config.in_channels,
            std=(0.5,) * config.in_channels,
        ),
        class_names=usual_class_names(config.num_classes),
        provenance={
            "source": str(path),
            "format": found.layout.title,
            "assumed": assumed,
            "notes": list(found.notes),
        },
    )


def _read_model(file: TensorFile, found: Recognised, config: MixerConfig) -> Mixer:
    """One tensor at a time, so that the file and the model are never in memory twice."""
    with torch.device("meta"):
        model = Mixer(config)
    give_memory(model)
    parameters = model.state_dict()
    with torch.no_grad():
        for name, key in found.keys.items():
            parameters[name].copy_(found.layout.to_ours(name, file.read(key), found.shapes[name]))
    return model.eval()


def open_timm_folder(path: Path) -> Weights:
    """model.safetensors with timm's config.json, as timm, transformers and `mixlab convert` write it."""
    where = str(path / CONFIG_NAME)
    config = read_json(path / CONFIG_NAME, follow=True)
    try:
        facts = dict(config.get("pretrained_cfg") or {})
        arguments = dict(config.get("model_args") or {})
        stated = arguments.get("img_size") or facts.get("input_size", [3, 224, 224])[1:]
        height, width = (stated, stated) if isinstance(stated, int) else (int(stated[0]), int(stated[1]))
        weights = _open_bare(path / TIMM_WEIGHTS_NAME, (height, width))
        own = config.get("mixlab")  # what `mixlab convert` wrote, of weights that timm runs otherwise too
        own = own if isinstance(own, dict) else None
        preprocess = replace(for_images(weights.preprocess, "timm's format"), **_preprocess_facts(facts, own))
        preprocess.check(where)
        names = config.get("label_names") or facts.get("label_names") or weights.class_names
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise WeightsError(f"a key is missing or wrong: {error}", where=where) from error
    if len(names) != len(weights.class_names):
        raise WeightsError(f"{len(names)} label_names for {len(weights.class_names)} classes", where=where)
    architecture = config.get("architecture")
    own = own or {}
    assumed = {key: weights.provenance["assumed"][key] for key in ("gelu", "layer_norm_eps")}
    weights = replace(
        weights,
        preprocess=preprocess,
        class_names=tuple(str(name) for name in names),
        provenance=weights.provenance
        | {"source": str(path), "architecture": architecture, "assumed": assumed}
        | ({"converted_from": own["converted_from"]} if "converted_from" in own else {}),
    )
    if weights.preprocess.input_size != (height, width):
        raise WeightsError(
            f"img_size {height}x{width} does not fit the weights' grid of {weights.preprocess.input_size}",
            where=where,
        )
    numerics = {key: arguments.get(key, own.get(key)) for key in ("gelu", "layer_norm_eps")}
    return with_numerics(weights, **numerics)


def _preprocess_facts(facts: dict[str, Any], own: dict[str, Any] | None) -> dict[str, Any]:
    """What timm's pretrained_cfg, and what mixlab wrote beside it, say of the preprocessing, in our words."""
    found: dict[str, Any] = {}
    for key in ("mean", "std"):
        if key in facts:
            found[key] = tuple(float(value) for value in facts[key])
    if not all(value > 0 for value in found.get("std", ())):
        raise ValueError(f"std must be above 0, got {found['std']}")
    if "crop_pct" in facts:
        found["crop_fraction"] = float(facts["crop_pct"])
    if facts.get("crop_mode") == "squash":
        # Folders of mixlab's that do not say it are older than its `resize-crop`.
        found["fit"] = "resize-crop" if own is None else own.get("fit", "stretch")
        if found["fit"] not in get_args(Fit):
            raise ValueError(f"fit {found['fit']!r}")
    if own is not None and "grey_max" in own:
        found["grey_max"] = int(own["grey_max"])
        if not 1 <= found["grey_max"] <= GREY16_MAX:
            raise ValueError(f"grey_max {found['grey_max']}")
    if facts.get("interpolation") in ("bicubic", "bilinear"):
        found["interpolation"] = facts["interpolation"]
    return found


def with_numerics(weights: Weights, gelu: Gelu | None, layer_norm_eps: float | None) -> Weights:
    """The same weights run with another GELU or epsilon."""
    given: dict[str, Any] = {"gelu": gelu, "layer_norm_eps": layer_norm_eps}
    changed = {key: value for key, value in given.items() if value is not None}
    if not changed:
        return weights
    own = config_of(weights.model)
    if own is None:
        raise UsageError("GELU and epsilon can be set for a Mixer only", where="gelu")
    config = replace(own, **changed)
    with torch.device("meta"):
        model = make_mixer(config)
    model.load_state_dict(weights.model.state_dict(), assign=True)
    assumed = {k: v for k, v in weights.provenance.get("assumed", {}).items() if k not in changed}
    return replace(
        weights,
        model=model.eval(),
        model_settings=settings_of(config),
        provenance=weights.provenance | ({"assumed": assumed} if "assumed" in weights.provenance else {}),
    )

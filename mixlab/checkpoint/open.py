"""One door to all weights: a run, a folder, a file in any known layout, or a published name."""

import difflib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixlab.checkpoint.download import fetch_published
from mixlab.checkpoint.published import PUBLISHED, Published, find_published
from mixlab.checkpoint.readers import TensorFile, open_tensors
from mixlab.checkpoint.recognise import Recognised, recognise
from mixlab.checkpoint.sidecar import Sidecar, read_sidecar, sidecar_path
from mixlab.checkpoint.store import CONFIG_NAME, WEIGHTS_NAME, Weights, load_weights, read_json
from mixlab.data.preprocess import Preprocess
from mixlab.errors import UsageError, WeightsError
from mixlab.models.catalog import create_model as build_model
from mixlab.models.catalog import settings_of
from mixlab.models.layers import Gelu
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.models.resolution import resample

TIMM_WEIGHTS_NAME = "model.safetensors"


def open_weights(
    path_or_name: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    gelu: Gelu | None = None,
    layer_norm_eps: float | None = None,
    resampled: bool = True,
    progress: Any = None,
) -> Weights:
    """The model in a run or weights folder, .npz, .safetensors, .pth or timm folder, or under a published name.

    image_size: side or (height, width) in pixels; weights of another grid are resampled to it
        (models/resolution.py). A bare file whose number of patches is no square needs it to say its own shape.
    resampled: False opens weights of another grid as they are; image_size then only says the shape of such a file.
    gelu, layer_norm_eps: replace what the format implies. progress: called with (bytes done, bytes in all)
        while a published file is downloaded. WeightsError says what is wrong with the file, or that no such
        thing exists; UsageError that image_size does not fit.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    name = str(path_or_name)
    if Path(path_or_name).exists():
        weights = _open_path(Path(path_or_name), size)
    elif name in PUBLISHED or name.startswith(("mixer_", "timm/")):
        weights = _open_published(find_published(name), size, progress)
    else:
        close = difflib.get_close_matches(name, PUBLISHED, n=1)
        lists = "`mixlab runs` lists runs, `mixlab models --pretrained` published weights"
        hint = f"did you mean {close[0]!r}?" if close else lists
        raise WeightsError("there is no such run, weights file or published name", where=name, hint=hint)
    weights = _with_numerics(weights, gelu, layer_norm_eps)
    return _with_size(weights, size) if resampled else weights


def create_model(
    name: str,
    *,
    pretrained: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    **settings: Any,
) -> nn.Module:
    """A model by name: images (B, channels, H, W) to logits (B, K); fresh, or with published weights.

    pretrained: a tag of `mixlab models --pretrained`, such as `imagenet1k`. num_classes: other than the weights'
    gives a new head of zeros; None is 1000, or what the weights have. image_size: side or (height, width).
    settings: in_channels and fields of `ModelConfig`, for fresh models only. UsageError for unknown names.
    """
    if pretrained is None:
        number = 1000 if num_classes is None else num_classes
        return build_model(name, num_classes=number, image_size=image_size, **settings)
    if settings:
        raise UsageError(f"{', '.join(settings)} cannot be set for published weights", where="pretrained")
    published = name if name.startswith("timm/") else f"{name}:{pretrained}"
    model = open_weights(find_published(published).name, image_size=image_size).model
    if num_classes is not None and isinstance(model, Mixer) and num_classes != model.config.num_classes:
        model.reset_head(num_classes)
    return model


def _open_path(path: Path, image_size: tuple[int, int] | None) -> Weights:
    if path.name in (WEIGHTS_NAME, TIMM_WEIGHTS_NAME) and (path.parent / CONFIG_NAME).is_file():
        path = path.parent  # beside the file stands what it does not say itself
    if path.is_dir() and not (path / TIMM_WEIGHTS_NAME).is_file():
        return load_weights(path)
    if path.is_dir():
        return _open_timm_folder(path)
    sidecar = read_sidecar(path)
    weights = _open_file(path, image_size if sidecar is None else sidecar.preprocess.image_size)
    return weights if sidecar is None else _with_sidecar(weights, sidecar, path)


def _with_sidecar(weights: Weights, sidecar: Sidecar, path: Path) -> Weights:
    """The weights with what stands beside their file; WeightsError where the two are of different models."""
    own = weights.preprocess
    for what, stated, found in (
        ("class names", len(sidecar.class_names), len(weights.class_names)),
        ("image size", sidecar.preprocess.image_size, own.image_size),
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
    )
    return _with_numerics(weights, sidecar.gelu, sidecar.layer_norm_eps)


def _open_file(path: Path, image_size: tuple[int, int] | None) -> Weights:
    """Weights of a bare file, with what its layout implies; said to be assumed in the provenance."""
    with open_tensors(path) as file:
        found = recognise(file.shapes, where=str(path))
        config = found.config(image_size, where=str(path))
        model = _read_model(file, found, config)
    assumed = {
        "gelu": config.gelu,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": f"{config.image_size[0]}x{config.image_size[1]}",
        "preprocess": "pixels to [-1, 1], the centre 87.5 % of the picture",
        "class_names": "by their number",
    }
    return Weights(
        model=model,
        model_settings=settings_of(config),
        preprocess=Preprocess(
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
    model.to_empty(device="cpu")
    parameters = model.state_dict()
    with torch.no_grad():
        for name, key in found.keys.items():
            parameters[name].copy_(found.layout.to_ours(name, file.read(key), found.shapes[name]))
    return model.eval()


def _open_timm_folder(path: Path) -> Weights:
    """model.safetensors with timm's config.json, as timm, transformers and `mixlab convert` write it."""
    config = read_json(path / CONFIG_NAME)
    where = str(path / CONFIG_NAME)
    try:
        facts = dict(config.get("pretrained_cfg") or {})
        arguments = dict(config.get("model_args") or {})
        stated = arguments.get("img_size") or facts.get("input_size", [3, 224, 224])[1:]
        height, width = (stated, stated) if isinstance(stated, int) else (int(stated[0]), int(stated[1]))
        weights = _open_file(path / TIMM_WEIGHTS_NAME, (height, width))
        preprocess = replace(weights.preprocess, **_preprocess_facts(facts))
        names = config.get("label_names") or facts.get("label_names") or weights.class_names
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise WeightsError(f"a key is missing or wrong: {error}", where=where) from error
    if len(names) != len(weights.class_names):
        raise WeightsError(f"{len(names)} label_names for {len(weights.class_names)} classes", where=where)
    architecture = config.get("architecture")
    assumed = {key: weights.provenance["assumed"][key] for key in ("gelu", "layer_norm_eps")}
    weights = replace(
        weights,
        preprocess=preprocess,
        class_names=tuple(str(name) for name in names),
        provenance=weights.provenance
        | {"source": str(path), "architecture": architecture, "assumed": assumed},
    )
    if weights.preprocess.image_size != (height, width):
        raise WeightsError(
            f"img_size {height}x{width} does not fit the weights' grid of {weights.preprocess.image_size}",
            where=where,
        )
    own = config.get("mixlab") or {}  # what `mixlab convert` wrote of weights that timm runs otherwise
    numerics = {key: arguments.get(key, own.get(key)) for key in ("gelu", "layer_norm_eps")}
    return _with_numerics(weights, **numerics)


def _preprocess_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What timm's pretrained_cfg says of the preprocessing, in our words."""
    found: dict[str, Any] = {}
    for key in ("mean", "std"):
        if key in facts:
            found[key] = tuple(float(value) for value in facts[key])
    if not all(value > 0 for value in found.get("std", ())):
        raise ValueError(f"std must be above 0, got {found['std']}")
    if "crop_pct" in facts:
        found["crop_fraction"] = float(facts["crop_pct"])
    if facts.get("interpolation") in ("bicubic", "bilinear"):
        found["interpolation"] = facts["interpolation"]
    return found


def _open_published(published: Published, image_size: tuple[int, int] | None, progress: Any) -> Weights:
    path = fetch_published(published, progress=progress)
    weights = _open_path(path, image_size)
    preprocess = replace(
        weights.preprocess,
        mean=published.mean,
        std=published.std,
        crop_fraction=published.crop_fraction,
        interpolation=published.interpolation,
    )
    weights = replace(
        weights,
        preprocess=preprocess,
        provenance={
            "source": published.name,
            "url": published.url,
            "format": weights.provenance["format"],
            "published": published.provenance,
            "top1": published.top1,
            "not_verified": published.not_verified,
        },
    )
    return _with_numerics(weights, published.gelu, None)


def _with_numerics(weights: Weights, gelu: Gelu | None, layer_norm_eps: float | None) -> Weights:
    """The same weights run with another GELU or epsilon."""
    given: dict[str, Any] = {"gelu": gelu, "layer_norm_eps": layer_norm_eps}
    changed = {key: value for key, value in given.items() if value is not None}
    if not changed:
        return weights
    if not isinstance(weights.model, Mixer):
        raise UsageError("GELU and epsilon can be set for a Mixer only", where="gelu")
    config = replace(weights.model.config, **changed)
    with torch.device("meta"):
        model = type(weights.model)(config)
    model.load_state_dict(weights.model.state_dict(), assign=True)
    assumed = {k: v for k, v in weights.provenance.get("assumed", {}).items() if k not in changed}
    return replace(
        weights,
        model=model.eval(),
        model_settings=settings_of(config),
        provenance=weights.provenance | ({"assumed": assumed} if "assumed" in weights.provenance else {}),
    )


def _with_size(weights: Weights, image_size: tuple[int, int] | None) -> Weights:
    """The same weights for images of another size, resampled."""
    own = weights.preprocess.image_size
    if image_size is None or image_size == own:
        return weights
    if not isinstance(weights.model, Mixer):
        raise UsageError(
            f"these weights are of {weights.model_settings['name']} for images of {own[0]}x{own[1]}",
            where="image_size",
            hint="only a Mixer can change its resolution",
        )
    model = resample(weights.model, image_size)
    return replace(
        weights,
        model=model.eval(),
        model_settings=settings_of(model.config),
        preprocess=replace(weights.preprocess, image_size=image_size),
        provenance=weights.provenance | {"resampled_from": f"{own[0]}x{own[1]}"},
    )


def usual_class_names(num_classes: int) -> tuple[str, ...]:
    """ImageNet's names where the number of classes is one of ImageNet's (timm's lists), else '0' ... 'K-1'."""
    subsets = {1000: "imagenet-1k", 11221: "imagenet-21k-miil", 21843: "imagenet-21k-goog"}
    if num_classes not in subsets:
        return tuple(str(number) for number in range(num_classes))
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subsets[num_classes])
    names = [info.index_to_description(index) for index in range(num_classes)]
    synsets = info.label_names()
    # Some words stand for two classes (a crane is a bird and a machine): those get their WordNet number too.
    count = Counter(names)
    return tuple(f"{n} ({s})" if count[n] > 1 else n for n, s in zip(names, synsets, strict=True))

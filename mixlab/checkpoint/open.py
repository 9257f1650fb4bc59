"""One door to all weights: a run, a folder, a file in any known layout, or a published name."""

import difflib
import os
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn

from mixlab.checkpoint.download import fetch_published, origin_of
from mixlab.checkpoint.foreign import TIMM_WEIGHTS_NAME, open_file, open_timm_folder, with_numerics
from mixlab.checkpoint.published import PUBLISHED, Published, find_published
from mixlab.checkpoint.store import CONFIG_NAME, WEIGHTS_NAME, Weights, load_weights, run_path
from mixlab.data.images.preprocess import ImagePreprocess, for_images
from mixlab.errors import UsageError, WeightsError, check_type, path_text
from mixlab.files import near_paths
from mixlab.models.catalog import config_of, family_of, settings_of
from mixlab.models.catalog import create_model as build_model
from mixlab.models.layers import Gelu
from mixlab.models.resolution import resample


def open_weights(
    path_or_name: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    gelu: Gelu | None = None,
    layer_norm_eps: float | None = None,
    resampled: bool = True,
    progress: Any = None,
) -> Weights:
    """The model in a run or weights folder, .npz, .safetensors, .pth or timm folder, or under a published name.

    path_or_name: a bare name may also be that of a run under ./runs.
    image_size: side or (height, width) in pixels; weights of another grid are resampled to it
        (models/resolution.py). For a bare file with as many patches it says the file's own shape, which it must
        where that number is no square.
    resampled: False opens weights of another grid as they are; image_size then only says the shape of such a file.
    gelu, layer_norm_eps: replace what the format implies. progress: called with (bytes done, bytes in all)
        while a published file is downloaded. WeightsError says what is wrong with the file, or that no such
        thing exists; UsageError that image_size does not fit.
    """
    name = path_text(path_or_name, "weights", "a run, a path or a published name")
    size = _as_size(image_size)
    path = existing_path(name)
    if path is not None:
        weights = _open_path(path, size)
    elif name in PUBLISHED or name.startswith(("mixer_", "timm/")):
        weights = _open_published(find_published(name), progress)
    else:
        close = near_paths(run_path(name)) or difflib.get_close_matches(name, PUBLISHED, n=1)
        lists = "`mixlab runs` lists runs, `mixlab models --pretrained` published weights"
        hint = f"did you mean {close[0]!r}?" if close else lists
        raise WeightsError("there is no such run, weights file or published name", where=name, hint=hint)
    weights = with_numerics(weights, gelu, layer_norm_eps)
    return _with_size(weights, size) if resampled else weights


def _as_size(image_size: Any) -> tuple[int, int] | None:
    """A side, or (height, width), as the latter. UsageError for what is neither."""
    if image_size is None:
        return None
    sides = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    for side in sides:
        check_type(side, (Integral,), "image_size", "a side, or (height, width), in pixels")
    if len(sides) != 2 or min(sides) < 1:
        raise UsageError(
            f"{image_size} is no image size", where="image_size", hint="a side, or (height, width), in pixels"
        )
    return int(sides[0]), int(sides[1])


def existing_path(path_or_name: str | Path) -> Path | None:
    """What is there: for a bare name the run of that name (store.run_path) if there is one, else under the path."""
    if not str(path_or_name):
        return None
    places = (run_path(str(path_or_name)), Path(path_or_name))
    return next((place for place in places if place.exists()), None)


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
    gives a new head (of zeros; timm draws its own); None is 1000, or what the weights have. image_size: side or
    (height, width).
    settings: in_channels and fields of `ModelConfig`, for fresh models only. UsageError for unknown names.
    """
    check_type(name, (str,), "name", "the name of a model, such as mixer_b16")
    check_type(pretrained, (str, type(None)), "pretrained", "a tag of `mixlab models --pretrained`, or None")
    check_type(num_classes, (Integral, type(None)), "num_classes", "a number, or None")
    image_size = _as_size(image_size)
    if pretrained is None:
        number = 1000 if num_classes is None else num_classes
        return build_model(name, num_classes=number, image_size=image_size, **settings)
    if settings:
        raise UsageError(f"{', '.join(settings)} cannot be set for published weights", where="pretrained")
    published = f"{name}:{pretrained}"
    if name.startswith("timm/"):
        stem, _, tag = name.partition(".")
        if tag not in ("", pretrained):
            raise UsageError(f"the name says {tag}, pretrained says {pretrained}", where="pretrained")
        published = f"{stem}.{pretrained}"
    weights = open_weights(find_published(published).name, image_size=image_size)
    model = weights.model
    if num_classes is not None and num_classes != weights.model_settings["num_classes"]:
        family_of(model).reset_head(model, num_classes)
    return model


def weights_folder(path_or_name: str | Path) -> Path | None:
    """The folder that weights and what describes them stand in, if they are here; None for others."""
    path = existing_path(path_or_name)
    if path is None and str(path_or_name) in PUBLISHED and PUBLISHED[str(path_or_name)].is_shipped:
        path = fetch_published(PUBLISHED[str(path_or_name)])
    if path is not None and path.is_file() and path.name in (WEIGHTS_NAME, TIMM_WEIGHTS_NAME):
        path = path.parent
    return path if path is not None and path.is_dir() else None


def _open_path(path: Path, image_size: tuple[int, int] | None) -> Weights:
    if path.name in (WEIGHTS_NAME, TIMM_WEIGHTS_NAME) and (path.parent / CONFIG_NAME).is_file():
        path = path.parent  # beside the file stands what it does not say itself
    if path.is_dir() and not (path / TIMM_WEIGHTS_NAME).is_file():
        return load_weights(path)
    if path.is_dir():
        return open_timm_folder(path)
    return open_file(path, image_size)


def _open_published(published: Published, progress: Any) -> Weights:
    path = fetch_published(published, progress=progress)
    weights = _open_path(path, None)  # all of them have a square grid
    if published.is_shipped:  # its own config.json says all the rest, and both come with the package
        return replace(weights, provenance={"source": published.name} | weights.provenance, cautions=())
    origin, caution = origin_of(published, path)
    preprocess = replace(
        for_images(weights.preprocess, "a published file"),
        mean=published.mean,
        std=published.std,
        crop_fraction=published.crop_fraction,
        interpolation=published.interpolation,
    )
    weights = replace(
        weights,
        preprocess=preprocess,
        cautions=() if caution is None else (caution,),
        provenance={
            "source": published.name,
            **origin,
            "format": weights.provenance["format"],
            "published": published.provenance,
            "top1": published.top1,
            "not_verified": published.not_verified,
        },
    )
    return with_numerics(weights, published.gelu, None)


def _with_size(weights: Weights, image_size: tuple[int, int] | None) -> Weights:
    """The same weights for images of another size, resampled."""
    own = weights.preprocess.input_size
    if image_size is None or image_size == own:
        return weights
    if config_of(weights.model) is None:
        raise UsageError(
            f"these weights are of {weights.model_settings['name']} for images of {own[0]}x{own[1]}",
            where="image_size",
            hint="only a Mixer can change its resolution",
        )
    resized = weights.preprocess.with_size(image_size)
    if isinstance(resized, ImagePreprocess) and resized.permutation is not None:
        raise UsageError(
            f"these weights take permuted images of {own[0]}x{own[1]}, and another size has other patches",
            where="image_size",
            hint="resample the weights from before `mixlab permute`",
        )
    model = resample(weights.model, image_size)
    return replace(
        weights,
        model=model.eval(),
        model_settings=settings_of(model.config),
        preprocess=resized,
        provenance=weights.provenance | {"resampled_from": f"{own[0]}x{own[1]}"},
    )

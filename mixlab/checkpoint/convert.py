"""Weights from any known format to any other, with what changes on the way measured and written down."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mixlab.checkpoint.foreign import TIMM_WEIGHTS_NAME
from mixlab.checkpoint.layouts import LAYOUTS, OURS
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.sidecar import sidecar_path, write_sidecar
from mixlab.checkpoint.store import CONFIG_NAME, Weights, save_weights
from mixlab.data.images.preprocess import for_images
from mixlab.errors import UsageError, WeightsError
from mixlab.escape import without_places
from mixlab.files import written_whole
from mixlab.models.catalog import MIXER, MODELS, config_of, family_of, make_mixer, settings_of
from mixlab.models.mixer import MixerConfig

FORMATS = ("mixlab", "official", "timm", "mixlab-timm", "mmpretrain", "lucidrains")
NUM_PROBES = 16  # random images on which two models are compared
# The Mixers that timm can make, by (num_blocks, hidden_dim, patch_size): its functions fix these.
TIMM_NAMES = {
    (8, 512, 32): "mixer_s32_224",
    (8, 512, 16): "mixer_s16_224",
    (12, 768, 32): "mixer_b32_224",
    (12, 768, 16): "mixer_b16_224",
    (24, 1024, 32): "mixer_l32_224",
    (24, 1024, 16): "mixer_l16_224",
}


def convert(
    weights: Weights,
    destination: Path,
    *,
    format: str | None = None,
    accept_gelu_change: bool = False,
    half: bool = False,
) -> dict[str, Any]:
    """Write `weights` to `destination`, read them back and compare; what `mixlab convert --json` prints.

    format: one of FORMATS; None takes `official` for *.npz and else `mixlab`. Where the target's own code runs
    another GELU or epsilon than these weights, UsageError unless `accept_gelu_change`; the change of the logits
    is then measured, returned and stored. Beside a file that holds tensors only, FILE.json keeps the rest, and
    `open_weights` reads it: nothing is lost on the way there and back.
    half: a mixlab folder in float16, half the size; what that changes in the logits is measured and returned.
    """
    format = format or ("official" if destination.suffix == ".npz" else OURS.name)
    if format not in FORMATS:
        raise UsageError(
            f"there is no format {format!r}", where="--format", hint=f"it is one of {', '.join(FORMATS)}"
        )
    if not destination.name:
        raise UsageError("it needs a name", where="DESTINATION", hint="of the file or folder to write")
    for path in (destination, sidecar_path(destination)):
        if path.exists():
            raise UsageError("it exists already", where=str(path), hint="choose another name")
    before = weights.model
    if half:
        weights = _rounded(weights, format)
    model = weights.model
    result: dict[str, Any] = {"format": format, "destination": str(destination), "change": None}
    record: dict[str, Any] = {"converted_from": without_places(weights.provenance)}
    config = config_of(model)
    if format != OURS.name:
        config = _plain_config(weights, format)
        result["change"] = record["change"] = _numerics_change(model, config, format, accept_gelu_change)
        record |= {"gelu": config.gelu, "layer_norm_eps": config.layer_norm_eps}
    elif half and config is not None:
        compared = _compare(_logits(before, config), _logits(model, config))
        result["change"] = {"numerics": "float32 -> float16 weights"} | compared
    with written_whole(destination) as temporary:
        # Read back before it gets its name: what went wrong is never seen under it.
        if format == OURS.name:
            save_weights(temporary, weights, half=half)
        elif format in ("timm", "mixlab-timm"):
            _write_timm_folder(temporary, weights, _plain_config(weights, format), format, record)
        else:
            _write_file(temporary, model, format, record)
        result |= _check(temporary, model, format)
    if format not in (OURS.name, "timm", "mixlab-timm"):
        write_sidecar(destination, weights, record)
    return result


def _rounded(weights: Weights, format: str) -> Weights:
    """The same with every weight what it is in float16. UsageError where it would not be written as such."""
    if format != OURS.name:
        raise UsageError(f"{format} has 32-bit weights", where="--half", hint="leave --format out")
    model = copy.deepcopy(weights.model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
                if not bool(torch.isfinite(tensor).all()):
                    raise WeightsError(f"{name} has values beyond float16's 65,504", where="--half")
    return replace(weights, model=model)


def _plain_config(weights: Weights, format: str) -> MixerConfig:
    """The dimensions of a model that other projects' formats can hold; UsageError for any other."""
    config = config_of(weights.model)
    if config is None or family_of(weights.model, exactly=True) is not MIXER:
        raise UsageError(
            f"only a plain Mixer can be written as {format}; this is {weights.model_settings['name']}, "
            f"a {type(weights.model).__name__}",
            where="--format",
            hint="--format mixlab keeps any model",
        )
    if for_images(weights.preprocess, f"the format {format}").permutation is not None:
        raise UsageError(
            f"these weights take permuted images, which {format} cannot say",
            where="--format",
            hint="--format mixlab keeps the permutation",
        )
    return config


def _numerics_change(
    model: nn.Module, config: MixerConfig, format: str, accepted: bool
) -> dict[str, Any] | None:
    """What the target's code would compute differently; None if nothing. UsageError unless accepted."""
    if format == "mixlab-timm":
        return None
    target = LAYOUTS[format]
    other = replace(config, gelu=target.gelu, layer_norm_eps=target.layer_norm_eps)
    if other == config:
        return None
    text = (
        f"{config.gelu} -> {other.gelu} GELU, epsilon {config.layer_norm_eps:g} -> {other.layer_norm_eps:g}"
    )
    if not accepted:
        raise UsageError(
            f"{target.title} would run these weights with other numerics: {text}",
            where="--format",
            hint="--accept-gelu-change writes them and measures the difference; "
            "--format mixlab-timm keeps them exact wherever mixlab is installed",
        )
    with torch.device("meta"):
        theirs = make_mixer(other)
    theirs.load_state_dict(model.state_dict(), assign=True)
    return {"numerics": text} | _compare(_logits(model, config), _logits(theirs.eval(), config))


def _compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    return {
        "max_difference": float((ours - theirs).abs().max()),
        "largest_logit": float(ours.abs().max()),
        "same_top1": int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum()),
        "num_probes": len(ours),
    }


def probes(config: MixerConfig) -> Tensor:
    """Random images in [-1, 1] with something coarse and something fine in them: (NUM_PROBES, channels, H, W)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(NUM_PROBES, config.in_channels, 7, 7, generator=generator)
    coarse = nn.functional.interpolate(coarse, size=config.image_size)
    return 1.5 * coarse + 0.5 * torch.rand(coarse.shape, generator=generator) - 1


@torch.inference_mode()
def _logits(model: nn.Module, config: MixerConfig) -> Tensor:
    return torch.cat([model(image[None]) for image in probes(config)])


def _check(path: Path, model: nn.Module, format: str) -> dict[str, Any]:
    """Read `path` back: the same tensors, and for timm the same logits from timm's own model."""
    config = config_of(model)
    if config is None:  # a timm model in our folder: its tensors are compared
        again = open_weights(path).model
        same = all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )
        if not same:
            raise WeightsError("what was read back differs from what was written", where=str(path))
        return {"read_back": "identical"}
    numerics = {"gelu": config.gelu, "layer_norm_eps": config.layer_norm_eps}
    again = open_weights(path, image_size=config.image_size, **numerics).model  # type: ignore[arg-type]
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        if not torch.equal(before, after):
            raise WeightsError(f"{name} was read back otherwise than it was written", where=str(path))
    if format != "timm":
        return {"read_back": "identical"}
    import timm

    theirs = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    compared = _compare(_logits(model, config), _logits(theirs, config))
    return {"read_back": "identical", "in_timm": compared}


def _write_file(path: Path, model: nn.Module, format: str, record: dict[str, Any]) -> None:
    layout = LAYOUTS[format]
    config = config_of(model)
    assert config is not None
    keys = layout.keys(config.num_blocks)
    tensors = {
        keys[name]: layout.to_theirs(name, tensor.detach().cpu().float()).contiguous()
        for name, tensor in model.state_dict().items()
    }
    if layout.container == "npz":
        with path.open("wb") as file:  # a handle, since numpy adds .npz to a name
            np.savez(file, **{key: tensor.numpy() for key, tensor in tensors.items()})  # type: ignore[arg-type]
    elif format == "mmpretrain":
        torch.save({"meta": {"mixlab": json.dumps(record)}, "state_dict": tensors}, path)
    else:
        torch.save(tensors, path)


def _write_timm_folder(
    path: Path, weights: Weights, config: MixerConfig, format: str, record: dict[str, Any]
) -> None:
    """config.json and model.safetensors, as timm's `local-dir:` and transformers' timm wrapper take them."""
    model, preprocess = weights.model, for_images(weights.preprocess, "timm's format")
    if format == "timm":
        layout = LAYOUTS["timm"]
        architecture, arguments = _timm_model(config)
    else:
        layout = OURS
        architecture, arguments = _mixlab_timm_model(config)
    description = {
        "architecture": architecture,
        "num_classes": config.num_classes,
        "num_features": config.hidden_dim,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.in_channels, *config.image_size],
            "fixed_input_size": True,
            "num_classes": config.num_classes,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            # timm's squash crops too; what is only stretched keeps all of the image.
            "crop_pct": 1.0 if preprocess.fit == "stretch" else preprocess.crop_fraction,
            "crop_mode": "center" if preprocess.fit == "crop" else "squash",
            "interpolation": preprocess.interpolation,
            "first_conv": "stem.proj" if format == "timm" else "stem",
            "classifier": "head",
        },
        "label_names": list(weights.class_names),
        "mixlab": record | {"fit": preprocess.fit, "grey_max": preprocess.grey_max},
    }
    path.mkdir()
    keys = layout.keys(config.num_blocks)
    tensors = {keys[name]: t.detach().cpu().float().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, path / TIMM_WEIGHTS_NAME, metadata={"format": "pt"})
    (path / CONFIG_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _timm_model(config: MixerConfig) -> tuple[str, dict[str, Any]]:
    """timm's name for this Mixer, and the arguments that it lets one give."""
    name = TIMM_NAMES.get((config.num_blocks, config.hidden_dim, config.patch_size))
    if name is None:
        known = ", ".join(TIMM_NAMES.values())
        raise UsageError(
            f"timm has no Mixer of {config.num_blocks} blocks, C {config.hidden_dim}, patch {config.patch_size}",
            where="--format",
            hint=f"it has {known}; --format mixlab-timm takes any, where mixlab is installed",
        )
    arguments: dict[str, Any] = {}
    if config.image_size != (224, 224):
        arguments["img_size"] = list(config.image_size)
    if config.in_channels != 3:
        arguments["in_chans"] = config.in_channels
    if (2 * config.token_mlp_dim, config.channel_mlp_dim) != (config.hidden_dim, 4 * config.hidden_dim):
        # timm multiplies and cuts off: half a unit more survives the rounding of the ratio.
        dims = (config.token_mlp_dim, config.channel_mlp_dim)
        arguments["mlp_ratio"] = [(dim + 0.5) / config.hidden_dim for dim in dims]
    return name, arguments


def _mixlab_timm_model(config: MixerConfig) -> tuple[str, dict[str, Any]]:
    settings = settings_of(config)
    name = settings.pop("name")
    settings.pop("num_classes")
    arguments: dict[str, Any] = {"gelu": config.gelu, "layer_norm_eps": config.layer_norm_eps}
    arguments |= {"img_size": list(settings.pop("image_size")), "in_chans": settings.pop("in_channels")}
    if name not in MODELS:
        name, settings["patch_size"] = "mixer_s16", config.patch_size
    drop = settings.pop("stochastic_depth", 0.0)
    return f"mixlab_{name}", arguments | settings | ({"drop_path_rate": drop} if drop else {})

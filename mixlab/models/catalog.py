"""Models by name: our Mixers (`mixer_b16`) and any timm model (`timm/resnet18`)."""

import difflib
import re
from dataclasses import dataclass, fields
from math import gcd
from typing import Any, Literal

from torch import nn

from mixlab.errors import UsageError
from mixlab.models.mixer import SIZES, Mixer, MixerConfig
from mixlab.models.pyramid import PYRAMID_SIZES, PyramidConfig, PyramidMixer
from mixlab.models.variants import VariantConfig, VariantMixer
from mixlab.settings import setting

# The models the paper names, then ours for small images: name -> (image side, what it is for).
# Any other patch size works too: `mixer_SIZE` or `mixer_pyramid_SIZE` followed by the patch side.
MODELS = {
    "mixer_s32": (224, "paper, Table 1"),
    "mixer_s16": (224, "paper, Table 1"),
    "mixer_s8": (224, "as released with GSAM"),
    "mixer_b32": (224, "paper, Table 1"),
    "mixer_b16": (224, "paper, Table 1"),
    "mixer_l32": (224, "paper, Table 1"),
    "mixer_l16": (224, "paper, Table 1"),
    "mixer_h14": (224, "paper, Table 1"),
    "mixer_nano4": (32, "small images, hours of training"),
    "mixer_mini4": (32, "small images, tens of minutes of training"),
    "mixer_micro4": (32, "small images, minutes of training"),
    "mixer_pico2": (8, "8-pixel images such as digits"),
    "mixer_pyramid_micro2": (32, "small images, minutes of training"),
    "mixer_pyramid_mini2": (32, "small images, minutes to hours of training"),
    "mixer_pyramid_nano2": (32, "small images, half an hour of training or more"),
    "mixer_pyramid_t4": (224, "photos, not trained yet"),
    "mixer_pyramid_s4": (224, "photos, not trained yet"),
}
PYRAMID = "pyramid_"  # begins the size in the name of a pyramid
# Names that leave the size open, in a recipe: a budget chooses it (planning/model_size.py), else it is this one.
FAMILIES = {"mixer_pyramid": "mixer_pyramid_mini"}

CUSTOM = "custom"  # the size in the name of a Mixer whose dimensions are all given
DIMENSIONS = ("num_blocks", "hidden_dim", "token_mlp_dim", "channel_mlp_dim")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model; what is None follows from the name or from the data.

    name: a name from `mixlab models`, `mixer_SIZE` with any patch side (in a recipe also without, then the one that
        suits the pictures; or `mixer_pyramid`, then also the size that suits the --budget), or `timm/NAME`.
    patch_size, hidden_dim, token_mlp_dim, channel_mlp_dim, num_blocks: replace the named size's value.
    stochastic_depth: drop probability of the last block's branches (timm models: their drop_path_rate).
    head_bias, branch_init_scale: initial values of a Mixer, see `MixerConfig`.
    gelu, layer_norm_eps: None is the authors' `tanh` and 1e-6, or what the weights to start from were trained with.
    token_mixing, token_groups: a variant of the token-mixing MLP and its number of groups, see models/variants.py.
    stage_blocks, token_mix, local: of a pyramid only: how many blocks each stage has, and its switches, see
        models/pyramid.py; hidden_dim and channel_mlp_dim are then those of the first stage.
    """

    name: str | None = setting(
        None, "A name from `mixlab models`, or timm/NAME; auto suits the data.", "common"
    )
    patch_size: int | None = setting(None, "Side of a patch in pixels; auto suits the pictures.", "common")
    hidden_dim: int | None = setting(None, "Width C of a token; auto is the named size's.")
    token_mlp_dim: int | None = setting(None, "Width D_S of the token-mixing MLP; auto is the named size's.")
    channel_mlp_dim: int | None = setting(
        None, "Width D_C of the channel-mixing MLP; auto is the named size's."
    )
    num_blocks: int | None = setting(None, "Number of blocks; auto is the named size's.")
    stochastic_depth: float = setting(
        0.0, "Drop probability of the last block's branches; earlier blocks have less."
    )
    head_bias: float = setting(0.0, "Initial bias of the classifier.", "expert")
    branch_init_scale: float = setting(1.0, "Factor on the initial weights of what a block adds.", "expert")
    gelu: Literal["tanh", "erf"] | None = setting(
        None,
        "tanh as the authors have it, or erf; auto is tanh, or that of the weights to start from.",
        "expert",
    )
    layer_norm_eps: float | None = setting(
        None,
        "Of all layer normalisations; auto is the authors' 1e-6, or that of the weights to start from.",
        "expert",
    )
    token_mixing: Literal["shared", "blocks", "untied", "grouped", "projected", "pyramid"] = setting(
        "shared", "A variant of the token-mixing MLP.", "expert"
    )
    token_groups: int = setting(1, "Number of groups of a variant.", "expert")
    stage_blocks: tuple[int, ...] | None = setting(
        None, "Of a pyramid: how many blocks each stage has; auto is the named size's.", "expert"
    )
    token_mix: Literal["full", "axial"] | None = setting(
        None,
        "Of a pyramid: tokens mixed all at once, or by rows and columns; auto is by rows and columns.",
        "expert",
    )
    local: Literal["none", "shift"] | None = setting(
        None, "Of a pyramid: channels shifted to neighbours or not; auto shifts.", "expert"
    )


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    **overrides: Any,
) -> nn.Module:
    """A freshly initialised model: images (B, in_channels, H, W) to logits (B, num_classes).

    image_size: side or (height, width) in pixels; None takes the named model's own.
    overrides: fields of `ModelConfig` other than the name. Unknown names raise UsageError.
    """
    config = ModelConfig(name=name, **_known(overrides))
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    if name.startswith("timm/"):
        return _create_timm(config, num_classes, image_size, in_channels)
    dimensions = mixer_config(config, num_classes=num_classes, image_size=image_size, in_channels=in_channels)
    return make_mixer(dimensions)


def make_mixer(config: MixerConfig) -> Mixer:
    """A freshly initialised Mixer of these dimensions, of the kind that they belong to."""
    if isinstance(config, PyramidConfig):
        return PyramidMixer(config)
    return VariantMixer(config) if isinstance(config, VariantConfig) else Mixer(config)


def mixer_config(
    config: ModelConfig, *, num_classes: int, image_size: tuple[int, int] | None = None, in_channels: int = 3
) -> MixerConfig:
    """The full dimensions of the Mixer that `config` names."""
    assert config.name is not None
    size, patch_size = parse_mixer_name(config.name)
    is_pyramid = size.startswith(PYRAMID)
    sizes: dict[str, tuple[Any, ...]] = {
        **SIZES,
        **{PYRAMID + key: row for key, row in PYRAMID_SIZES.items()},
    }
    named = dict(zip(DIMENSIONS, sizes.get(size, (0, 0, 0, 0)), strict=True))  # 0 is refused by MixerConfig
    side = MODELS.get(config.name, (224 if size in "sblh" else 32, ""))[0]
    values: dict[str, Any] = {key: getattr(config, key) or named[key] for key in DIMENSIONS}
    pyramid_only = {key: getattr(config, key) for key in ("stage_blocks", "token_mix", "local")}
    pyramid_only = {key: value for key, value in pyramid_only.items() if value is not None}
    if is_pyramid:
        stages = pyramid_only.setdefault("stage_blocks", named["num_blocks"] or ())
        values["num_blocks"] = config.num_blocks or sum(stages)
    elif pyramid_only:
        raise UsageError(
            "only a pyramid has stages, axial mixing and shifts",
            where=f"model.{next(iter(pyramid_only))}",
            hint="such as mixer_pyramid_micro2",
        )
    values |= {key: getattr(config, key) for key in ("stochastic_depth", "head_bias", "branch_init_scale")}
    values |= {
        key: getattr(config, key)
        for key in ("gelu", "layer_norm_eps")
        if getattr(config, key) is not None  # else MixerConfig's own, the authors'
    }
    kind: type[MixerConfig] = MixerConfig
    if is_pyramid and config.token_mixing != "shared":
        raise UsageError("a pyramid has token_mix instead", where="model.token_mixing")
    if is_pyramid:
        kind = PyramidConfig
        values |= pyramid_only
    if config.token_mixing != "shared":
        kind = VariantConfig
        values |= {"token_mixing": config.token_mixing, "token_groups": config.token_groups}
    elif config.token_groups != 1:
        raise UsageError("shared token mixing has no groups", where="model.token_groups")
    return kind(
        image_size=image_size or (side, side),
        patch_size=config.patch_size or patch_size,
        num_classes=num_classes,
        in_channels=in_channels,
        **values,
    )


def settings_of(config: MixerConfig) -> dict[str, Any]:
    """Keyword arguments of `create_model` for a Mixer of these dimensions, under the paper's name if it has one."""
    dimensions = {key: getattr(config, key) for key in DIMENSIONS}
    prefix = ""
    sizes: dict[str, tuple[Any, ...]] = {**SIZES}
    if isinstance(config, PyramidConfig):
        prefix, sizes = PYRAMID, {**PYRAMID_SIZES}
        dimensions["num_blocks"] = config.stage_blocks
    size = next((size for size, known in sizes.items() if known == tuple(dimensions.values())), None)
    settings = {
        "name": f"mixer_{prefix}{size or CUSTOM}{config.patch_size}",
        "num_classes": config.num_classes,
    }
    settings |= {"image_size": config.image_size, "in_channels": config.in_channels}
    if isinstance(config, PyramidConfig):
        dimensions["num_blocks"] = config.num_blocks
    if size is None:
        settings |= dimensions
    usual_values = {field.name: field.default for field in (*fields(ModelConfig), *fields(MixerConfig))}
    for field in fields(ModelConfig):
        usual = usual_values[field.name]
        if (
            field.name not in ("name", "patch_size", *DIMENSIONS)
            and getattr(config, field.name, usual) != usual
        ):
            settings[field.name] = getattr(config, field.name)
    return settings


def parse_mixer_name(name: str) -> tuple[str, int]:
    """`mixer_b16` -> ("b", 16); UsageError with the nearest name for anything else."""
    match = re.fullmatch(r"mixer_([a-z_]+?)(\d+)", name)
    if match is None or match[1] not in _size_names() or int(match[2]) == 0:
        raise UsageError(f"there is no model called {name!r}", where="model", hint=_nearest(name, MODELS))
    return match[1], int(match[2])


def _size_names() -> tuple[str, ...]:
    return (*SIZES, CUSTOM, *(PYRAMID + size for size in (*PYRAMID_SIZES, CUSTOM)))


def name_with_patch(name: str, image_size: tuple[int, int], patch_size: int | None = None) -> str:
    """`mixer_micro`, a size without a patch side, with patch_size or what suits `image_size`; others as they are.

    It divides both sides, also by the stages of a pyramid, and comes nearest to 8 patches along the shorter one (4
    for tiny images), or 16 for a pyramid.
    """
    size = name.removeprefix("mixer_")
    if not name.startswith("mixer_") or size not in _size_names():
        return name
    if patch_size is not None:
        return f"{name}{patch_size}"
    stages = PYRAMID_SIZES.get(size.removeprefix(PYRAMID), ((),))[0] if size.startswith(PYRAMID) else (1,)
    factor = 2 ** (len(stages) - 1)
    short = min(image_size)
    wanted = short / (16 if len(stages) > 1 else 8 if short > 16 else 4)
    common = gcd(*image_size)
    sides = [side for side in range(1, common + 1) if common % (side * factor) == 0]
    if not sides:
        raise UsageError(
            f"no patch divides images of {image_size[0]}x{image_size[1]} for the {len(stages)} stages of {name}",
            where="model.name",
            hint=f"sides must be multiples of {factor}: --image-size, or a flat Mixer such as mixer_micro",
        )
    return f"{name}{min(sides, key=lambda side: (abs(side - wanted), side))}"


def display_name(name: str) -> str:
    """`mixer_b16` -> `Mixer-B/16`; other names stay as they are."""
    if not name.startswith("mixer_"):
        return name
    size, patch_size = parse_mixer_name(name)
    return f"{'-'.join(part.capitalize() for part in ['mixer', *size.split('_')])}/{patch_size}"


def _known(overrides: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(ModelConfig)} - {"name"}
    for key in overrides:
        if key not in names:
            raise UsageError(
                f"models have no setting {key!r}", where=f"model.{key}", hint=_nearest(key, names)
            )
    return overrides


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "`mixlab models` lists the names"


def _create_timm(
    config: ModelConfig, num_classes: int, image_size: tuple[int, int] | None, in_channels: int
) -> nn.Module:
    import timm

    assert config.name is not None
    timm_name = config.name.removeprefix("timm/")
    if timm_name.startswith("baseline_"):
        import mixlab.models.baselines  # noqa: F401  registers them
    if not timm.is_model(timm_name.split(".")[0]):
        known = timm.list_models()
        raise UsageError(
            f"timm has no model called {timm_name!r}",
            where="model",
            hint=_nearest(timm_name, known).replace("mixlab models", "mixlab models --timm"),
        )
    default = ModelConfig()
    for field in fields(ModelConfig):
        shared = ("name", "patch_size", "stochastic_depth")
        if field.name not in shared and getattr(config, field.name) != getattr(default, field.name):
            raise UsageError(f"{field.name} cannot be set for a timm model", where=f"model.{field.name}")
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if config.stochastic_depth:
        settings["drop_path_rate"] = config.stochastic_depth
    if config.patch_size:
        settings["patch_size"] = config.patch_size
    if image_size is not None:
        try:
            return timm.create_model(timm_name, img_size=image_size, **settings)
        except TypeError as error:
            # Convolutional networks take any size and have no such argument; anything else is a real error.
            if "img_size" not in str(error):
                raise _timm_refusal(timm_name, error) from error
        except (AssertionError, ValueError) as error:
            raise _timm_refusal(timm_name, error) from error
    try:
        return timm.create_model(timm_name, **settings)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise _timm_refusal(timm_name, error) from error


def _timm_refusal(timm_name: str, error: Exception) -> UsageError:
    return UsageError(f"timm cannot build {timm_name!r} with these settings: {error}", where="model")

"""Models by name: our Mixers (`mixer_b16`) and any timm model (`timm/resnet18`)."""

import difflib
import re
from dataclasses import dataclass, fields
from math import gcd
from typing import Any

from torch import nn

from mixlab.errors import UsageError
from mixlab.models import from_timm
from mixlab.models.family import Family, ModelKeys, PyramidKeys, VariantKeys, with_new_names
from mixlab.models.grids import resample_grid
from mixlab.models.mixer import SIZES, Mixer, MixerConfig
from mixlab.models.orders import absorb_flat
from mixlab.models.pyramid import PYRAMID_SIZES, PyramidConfig, PyramidMixer
from mixlab.models.pyramid_permutation import absorb_pyramid
from mixlab.models.variants import VariantConfig, VariantMixer

DIMENSIONS = ("num_blocks", "hidden_dim", "token_mlp_dim", "channel_mlp_dim")
CUSTOM = "custom"  # the size in the name of a Mixer whose dimensions are all given
PYRAMID = "pyramid_"  # begins the size in the name of a pyramid


def _sizes(rows: dict[str, tuple[Any, ...]], *keys: str) -> dict[str, dict[str, Any]]:
    return {size: dict(zip(keys, row, strict=True)) for size, row in rows.items()}


def _with_stages(values: dict[str, Any]) -> dict[str, Any]:
    stages = values.get("stage_blocks", ())
    return {"stage_blocks": stages, "num_blocks": sum(stages)} | values


MIXER = Family(
    title="a plain Mixer",
    Config=MixerConfig,
    Model=Mixer,
    sizes=_sizes(SIZES, *DIMENSIONS),
    named={
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
    },
    resample=resample_grid,
    absorb=absorb_flat,
)
PYRAMIDS = Family(
    title="a pyramid",
    Config=PyramidConfig,
    Model=PyramidMixer,
    prefix=PYRAMID,
    sizes=_sizes(PYRAMID_SIZES, "stage_blocks", *DIMENSIONS[1:]),
    named={
        "mixer_pyramid_micro2": (32, "small images, minutes of training"),
        "mixer_pyramid_mini2": (32, "small images, minutes to hours of training"),
        "mixer_pyramid_nano2": (32, "small images, half an hour of training or more"),
        "mixer_pyramid_t4": (224, "photos, not trained yet"),
        "mixer_pyramid_s4": (224, "photos, not trained yet"),
    },
    keys=tuple(PyramidKeys.__dataclass_fields__),
    complete=_with_stages,
    resample=resample_grid,
    absorb=absorb_pyramid,
)
VARIANTS = Family(
    title="a variant of token mixing",
    Config=VariantConfig,
    Model=VariantMixer,
    sizes=MIXER.sizes,
    keys=tuple(VariantKeys.__dataclass_fields__),
    takes=lambda settings: settings.token_mixing != "shared",
)
TIMM = Family(
    title="a model of timm",
    Config=None,
    Model=nn.Module,
    stem=from_timm.stem,
    classifier=from_timm.classifier,
    layers=from_timm.layers,
    reset_head=from_timm.reset_head,
    absorb=from_timm.absorb,
)
# A new family: its line here. The first that takes a model has it; timm's are the rest.
FAMILIES = (PYRAMIDS, VARIANTS, MIXER)

# The models the paper names, then ours for small images: name -> (image side, what it is for).
# Any other patch size works too: `mixer_SIZE` or `mixer_pyramid_SIZE` followed by the patch side.
MODELS = {name: facts for family in reversed(FAMILIES) for name, facts in family.named.items()}
# Names that leave the size open, in a recipe: a budget chooses it (planning/model_size.py), else it is this one.
OPEN_SIZES = {"mixer_pyramid": "mixer_pyramid_mini"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(PyramidKeys, VariantKeys, ModelKeys):
    """Which model; what is None follows from the name or from the data. See `family.py`, key by key."""


def family_of(model: nn.Module, *, exactly: bool = False) -> Family:
    """The family of a model. exactly: of its very class, for what a subclass might have changed."""
    exact = next((family for family in FAMILIES if type(model) is family.Model), None)
    if exact is not None or exactly:
        return exact or TIMM
    return next((family for family in FAMILIES if isinstance(model, family.Model)), TIMM)


def config_of(model: nn.Module) -> MixerConfig | None:
    """The dimensions of a Mixer of any kind; None for a model of timm."""
    if family_of(model).Config is None:
        return None
    config: MixerConfig = model.config  # type: ignore[assignment]
    return config


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
    config = ModelConfig(name=name, **_known(with_new_names(overrides)))
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    if name.startswith(from_timm.PREFIX):
        _check_keys(config, TIMM, ("name", "patch_size", "stochastic_depth"))
        return from_timm.create(
            name, num_classes, image_size, in_channels, config.stochastic_depth, config.patch_size
        )
    dimensions = mixer_config(config, num_classes=num_classes, image_size=image_size, in_channels=in_channels)
    return make_mixer(dimensions)


def make_mixer(config: MixerConfig) -> Mixer:
    """A freshly initialised Mixer of these dimensions, of the kind that they belong to."""
    model: Any = _family_with(config).Model
    made: Mixer = model(config)
    return made


def _family_with(config: MixerConfig) -> Family:
    exact = next((family for family in FAMILIES if type(config) is family.Config), None)
    return exact or next(family for family in FAMILIES if isinstance(config, family.Config))


def mixer_config(
    config: ModelConfig, *, num_classes: int, image_size: tuple[int, int] | None = None, in_channels: int = 3
) -> MixerConfig:
    """The full dimensions of the Mixer that `config` names."""
    assert config.name is not None
    prefix, size, patch_size = _parsed(config.name)
    family = next(family for family in FAMILIES if family.prefix == prefix and family.takes(config))
    shared = tuple(ModelKeys.__dataclass_fields__)
    _check_keys(config, family, (*shared, *family.keys))
    side = MODELS.get(config.name, (224 if prefix + size in "sblh" else 32, ""))[0]
    named = family.sizes.get(size, {})
    values: dict[str, Any] = {
        key: named.get(key) if getattr(config, key) is None else getattr(config, key)
        for key in (*shared, *family.keys)
        if key != "name"
    }
    values["patch_size"] = patch_size if values["patch_size"] is None else values["patch_size"]
    # What is still open, the configuration's own default decides; a dimension has none: 0 is refused by name there.
    values = family.complete({key: value for key, value in values.items() if value is not None})
    values = dict.fromkeys(DIMENSIONS, 0) | values
    made: MixerConfig = family.Config(
        image_size=image_size or (side, side), num_classes=num_classes, in_channels=in_channels, **values
    )
    return made


def _check_keys(config: ModelConfig, family: Family, known: tuple[str, ...]) -> None:
    """UsageError if a setting is given that models of this family do not have."""
    usual = ModelConfig()
    for key in ModelConfig.__dataclass_fields__:
        if key not in known and getattr(config, key) != getattr(usual, key):
            owner = next((other for other in FAMILIES if key in other.keys), MIXER)
            example = next(iter(owner.named), None)
            own = f"; {family.title}'s own are {', '.join(family.keys)}" if family.keys else ""
            raise UsageError(
                f"only {owner.title} has {key}, {config.name} is {family.title}",
                where=f"model.{key}",
                hint=(f"such as {example}" if example else "leave it out") + own,
            )


def settings_of(config: MixerConfig) -> dict[str, Any]:
    """Keyword arguments of `create_model` for a Mixer of these dimensions, under the paper's name if it has one."""
    family = _family_with(config)
    size = next(
        (
            size
            for size, known in family.sizes.items()
            if all(getattr(config, key) == value for key, value in known.items())
        ),
        None,
    )
    settings = {
        "name": f"mixer_{family.prefix}{size or CUSTOM}{config.patch_size}",
        "num_classes": config.num_classes,
        "image_size": config.image_size,
        "in_channels": config.in_channels,
    }
    if size is None:
        settings |= {key: getattr(config, key) for key in DIMENSIONS}
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
    prefix, size, patch_size = _parsed(name)
    return prefix + size, patch_size


def _parsed(name: str) -> tuple[str, str, int]:
    match = re.fullmatch(r"mixer_([a-z_]+?)(\d+)", name)
    if match is None or match[1] not in _size_names() or int(match[2]) == 0:
        hint = f"did you mean 'timm/{name}'?" if from_timm.has(name) else _nearest(name, MODELS)
        raise UsageError(f"there is no model called {name!r}", where="model", hint=hint)
    prefix, size = _size_names()[match[1]]
    return prefix, size, int(match[2])


def _size_names() -> dict[str, tuple[str, str]]:
    """What stands for a size in names, with the family's prefix and without: `pyramid_t` -> ("pyramid_", "t")."""
    return {
        family.prefix + size: (family.prefix, size) for family in FAMILIES for size in (*family.sizes, CUSTOM)
    }


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
    prefix, size = _size_names()[size]
    sizes = next(family.sizes for family in FAMILIES if family.prefix == prefix)
    stages = sizes.get(size, {}).get("stage_blocks", (1,))
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

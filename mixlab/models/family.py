"""What a family of models tells the rest of mixlab, and the settings that models share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn

from mixlab.models.layers import Gelu
from mixlab.settings import setting

# Names that settings of models had before, in files of weights and of recipes: key -> today's key.
OLD_KEYS = {"token_mix": "stage_mixing"}
# And values: key -> old value -> today's.
OLD_VALUES = {"token_mixing": {"pyramid": "shrinking"}}


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model under the names of today."""
    renamed = {OLD_KEYS.get(key, key): value for key, value in settings.items()}
    return {
        key: OLD_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
        for key, value in renamed.items()
    }


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model: its classes, its sizes, and what the rest of mixlab may ask of a model of it.

    title: what messages call one. Config, Model: the classes of its dimensions and of the model itself.
    prefix: what stands between `mixer_` and the size in its names; families may share one.
    sizes: by size, what it stands for among the settings of a model (`DIMENSIONS` and `keys`).
    named: the names that `mixlab models` lists: the side of their images and what they are for.
    keys: settings that this family alone has. The others' must be left at their defaults.
    takes: whether a model of these settings, whose name has the prefix, is of this family.
    complete: settings with what follows from others of them, before the dimensions are made of them.
    stem: the patch stem of a model. classifier: how the names of its classifier's tensors begin.
    layers: the order of its layers, as patterns of timm's `group_with_matcher`, for rates and freezing by layer.
    reset_head: a new classifier for so many classes.
    resample: the model for another image size and patch size (resolution.py); None where it has no such thing.
    absorb: change a model in place so that it gives on permuted images what it gave on the originals: orders of
        patches and of the pixels in each (permutation.py); None where it cannot.
    """

    title: str
    Config: Any
    Model: type[nn.Module]
    prefix: str = ""
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    named: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    takes: Callable[[Any], bool] = lambda settings: True
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values
    stem: Callable[[Any], nn.Conv2d | None] = lambda model: model.stem
    classifier: Callable[[Any], tuple[str, ...]] = lambda model: ("head.",)
    layers: Callable[[Any], Any] = lambda model: {
        "stem": r"^stem",
        "blocks": [(r"^blocks\.(\d+)", None), (r"^pre_head_norm", (99999,))],
    }
    reset_head: Callable[[Any, int], None] = lambda model, num_classes: model.reset_head(num_classes)
    resample: Callable[..., Any] | None = None
    absorb: Callable[[Any, np.ndarray, np.ndarray], None] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """Settings that all families have.

    name: a name from `mixlab models`, `mixer_SIZE` with any patch side (in a recipe also without, then the one that
        suits the images; or `mixer_pyramid`, then also the size that suits the --budget), or `timm/NAME`.
    patch_size, hidden_dim, token_mlp_dim, channel_mlp_dim, num_blocks: replace the named size's value.
    stochastic_depth: drop probability of the last block's branches (timm models: their drop_path_rate).
    head_bias, branch_init_scale: initial values of a Mixer, see `MixerConfig`.
    gelu, layer_norm_eps: None is the authors' `tanh` and 1e-6, or what the weights to start from were trained with.
    """

    name: str | None = setting(
        None, "A name from `mixlab models`, or timm/NAME; auto suits the data.", "common"
    )
    patch_size: int | None = setting(None, "Side of a patch in pixels; auto suits the images.", "common")
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
    gelu: Gelu | None = setting(
        None,
        "tanh as the authors have it, or erf; auto is tanh, or that of the weights to start from.",
        "expert",
    )
    layer_norm_eps: float | None = setting(
        None,
        "Of all layer normalisations; auto is the authors' 1e-6, or that of the weights to start from.",
        "expert",
    )


@dataclass(frozen=True, kw_only=True)
class VariantKeys:
    """token_mixing, token_groups: a variant of the token-mixing MLP and its number of groups (variants.py)."""

    token_mixing: Literal["shared", "blocks", "untied", "grouped", "projected", "shrinking"] = setting(
        "shared", "A variant of the token-mixing MLP.", "expert"
    )
    token_groups: int = setting(1, "Number of groups of a variant.", "expert")


@dataclass(frozen=True, kw_only=True)
class PyramidKeys:
    """stage_blocks, stage_mixing, local: how many blocks each stage has, and its switches (pyramid.py).

    hidden_dim and channel_mlp_dim are then those of the first stage.
    """

    stage_blocks: tuple[int, ...] | None = setting(
        None, "Of a pyramid: how many blocks each stage has; auto is the named size's.", "expert"
    )
    stage_mixing: Literal["full", "axial"] | None = setting(
        None,
        "Of a pyramid: tokens mixed all at once, or by rows and columns; auto is by rows and columns.",
        "expert",
    )
    local: Literal["none", "shift"] | None = setting(
        None, "Of a pyramid: channels shifted to neighbours or not; auto shifts.", "expert"
    )

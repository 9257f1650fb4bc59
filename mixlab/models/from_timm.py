"""timm's models as a family: built by their names there, used by timm's own methods."""

import difflib
from typing import Any

import numpy as np
import torch
from torch import nn

from mixlab.errors import UsageError
from mixlab.models.orders import check_order, reorder_pixels

PREFIX = "timm/"


def has(name: str) -> bool:
    """Whether timm has a model of this name, without the prefix."""
    import timm

    return bool(timm.is_model(name.split(".")[0]))


def create(
    name: str,
    num_classes: int,
    image_size: tuple[int, int] | None,
    in_channels: int,
    stochastic_depth: float,
    patch_size: int | None,
) -> nn.Module:
    """A model of timm by the name that mixlab gives it, `timm/NAME`. UsageError if timm cannot build it so."""
    import timm

    timm_name = name.removeprefix(PREFIX)
    if timm_name.startswith("baseline_"):
        import mixlab.models.baselines  # noqa: F401  registers them
    if not has(timm_name):
        close = difflib.get_close_matches(timm_name, timm.list_models(), n=1, cutoff=0.5)
        raise UsageError(
            f"timm has no model called {timm_name!r}",
            where="model",
            hint=f"did you mean {close[0]!r}?" if close else "`mixlab models --timm` lists the names",
        )
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if stochastic_depth:
        settings["drop_path_rate"] = stochastic_depth
    if patch_size:
        settings["patch_size"] = patch_size
    if image_size is not None:
        try:
            return timm.create_model(timm_name, img_size=image_size, **settings)
        except TypeError as error:
            # Convolutional networks take any size and have no such argument; anything else is a real error.
            if "img_size" not in str(error):
                raise _refusal(timm_name, error) from error
        except (AssertionError, ValueError) as error:
            raise _refusal(timm_name, error) from error
    try:
        return timm.create_model(timm_name, **settings)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise _refusal(timm_name, error) from error


def _refusal(timm_name: str, error: Exception) -> UsageError:
    return UsageError(f"timm cannot build {timm_name!r} with these settings: {error}", where="model")


def stem(model: Any) -> nn.Conv2d | None:
    """The patch stem of a ViT or Mixer: a convolution whose patches do not overlap; None for other models."""
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    is_patches = isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride
    return projection if is_patches else None


def classifier(model: Any) -> tuple[str, ...]:
    """How the names of the classifier's tensors begin; some of timm's models have two classifiers."""
    found = model.default_cfg.get("classifier", "head")
    return tuple(f"{name}." for name in ([found] if isinstance(found, str) else found))


def layers(model: Any) -> Any:
    """timm's own order of its layers. UsageError for a model without one."""
    if not hasattr(model, "group_matcher"):
        raise UsageError("this model does not say the order of its layers", where="optimizer.layer_decay")
    return model.group_matcher(coarse=False)


def reset_head(model: Any, num_classes: int) -> None:
    """A new classifier, as timm draws it."""
    model.reset_classifier(num_classes)


def absorb(model: Any, patch_order: np.ndarray, pixel_order: np.ndarray) -> None:
    """`Family.absorb` of a ViT: position embeddings take the place of token mixing there.

    Attention does not look at the order of tokens. UsageError for any other model.
    """
    from timm.models.vision_transformer import VisionTransformer

    convolution = stem(model)
    if not isinstance(model, VisionTransformer) or model.pos_embed is None or convolution is None:
        raise UsageError(
            f"{type(model).__name__} cannot absorb a permutation",
            where="model",
            hint="a Mixer can, and a timm ViT with learned position embeddings",
        )
    num_patches = model.patch_embed.num_patches
    check_order("patch_order", patch_order, num_patches)
    reorder_pixels(convolution, pixel_order)
    first = model.pos_embed.shape[1] - num_patches  # class and register tokens may stand before
    embedded = model.pos_embed
    with torch.no_grad():
        embedded[:, first:] = embedded[:, first:][:, torch.from_numpy(patch_order)]

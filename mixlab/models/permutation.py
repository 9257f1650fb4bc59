"""Permutations of patches and pixels, absorbed into the weights (the paper's section 3.4, made exact).

A Mixer knows its patches and the pixels of a patch by their number alone, so a fixed permutation of both can be moved
from the images into the stem and the token-mixing MLPs. The same holds for a ViT, whose attention does not look at
the order of tokens, with its position embeddings in the place of token mixing.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixlab.errors import UsageError
from mixlab.models.catalog import family_of


def absorb(model: nn.Module, patch_order: np.ndarray, pixel_order: np.ndarray) -> nn.Module:
    """A copy of `model` that gives on permuted images what `model` gives on the originals.

    patch_order (S,): patch i of a permuted image is patch patch_order[i] of the original, in raster order;
    pixel_order (P * P,): the same for the pixels inside every patch. UsageError for a model that cannot absorb
    them: anything but a plain Mixer, a timm ViT with learned position embeddings, or a pyramid for the few orders of
    its patches that it has (`pyramid_permutation`); and any other kind of permutation has no such orders (one that
    differs from patch to patch would need a stem for each patch).
    """
    change = family_of(model, exactly=True).absorb
    if change is None:
        raise UsageError(
            f"{type(model).__name__} cannot absorb a permutation",
            where="model",
            hint="a Mixer can, and a timm ViT with learned position embeddings",
        )
    changed = copy.deepcopy(model)
    change(changed, patch_order, pixel_order)
    return changed


@torch.inference_mode()
def prove(
    model: nn.Module, absorbed: nn.Module, image: Tensor, permute: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Logits of both models in float64: `image` (B, C, H, W) for `model`, permuted images for `absorbed`.

    max_difference: between the two. control: what `model` itself makes of the permuted images, the same way.
    """
    exact, changed = copy.deepcopy(model).double().eval(), copy.deepcopy(absorbed).double().eval()
    image = image.double()
    expected, found, control = exact(image), changed(permute(image)), exact(permute(image))
    return {
        "max_difference": float((found - expected).abs().max()),
        "control": float((control - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "same_top1": int((found.argmax(dim=1) == expected.argmax(dim=1)).sum()),
        "num_images": len(image),
    }

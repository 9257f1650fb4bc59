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
from mixlab.models.mixer import Mixer
from mixlab.models.pyramid import PyramidMixer
from mixlab.models.pyramid_permutation import absorb_patch_order, reorder_tokens


def absorb(model: nn.Module, patch_order: np.ndarray, pixel_order: np.ndarray) -> nn.Module:
    """A copy of `model` that gives on permuted images what `model` gives on the originals.

    patch_order (S,): patch i of a permuted image is patch patch_order[i] of the original, in raster order;
    pixel_order (P * P,): the same for the pixels inside every patch. UsageError for a model that cannot absorb
    them: anything but a plain Mixer, a timm ViT with learned position embeddings, or a pyramid for the few orders of
    its patches that it has (`pyramid_permutation`); and any other kind of permutation has no such orders (one that
    differs from patch to patch would need a stem for each patch).
    """
    if type(model) not in (Mixer, PyramidMixer) and not _is_plain_vit(model):
        raise UsageError(
            f"{type(model).__name__} cannot absorb a permutation",
            where="model",
            hint="a Mixer can, and a timm ViT with learned position embeddings",
        )
    changed: Any = copy.deepcopy(model)
    is_mixer = isinstance(changed, Mixer)
    stem = changed.stem if is_mixer else changed.patch_embed.proj
    num_patches = changed.config.num_patches if is_mixer else changed.patch_embed.num_patches
    num_pixels = stem.weight[0, 0].numel()
    for what, order, length in (
        ("patch_order", patch_order, num_patches),
        ("pixel_order", pixel_order, num_pixels),
    ):
        if not np.array_equal(np.sort(order), np.arange(length)):
            raise UsageError(f"{what} is no permutation of {length} positions", where="model")
    patches, pixels = torch.from_numpy(patch_order), torch.from_numpy(pixel_order)
    with torch.no_grad():
        stem.weight.copy_(stem.weight.flatten(2)[:, :, pixels].view_as(stem.weight))
        if isinstance(changed, PyramidMixer):
            absorb_patch_order(changed, patch_order)
        elif is_mixer:
            for block in changed.blocks:
                reorder_tokens(block.token_mixing, patches)
        else:
            first = changed.pos_embed.shape[1] - num_patches  # class and register tokens may stand before
            changed.pos_embed[:, first:] = changed.pos_embed[:, first:][:, patches]
    return changed


def _is_plain_vit(model: nn.Module) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        return False
    projection = model.patch_embed.proj
    return isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride


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

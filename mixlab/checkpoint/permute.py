"""Weights for permuted images: `mixlab permute`."""

from dataclasses import replace
from typing import Any

import torch

from mixlab.checkpoint.store import Weights
from mixlab.data.images.permutation import PixelPermutation
from mixlab.data.images.preprocess import for_images
from mixlab.errors import UsageError
from mixlab.models.catalog import family_of
from mixlab.models.permutation import absorb, prove

NUM_PROOF_IMAGES = 8
TOLERANCE = 1e-9  # of the float64 proof, relative to the largest logit; rounding alone is far below


def permute_weights(weights: Weights, *, seed: int) -> tuple[Weights, dict[str, Any]]:
    """The same classifier for images whose patches and pixels are permuted, and the proof of `models.prove`.

    Its Preprocess permutes the images itself, so that its answers to ordinary images stay the same.
    UsageError for a model that cannot absorb a permutation, or weights that permute already.
    """
    preprocess = for_images(weights.preprocess, "a permutation", "WEIGHTS")
    if preprocess.permutation is not None:
        raise UsageError("these weights take permuted images already", where="WEIGHTS")
    model: Any = weights.model
    size = preprocess.image_size
    stem = family_of(model).stem(model)
    patch_size = 1 if stem is None else stem.kernel_size[0]  # without one `absorb` says what it cannot do
    permutation = PixelPermutation(kind="patches_and_pixels", patch_size=patch_size, seed=seed)
    changed = absorb(model, permutation.patch_order(size), permutation.pixel_order())
    generator = torch.Generator().manual_seed(seed)
    image = 2 * torch.rand(NUM_PROOF_IMAGES, preprocess.channels, *size, generator=generator) - 1
    proof = prove(model, changed, image, permutation.apply)
    proof["holds"] = proof["max_difference"] <= TOLERANCE * max(proof["largest_logit"], 1.0)
    permuted = replace(
        weights,
        model=changed.eval(),
        preprocess=replace(preprocess, permutation=permutation),
        provenance=weights.provenance | {"permuted": permutation.to_json()},
    )
    return permuted, proof

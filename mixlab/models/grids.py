"""The weights of a Mixer on another grid of patches.

Shapes: S tokens of the old grid (h rows, w columns), T of the new one, D_S hidden width of the token MLP, P patch.
Computation is in float64, the result in the model's own type.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.models.mixer import Mixer, MixerConfig


def resample_grid(model: Mixer, image_size: tuple[int, int], patch_size: int | None = None) -> Mixer:
    """`Family.resample`: the same Mixer for images of `image_size` (height, width), in patches of `patch_size`.

    D_S is kept.

    Token mixing reads the new tokens through R (S, T), which brings a map on the new grid to the old one, and
    writes through V (T, S) back to the new: W1' = W1 R, W2' = V W2, b2' = V b2. Along each axis R and V average
    over areas where they shrink and interpolate cubically where they grow; their rows sum to one, so what is
    constant over the image stays so. The stem reads a patch of another side in the same way, so a model with
    patches k times as large is exactly the old one on images averaged over k x k pixels. A pyramid's axial maps are
    read and written so along their own axis.
    The same grid and patch give the same weights, bit for bit.
    """
    old = model.config
    new = replace(old, image_size=image_size, patch_size=patch_size or old.patch_size)
    pixels = resize_matrix(old.patch_size, new.patch_size)
    state = {}
    for name, tensor in model.state_dict().items():
        value = tensor.cpu().double()
        if name == "stem.weight":
            value = torch.einsum("ocpq,px,qy->ocxy", value, pixels, pixels)
        elif ".token_mixing." in name:
            block = int(name.split(".")[1])
            read, write = _axes(old.of_block(block), new.of_block(block))
            if name.endswith("columns.weight"):
                value = write[0] @ value @ read[0]
            elif name.endswith("rows.weight"):
                value = write[1] @ value @ read[1]
            elif name.endswith("fc1.weight"):
                value = value @ torch.kron(*read)
            elif ".fc2." in name:
                value = torch.kron(*write) @ value
        state[name] = value.to(tensor)
    return built(type(model), new, state, model)


def _axes(old: MixerConfig, new: MixerConfig) -> tuple[list[Tensor], list[Tensor]]:
    """R and V of a block's grid, height and width apart."""
    pairs = list(zip(old.grid, new.grid, strict=True))
    return [resize_matrix(a, b) for a, b in pairs], [resize_matrix(b, a) for a, b in pairs]


def resize_matrix(size_out: int, size_in: int) -> Tensor:
    """The matrix (size_out, size_in) that resizes a signal; rows sum to one; the identity for the same size."""
    if size_out < size_in:  # the share of input pixel j in what output pixel i covers
        step = size_in / size_out
        start = step * torch.arange(size_out, dtype=torch.float64)[:, None]
        pixel = torch.arange(size_in, dtype=torch.float64)
        shared = torch.minimum(start + step, pixel + 1) - torch.maximum(start, pixel)
        return shared.clamp(min=0) / step
    identity = torch.eye(size_in, dtype=torch.float64)[None, None]
    return F.interpolate(identity, size=(size_out, size_in), mode="bicubic")[0, 0]


def built(kind: type[Mixer], config: MixerConfig, state: dict[str, Tensor], like: Mixer) -> Mixer:
    """A model of this kind that has copies of these tensors, in the mode of `like`."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    return model.train(like.training)

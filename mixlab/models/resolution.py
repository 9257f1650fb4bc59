"""A Mixer at another resolution, shape or patch size: the paper's Appendix C, and resampling to any grid.

Shapes: S tokens of the old grid (h rows, w columns), T of the new one, D_S hidden width of the token MLP, P patch.
Every function returns a new model; computation is in float64, the result in the model's own type.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.errors import UsageError
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.models.pyramid import PyramidConfig, PyramidMixer
from mixlab.models.variants import VariantConfig, VariantMixer, block_order


def resample(model: Mixer, image_size: tuple[int, int], *, patch_size: int | None = None) -> Mixer:
    """The same Mixer for images of `image_size` (height, width), cut into patches of `patch_size`; D_S is kept.

    Token mixing reads the new tokens through R (S, T), which brings a map on the new grid to the old one, and
    writes through V (T, S) back to the new: W1' = W1 R, W2' = V W2, b2' = V b2. Along each axis R and V average
    over areas where they shrink and interpolate cubically where they grow; their rows sum to one, so what is
    constant over the picture stays so. The stem reads a patch of another side in the same way, so a model with
    patches k times as large is exactly the old one on pictures averaged over k x k pixels. A pyramid's axial maps are
    read and written so along their own axis.
    The same grid and patch give the same weights, bit for bit.
    """
    if type(model) not in (Mixer, PyramidMixer):
        raise UsageError(
            f"only a plain Mixer or a pyramid can be resampled, this one mixes tokens in another way "
            f"({type(model).__name__})",
            where="image_size",
        )
    old = model.config
    new = replace(old, image_size=image_size, patch_size=patch_size or old.patch_size)
    pixels = _resize(old.patch_size, new.patch_size)
    state = {}
    for name, tensor in model.state_dict().items():
        value = tensor.cpu().double()
        if name == "stem.weight":
            value = torch.einsum("ocpq,px,qy->ocxy", value, pixels, pixels)
        elif ".token_mixing." in name:
            read, write = _axes(old, new, int(name.split(".")[1]))
            if name.endswith("columns.weight"):
                value = write[0] @ value @ read[0]
            elif name.endswith("rows.weight"):
                value = write[1] @ value @ read[1]
            elif name.endswith("fc1.weight"):
                value = value @ torch.kron(*read)
            elif ".fc2." in name:
                value = torch.kron(*write) @ value
        state[name] = value.to(tensor)
    return _built(type(model), new, state, model)


def _axes(old: MixerConfig, new: MixerConfig, block: int) -> tuple[list[Tensor], list[Tensor]]:
    """R and V of a block's grid, height and width apart."""
    if isinstance(old, PyramidConfig):
        assert isinstance(new, PyramidConfig)
        old, new = old.of_stage(old.stage(block)), new.of_stage(new.stage(block))
    pairs = list(zip(old.grid, new.grid, strict=True))
    return [_resize(a, b) for a, b in pairs], [_resize(b, a) for a, b in pairs]


def _resize(size_out: int, size_in: int) -> Tensor:
    """The matrix (size_out, size_in) that resizes a signal; rows sum to one; the identity for the same size."""
    if size_out < size_in:  # the share of input pixel j in what output pixel i covers
        step = size_in / size_out
        start = step * torch.arange(size_out, dtype=torch.float64)[:, None]
        pixel = torch.arange(size_in, dtype=torch.float64)
        shared = torch.minimum(start + step, pixel + 1) - torch.maximum(start, pixel)
        return shared.clamp(min=0) / step
    identity = torch.eye(size_in, dtype=torch.float64)[None, None]
    return F.interpolate(identity, size=(size_out, size_in), mode="bicubic")[0, 0]


def extend(model: Mixer, factor: int, *, sparse: bool) -> Mixer:
    """The paper's Appendix C: for images `factor` (K) times as high and wide, K x K copies of the token MLP.

    The start is exact: logits of the big image are the mean over those of its K x K sub-images. sparse: keep the
    copies as blocks (`token_mixing="blocks"`, the old cost per token); otherwise one block-diagonal matrix of
    K^2 D_S hidden units, all of which can be trained.
    """
    if type(model) is not Mixer:
        raise UsageError("only a plain Mixer can be extended", where="init_grid")
    if factor < 1:
        raise UsageError(f"the factor must be at least 1, got {factor}", where="image_size")
    old = model.config
    height, width = old.image_size
    values = {field: getattr(old, field) for field in MixerConfig.__dataclass_fields__}
    values |= {"image_size": (factor * height, factor * width)}
    config = VariantConfig(**values, token_mixing="blocks", token_groups=factor)
    state = {}
    for name, tensor in model.state_dict().items():
        if ".token_mixing." in name:
            copies = tensor.expand(factor**2, *tensor.shape).clone()
            state[name.replace("fc1.", "fc1_").replace("fc2.", "fc2_")] = copies
        else:
            state[name] = tensor
    blocks = _built(VariantMixer, config, state, model)
    assert isinstance(blocks, VariantMixer)
    return blocks if sparse else densify(blocks)


def densify(model: VariantMixer) -> Mixer:
    """The same function as a plain Mixer: the blocks of its token mixing in one matrix, tokens in raster order."""
    config = model.config
    assert isinstance(config, VariantConfig)
    if config.token_mixing != "blocks":
        raise UsageError(f"token mixing {config.token_mixing} has no blocks", where="model.token_mixing")
    order = block_order(
        config.grid, config.token_groups
    )  # (K * K, S): raster numbers of each sub-image's tokens
    num_blocks, hidden, tokens = len(order), config.token_mlp_dim, config.num_patches
    values = {field: getattr(config, field) for field in MixerConfig.__dataclass_fields__}
    dense = MixerConfig(**(values | {"token_mlp_dim": num_blocks * hidden}))
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("fc1_weight"):
            value = tensor.new_zeros(num_blocks, hidden, tokens)
            for block, columns in enumerate(order):
                value[block][:, columns] = tensor[block]
            state[name.replace("fc1_", "fc1.")] = value.reshape(-1, tokens)
        elif name.endswith("fc1_bias"):
            state[name.replace("fc1_", "fc1.")] = tensor.reshape(-1)
        elif name.endswith("fc2_weight"):
            value = tensor.new_zeros(tokens, num_blocks, hidden)
            for block, rows in enumerate(order):
                value[rows, block] = tensor[block]
            state[name.replace("fc2_", "fc2.")] = value.reshape(tokens, -1)
        elif name.endswith("fc2_bias"):
            value = tensor.new_zeros(tokens)
            value[order.reshape(-1)] = tensor.reshape(-1)
            state[name.replace("fc2_", "fc2.")] = value
        else:
            state[name] = tensor
    return _built(Mixer, dense, state, model)


def _built(kind: type[Mixer], config: MixerConfig, state: dict[str, Tensor], like: Mixer) -> Mixer:
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    return model.train(like.training)

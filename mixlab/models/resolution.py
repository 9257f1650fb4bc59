"""A Mixer at another resolution, shape or patch size: the paper's Appendix C, and resampling to any grid.

Every function returns a new model.
"""

from torch import nn

from mixlab.errors import UsageError
from mixlab.models.catalog import family_of
from mixlab.models.grids import built
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.models.variants import VariantConfig, VariantMixer, block_order


def resample(model: nn.Module, image_size: tuple[int, int], *, patch_size: int | None = None) -> Mixer:
    """The same model for images of `image_size` (height, width), cut into patches of `patch_size` (`resample_grid`).

    UsageError for a model that has no such thing: variants of token mixing, and timm's models.
    """
    change = family_of(model, exactly=True).resample
    if change is None:
        raise UsageError(
            f"only a plain Mixer or a pyramid can be resampled, this one mixes tokens in another way "
            f"({type(model).__name__})",
            where="image_size",
        )
    changed: Mixer = change(model, image_size, patch_size)
    return changed


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
    blocks = built(VariantMixer, config, state, model)
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
    return built(Mixer, dense, state, model)

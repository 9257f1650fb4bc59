"""The layouts in which Mixer weights travel, as tables: their keys and shapes for ours, and back.

Shapes: C hidden_dim, S patches, D_S and D_C hidden widths of the MLPs, P patch side, K classes. Ours are torch's:
kernels (out, in), stem (C, in, P, P). Sources: the authors' repositories (vision_transformer, big_vision), timm,
mmpretrain's converter and lucidrains/mlp-mixer-pytorch, each read or run (docs/formats.md).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlab.models.layers import Gelu

Shape = tuple[int, ...]

# Our names, `*` for the block: what a Mixer consists of.
PARTS = ("stem", "*.token_norm", "*.token_mixing.fc1", "*.token_mixing.fc2", "*.channel_norm",
         "*.channel_mixing.fc1", "*.channel_mixing.fc2", "pre_head_norm", "head")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one project names and shapes a Mixer's tensors, and how its code runs them.

    modules: their module for each of PARTS; `{i}` is the block, `{i2}`, `{norm}` and `{head}` positions in a
        flat Sequential. leaves: their names for (kernel, norm scale, bias). A kernel or bias can be named in the
        module's entry itself, as `{leaf:kernel1|bias1}`.
    container: the file type it is written as. gelu, layer_norm_eps: of the project's own code.
    """

    name: str
    title: str
    container: str
    modules: tuple[str, ...]
    leaves: tuple[str, str, str] = ("weight", "weight", "bias")
    separator: str = "."
    gelu: Gelu
    layer_norm_eps: float = 1e-6
    signature: tuple[str, ...]  # keys that only this layout has

    def keys(self, num_blocks: int, norms: tuple[int, int] = (0, 1)) -> dict[str, str]:
        """Our name -> their key, for every tensor of a Mixer of `num_blocks`."""
        found = {}
        for part, module in zip(PARTS, self.modules, strict=True):
            for block in range(num_blocks) if part.startswith("*") else [0]:
                ours = part.replace("*", f"blocks.{block}")
                place = {"i": block, "i2": block + 2, "norm": num_blocks + 2, "head": num_blocks + 4}
                theirs = module.format(**place, n0=norms[0], n1=norms[1])
                kernel = self.leaves[1] if part.endswith("norm") else self.leaves[0]
                if "|" in theirs:  # an MLP's arrays stand side by side: kernel1, bias1
                    stem, names = theirs.rsplit(self.separator, 1)
                    leaves = names.split("|")
                else:
                    stem, leaves = theirs, [kernel, self.leaves[2]]
                for leaf, suffix in zip(leaves, ("weight", "bias"), strict=True):
                    found[f"{ours}.{suffix}"] = f"{stem}{self.separator}{leaf}"
        return found

    def to_ours(self, name: str, tensor: Tensor, shape: Shape) -> Tensor:
        """Their tensor as ours, of `shape`."""
        if self.name == "lucidrains" and name == "stem.weight":  # (C, P * P * in), the pixel outermost
            width, channels, side, _ = shape
            return tensor.reshape(width, side, side, channels).permute(0, 3, 1, 2)
        if self.separator == "/":  # JAX: (in, out) and (P, P, in, C), in the older layout with unit axes
            backwards = _jax_shape(shape)
            tensor = tensor.reshape(backwards)
            return tensor.permute(3, 2, 0, 1) if len(shape) == 4 else tensor.T if len(shape) == 2 else tensor
        return tensor.reshape(shape)

    def to_theirs(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `to_ours`."""
        if self.name == "lucidrains":
            if name == "stem.weight":
                return tensor.permute(0, 2, 3, 1).reshape(len(tensor), -1)
            return tensor[..., None] if re.search(r"token_mixing\.fc\d\.weight", name) else tensor
        if self.separator == "/":
            return (
                tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor
            )
        return tensor

    def their_shape(self, name: str, shape: Shape) -> Shape:
        """The shape that a tensor of ours has in this layout."""
        return tuple(self.to_theirs(name, torch.empty(shape, device="meta")).shape)


def _jax_shape(shape: Shape) -> Shape:
    return (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape[::-1]


OURS = Layout(
    name="mixlab",
    title="mixlab",
    container="safetensors",
    modules=tuple(part.replace("*", "blocks.{i}") for part in PARTS),
    gelu="tanh",
    signature=("stem.weight", "blocks.0.token_mixing.fc1.weight"),
)
OFFICIAL = Layout(
    name="official",
    title="the authors' .npz",
    container="npz",
    modules=("stem", "MixerBlock_{i}/LayerNorm_{n0}", "MixerBlock_{i}/token_mixing/Dense_0",
             "MixerBlock_{i}/token_mixing/Dense_1", "MixerBlock_{i}/LayerNorm_{n1}",
             "MixerBlock_{i}/channel_mixing/Dense_0", "MixerBlock_{i}/channel_mixing/Dense_1",
             "pre_head_layer_norm", "head"),
    leaves=("kernel", "scale", "bias"),
    separator="/",
    gelu="tanh",
    signature=("stem/kernel", "MixerBlock_0/token_mixing/Dense_0/kernel"),
)  # fmt: skip
_OLD = "Mixer/encoderblock_{i}/"
OFFICIAL_OLD = Layout(
    name="official-old",
    title="the authors' .npz, older layout",
    container="npz",
    modules=("embedding", _OLD + "LayerNorm_{n0}", _OLD + "token_mixing_phase_0/kernel1|bias1",
             _OLD + "token_mixing_phase_0/kernel2|bias2", _OLD + "LayerNorm_{n1}",
             _OLD + "channel_mixing_phase_0/kernel1|bias1", _OLD + "channel_mixing_phase_0/kernel2|bias2",
             "Mixer/encoder_norm", "head"),
    leaves=("kernel", "scale", "bias"),
    separator="/",
    gelu="tanh",
    signature=("embedding/kernel", "Mixer/encoderblock_0/token_mixing_phase_0/kernel1"),
)  # fmt: skip
TIMM = Layout(
    name="timm",
    title="timm",
    container="safetensors",
    modules=("stem.proj", "blocks.{i}.norm1", "blocks.{i}.mlp_tokens.fc1", "blocks.{i}.mlp_tokens.fc2",
             "blocks.{i}.norm2", "blocks.{i}.mlp_channels.fc1", "blocks.{i}.mlp_channels.fc2", "norm", "head"),
    gelu="erf",
    signature=("stem.proj.weight", "blocks.0.mlp_tokens.fc1.weight"),
)  # fmt: skip
_MM = "backbone.layers.{i}."
MMPRETRAIN = Layout(
    name="mmpretrain",
    title="mmpretrain",
    container="pth",
    modules=("backbone.patch_embed.projection", _MM + "ln1", _MM + "token_mix.layers.0.0",
             _MM + "token_mix.layers.1", _MM + "ln2", _MM + "channel_mix.layers.0.0",
             _MM + "channel_mix.layers.1", "backbone.ln1", "head.fc"),
    gelu="erf",
    layer_norm_eps=1e-5,
    signature=("backbone.patch_embed.projection.weight", "backbone.layers.0.token_mix.layers.0.0.weight"),
)  # fmt: skip
LUCIDRAINS = Layout(
    name="lucidrains",
    title="lucidrains/mlp-mixer-pytorch",
    container="pth",
    modules=("1", "{i2}.0.norm", "{i2}.0.fn.0", "{i2}.0.fn.3", "{i2}.1.norm", "{i2}.1.fn.0", "{i2}.1.fn.3",
             "{norm}", "{head}"),
    gelu="erf",
    layer_norm_eps=1e-5,
    signature=("1.weight", "2.0.fn.0.weight"),
)  # fmt: skip
LAYOUTS = {layout.name: layout for layout in (OURS, OFFICIAL, OFFICIAL_OLD, TIMM, MMPRETRAIN, LUCIDRAINS)}

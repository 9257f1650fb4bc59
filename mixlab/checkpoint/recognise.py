"""Which layout a file of weights is in, by its keys and shapes alone, and what Mixer it holds."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt, prod

from mixlab.checkpoint.described import check_shapes
from mixlab.checkpoint.layouts import LAYOUTS, LUCIDRAINS, OFFICIAL_OLD, TIMM, Layout, Shape
from mixlab.errors import UsageError, WeightsError
from mixlab.models.mixer import MixerConfig


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """What a file holds. keys: our name -> key in the file. shapes: ours. notes: for people, oddities named."""

    layout: Layout
    keys: dict[str, str]
    shapes: dict[str, Shape]
    num_blocks: int
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def config(self, image_size: tuple[int, int] | None, *, where: str) -> MixerConfig:
        """The Mixer's dimensions. `image_size` says the grid if it has S patches; else a square S means a square one.

        UsageError lists the possible sizes where neither holds.
        """
        hidden_dim, in_channels, patch_size, _ = self.shapes["stem.weight"]
        num_patches = self.shapes["blocks.0.token_mixing.fc2.bias"][0]
        side = isqrt(num_patches)
        if side * side == num_patches and image_size not in _grids(num_patches, patch_size):
            image_size = (side * patch_size, side * patch_size)
        elif image_size is None or image_size not in _grids(num_patches, patch_size):
            choices = ", ".join(f"{height}x{width}" for height, width in _grids(num_patches, patch_size))
            raise UsageError(
                f"{num_patches} patches of {patch_size} pixels are no square, so the image's shape must be given",
                where=where,
                hint=f"image_size is one of {choices}",
            )
        return MixerConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_dim=hidden_dim,
            token_mlp_dim=self.shapes["blocks.0.token_mixing.fc1.bias"][0],
            channel_mlp_dim=self.shapes["blocks.0.channel_mixing.fc1.bias"][0],
            num_blocks=self.num_blocks,
            num_classes=self.shapes["head.bias"][0],
            in_channels=in_channels,
            gelu=self.layout.gelu,
            layer_norm_eps=self.layout.layer_norm_eps,
        )


def _grids(num_patches: int, patch_size: int) -> list[tuple[int, int]]:
    rows = [rows for rows in range(1, num_patches + 1) if num_patches % rows == 0]
    return [(row * patch_size, num_patches // row * patch_size) for row in rows]


def recognise(found: dict[str, Shape], *, where: str) -> Recognised:
    """Which layout the tensors `found` (key -> shape) are in. WeightsError names what is missing, extra or wrong."""
    layout, prefix = _find_layout(found, where)
    inside = {key[len(prefix) :]: shape for key, shape in found.items() if key.startswith(prefix)}
    num_blocks = _count_blocks(layout, inside)
    keys = layout.keys(num_blocks, _norm_numbers(layout, inside))
    shapes, notes = _our_shapes(layout, keys, inside, where)
    expected = {key: layout.their_shape(name, shapes[name]) for name, key in keys.items()}
    if layout is OFFICIAL_OLD:  # any unit axes are theirs: the kernels of a Mixer have none
        inside = {
            key: expected[key] if key in expected and _squeezed(shape) == _squeezed(expected[key]) else shape
            for key, shape in inside.items()
        }
    what = f"this looks like a Mixer of {layout.title} with {num_blocks} blocks, but"
    if layout is TIMM:
        what += " (timm's gMixer is another model, used as timm/NAME)"
    check_shapes(inside, expected, where, what)
    ignored = tuple(sorted(key for key in found if not key.startswith(prefix)))
    return Recognised(
        layout=layout,
        keys={name: prefix + key for name, key in keys.items()},
        shapes=shapes,
        num_blocks=num_blocks,
        ignored=ignored,
        notes=notes,
    )


def _find_layout(found: dict[str, Shape], where: str) -> tuple[Layout, str]:
    for layout in LAYOUTS.values():
        mark = layout.signature[1]
        for key in found:
            prefix = key[: -len(mark)] if key.endswith(mark) else None
            # Whole training states have their parameters under a path, such as opt/target/.
            if prefix is not None and (not prefix or (layout.separator == "/" and prefix.endswith("/"))):
                return layout, prefix
    examples = ", ".join(sorted(found)[:4]) or "none"
    hint = "known are " + ", ".join(layout.title for layout in LAYOUTS.values())
    if any("linear_tokens" in key or "mlp_tokens.fc1_g" in key or "mlp_channels" in key for key in found):
        hint = "it looks like timm's ResMLP, gMixer or gMLP, which are other models: use them as timm/NAME"
    raise WeightsError(
        f"no known layout of a Mixer has keys such as {examples} ({len(found)} in all)",
        where=where,
        hint=hint,
    )


def _count_blocks(layout: Layout, inside: Iterable[str]) -> int:
    head, tail = layout.modules[2].split("{", 1)
    first = 2 if tail.startswith("i2}") else 0
    follow = tail.split("}", 1)[1].split("|")[0]
    pattern = re.compile(re.escape(head) + r"(\d{1,4})" + re.escape(follow))
    return 1 + max(int(match[1]) - first for key in inside if (match := pattern.match(key)))


def _norm_numbers(layout: Layout, inside: Iterable[str]) -> tuple[int, int]:
    """Old files number the norms of a block among all its submodules: 0 and 1, or 0 and 2."""
    if layout is not OFFICIAL_OLD:
        return 0, 1
    numbers = sorted(
        {int(m[1]) for key in inside if (m := re.search(r"encoderblock_0/LayerNorm_(\d+)/", key))}
    )
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 1)


def _squeezed(shape: Shape) -> Shape:
    return tuple(side for side in shape if side != 1)


def _our_shapes(
    layout: Layout, keys: dict[str, str], inside: dict[str, Shape], where: str
) -> tuple[dict[str, Shape], tuple[str, ...]]:
    """Every shape follows from the stem's kernel and five biases; these are looked at first."""

    def width(name: str) -> int:
        shape = inside.get(keys[name])
        if shape is None or prod(shape) != max(shape, default=0) or not prod(shape):
            what = "is missing" if shape is None else f"has shape {shape}, and a bias has one axis"
            raise WeightsError(
                f"{keys[name]} {what}", where=where, hint=f"it looks like a Mixer of {layout.title}"
            )
        return max(shape)

    tokens, token_mlp = width("blocks.0.token_mixing.fc2.bias"), width("blocks.0.token_mixing.fc1.bias")
    hidden, channel_mlp = width("stem.bias"), width("blocks.0.channel_mixing.fc1.bias")
    classes = width("head.bias")
    in_channels, patch_size, notes = _stem(layout, keys["stem.weight"], inside, where)
    if layout is LUCIDRAINS and token_mlp > channel_mlp:
        notes.append(
            f"its expansions are swapped: D_S is {token_mlp} and D_C {channel_mlp} at C {hidden}, the paper has "
            "D_S = C / 2 and D_C = 4 C; they are read as they are"
        )
    modules = {
        "stem": (hidden, in_channels, patch_size, patch_size),
        "token_norm": (hidden,),
        "token_mixing.fc1": (token_mlp, tokens),
        "token_mixing.fc2": (tokens, token_mlp),
        "channel_norm": (hidden,),
        "channel_mixing.fc1": (channel_mlp, hidden),
        "channel_mixing.fc2": (hidden, channel_mlp),
        "pre_head_norm": (hidden,),
        "head": (classes, hidden),
    }
    shapes: dict[str, Shape] = {}
    for name in keys:
        module = modules[re.sub(r"^blocks\.\d+\.", "", name).rsplit(".", 1)[0]]
        shapes[name] = module if name.endswith("weight") else module[:1]
    return shapes, tuple(notes)


def _stem(layout: Layout, key: str, inside: dict[str, Shape], where: str) -> tuple[int, int, list[str]]:
    """(input channels, patch side, notes) from the stem kernel's shape."""
    shape = inside.get(key)
    if shape is None:
        raise WeightsError(f"{key} is missing", where=where, hint=f"it looks like a Mixer of {layout.title}")
    if layout is LUCIDRAINS and len(shape) == 2:
        for channels in (3, 1):
            if shape[1] % channels == 0 and isqrt(shape[1] // channels) ** 2 * channels == shape[1]:
                note = (
                    f"{channels} input channels are assumed: its stem does not tell them from the patch side"
                )
                return channels, isqrt(shape[1] // channels), [note]
    elif len(shape) == 4:
        side, other, channels = (
            (shape[0], shape[1], shape[2]) if layout.separator == "/" else (*shape[2:], shape[1])
        )
        if side == other and min(shape) > 0:
            return channels, side, []
    raise WeightsError(f"{key} has shape {shape}, which is no stem of square patches", where=where)

"""Which permutations of its patches a pyramid can absorb, and how: the fewer, the more it knows of the grid.

Token mixing over all tokens absorbs any order. Axial maps absorb an order of the rows together with one of the
columns (also with the two axes exchanged). Shifts know neighbours: only the symmetries of the rectangle are left.
Merging needs 2 x 2 neighbours that stay together, in one inner order. Pixels inside a patch are free, as in every
Mixer.

An `order` int64 (S,) says, for each token of the permuted grid, which token of the original it is.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixlab.errors import UsageError
from mixlab.models.orders import check_order, reorder_pixels, reorder_tokens
from mixlab.models.pyramid import AxialMixing, PyramidBlock, PyramidMixer, ShiftMlp, shift_groups

# Of the groups of `shift_groups` that move: where what arrives comes from, in rows and columns.
_SOURCES = ((-1, 0), (1, 0), (0, -1), (0, 1))


@dataclass(frozen=True)
class _Axes:
    """An order as one of the rows and one of the columns: token (h, w) is the original's (first[h], second[w]).

    crossed: the axes are exchanged as well; it is then the original's (first[w], second[h]).
    """

    first: Tensor
    second: Tensor
    crossed: bool


@torch.no_grad()
def absorb_pyramid(model: PyramidMixer, patch_order: np.ndarray, pixel_order: np.ndarray) -> None:
    """`Family.absorb` of a pyramid; UsageError if it cannot, and `model` is then no longer of use."""
    check_order("patch_order", patch_order, model.config.num_patches)
    reorder_pixels(model.stem, pixel_order)
    order = torch.from_numpy(patch_order)
    for block in model.blocks:
        assert isinstance(block, PyramidBlock)
        if block.merging is not None:
            order, inner = _merged_order(order, block.merging.grid)
            norm, linear = block.merging.norm, block.merging.linear
            for tensor in (norm.weight, norm.bias, linear.weight):
                parts = tensor.unflatten(-1, (4, -1))
                tensor.copy_(parts.index_select(-2, inner).flatten(-2))
        mixing = block.token_mixing
        if isinstance(mixing, AxialMixing):
            axes = _axes(order, mixing.grid, "axial token mixing absorbs orders of rows and of columns only")
            maps = (mixing.columns.weight.clone(), mixing.rows.weight.clone())
            moved = [map_[o][:, o] for map_, o in zip(maps, (axes.first, axes.second), strict=True)]
            columns, rows = reversed(moved) if axes.crossed else moved
            mixing.columns.weight.copy_(columns)
            mixing.rows.weight.copy_(rows)
        else:
            reorder_tokens(mixing, order)
        if isinstance(block.channel_mixing, ShiftMlp):
            units = _unit_order(order, block.channel_mixing)
            fc1, fc2 = block.channel_mixing.fc1, block.channel_mixing.fc2
            fc1.weight.copy_(fc1.weight[units])
            fc1.bias.copy_(fc1.bias[units])
            fc2.weight.copy_(fc2.weight[:, units])


def _merged_order(order: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The order of the 2 x 2 groups, and the one inside of each."""
    height, width = grid
    number = order.view(height // 2, 2, width // 2, 2).transpose(1, 2).reshape(-1, 4)
    row, column = number // width, number % width
    group = (row // 2) * (width // 2) + column // 2
    inner = 2 * (row % 2) + column % 2
    if (group != group[:, :1]).any() or (inner != inner[:1]).any():
        raise UsageError(
            "merging absorbs only orders that keep 2x2 neighbouring patches together, all in one inner order",
            where="patch_order",
        )
    return group[:, 0], inner[0]


def _axes(order: Tensor, grid: tuple[int, int], what: str) -> _Axes:
    rows, columns = (order // grid[1]).view(grid), (order % grid[1]).view(grid)
    if (rows == rows[:, :1]).all() and (columns == columns[:1]).all():
        return _Axes(rows[:, 0], columns[0], crossed=False)
    if (rows == rows[:1]).all() and (columns == columns[:, :1]).all():
        return _Axes(rows[0], columns[:, 0], crossed=True)
    raise UsageError(what, where="patch_order")


def _unit_order(order: Tensor, mixing: ShiftMlp) -> Tensor:
    """Which hidden unit takes the place of each, so that every one still looks where it looked in the image."""
    what = "shifts absorb the symmetries of the grid only: mirrored or turned, not shuffled"
    axes = _axes(order, mixing.grid, what)
    signs = []
    for axis in (axes.first, axes.second):
        along = torch.arange(len(axis))
        if not torch.equal(axis, along) and not torch.equal(axis, along.flip(0)):
            raise UsageError(what, where="patch_order")
        signs.append(1 if torch.equal(axis, along) else -1)
    *groups, stay = (
        torch.arange(mixing.fc1.out_features)[group] for group in shift_groups(mixing.fc1.out_features)
    )
    placed = list(groups)
    for group, (row, column) in zip(groups, _SOURCES, strict=True):
        moved = (signs[0] * row, signs[1] * column)
        placed[_SOURCES.index(moved[::-1] if axes.crossed else moved)] = group
    return torch.cat([*placed, stay])

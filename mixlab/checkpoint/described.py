"""A model as a file describes it: its settings checked, and its size compared with the tensors before it is built."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from math import prod
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixlab.checkpoint.tensor_file import TensorFile
from mixlab.data.images.preprocess import MAX_SIDE
from mixlab.errors import MixlabError, WeightsError
from mixlab.models.catalog import ModelConfig, create_model
from mixlab.models.family import with_new_names
from mixlab.models.mixer import MAX_DIMENSION
from mixlab.records import take, take_list

MAX_NAME = 100  # characters
SPARE = 4  # times the numbers in a file of weights may be taken to build its model, which makes tables and masks too
SPARE_NUMBERS = 50_000_000
LARGE = 2**20  # numbers in a result that is counted too
_MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)  # take a size


def build_described(
    settings: dict[str, Any], file: TensorFile, where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that `settings` describe, without values, if it has just the tensors of `file`; and the settings.

    Nothing is taken that the file could not fill: a few words could describe a model of any size. WeightsError names
    the key, or the tensors that differ.
    """
    settings = check_settings(settings, where)
    numbers = sum(prod(shape) for shape in file.shapes.values())
    num_blocks = max(settings.get("num_blocks") or 0, sum(settings.get("stage_blocks") or ()))
    if num_blocks > len(file.shapes):
        raise WeightsError(
            f"the model has {num_blocks} blocks, the weights {len(file.shapes)} tensors", where=where
        )
    # Without memory for the weights: a Mixer's come from the file.
    model = _build(settings, SPARE * numbers + SPARE_NUMBERS, where)
    own = model.state_dict()
    check_shapes(file.shapes, {name: tuple(tensor.shape) for name, tensor in own.items()}, str(file.path))
    if next(model.parameters()).is_meta:
        give_memory(model)
    return model, settings


def check_size(settings: dict[str, Any], num_bytes: int, where: str) -> None:
    """WeightsError if the model that `settings` describe is far larger than `num_bytes` of its weights on the disk.

    A factor of 64 is let pass: older runs began with larger patches, which make a model larger.
    """
    most = 64 * num_bytes + SPARE_NUMBERS
    model = _build(settings, most, where)
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    if numbers > most:
        raise WeightsError(
            f"it describes a model of {numbers:,} numbers, and its weights have {num_bytes:,} bytes",
            where=where,
        )


def _build(settings: dict[str, Any], limit: int, where: str) -> nn.Module:
    """The model without values; of timm, whose models keep values outside their weights, with at most `limit`."""
    is_timm = settings["name"].startswith("timm/")
    place: Any = _Limited(limit) if is_timm else torch.device("meta")
    try:
        with place:
            return create_model(**settings)
    except WeightsError as error:
        raise WeightsError(error.message, where=where) from error
    except MixlabError as error:
        raise WeightsError(f"the model cannot be built: {error}", where=where) from error
    except (
        Exception
    ) as error:  # of settings that somebody may have made on purpose, timm and torch can raise anything
        text = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"the model cannot be built: {type(error).__name__}: {text}", where=where
        ) from error


def check_settings(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Keyword arguments of `create_model` out of a file, each of its type and within limits; WeightsError if not."""
    settings = with_new_names(settings)
    found: dict[str, Any] = {"name": take(settings, "name", str, where)}
    if len(found["name"]) > MAX_NAME:
        raise WeightsError(f"the model's name has {len(found['name'])} characters", where=where)
    for key, usual in (("num_classes", 1000), ("in_channels", 3)):
        number = take(settings, key, int, where, low=1, high=MAX_DIMENSION, optional=True)
        found[key] = usual if number is None else number
    size = take_list(settings, "image_size", int, where, low=1, high=MAX_SIDE)
    if len(size) != 2:
        raise WeightsError(f"image_size must be height and width, got {len(size)} numbers", where=where)
    found["image_size"] = size
    hints = get_type_hints(ModelConfig)
    known = {field.name for field in fields(ModelConfig)} - {"name"}
    for key in settings:
        if key in known:
            found[key] = _setting(settings, key, hints[key], where)
        elif key not in found:
            raise WeightsError(f"models have no setting {key[:100]!r}", where=where)
    return found


def _setting(settings: dict[str, Any], key: str, hint: Any, where: str) -> Any:
    kinds = get_args(hint) if isinstance(hint, UnionType) or type(None) in get_args(hint) else (hint,)
    optional = type(None) in kinds
    kind = next(kind for kind in kinds if kind is not type(None))
    if settings[key] is None and optional:
        return None
    if get_origin(kind) is Literal:
        if settings[key] not in get_args(kind):
            allowed = ", ".join(map(str, get_args(kind)))
            raise WeightsError(
                f"{key} must be one of {allowed}, got {str(settings[key])[:60]!r}", where=where
            )
        return settings[key]
    if get_origin(kind) is tuple:
        return take_list(settings, key, int, where, low=0, high=MAX_DIMENSION)
    if kind is int:
        return take(settings, key, int, where, low=0, high=MAX_DIMENSION)
    return take(settings, key, kind, where)


class _Limited(TorchFunctionMode):
    """ValueError as soon as more than `numbers` numbers are made in tensors, before memory is taken for them."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.left = numbers

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Iterable[Any] = (), options: Any = None
    ) -> Any:
        arguments, options = tuple(arguments), options or {}
        if function in _MAKERS:
            size = options.get("size", arguments)
            size = size[0] if len(size) and isinstance(size[0], list | tuple) else size
            self._count(prod(abs(int(side)) for side in size))
            return function(*arguments, **options)
        result = function(*arguments, **options)
        if isinstance(result, Tensor) and result.numel() > LARGE and result._base is None:
            given = (*arguments, *options.values())
            if not any(result is value for value in given):  # else it is changed in place
                self._count(result.numel())
        return result

    def _count(self, numbers: int) -> None:
        self.left -= numbers
        if self.left < 0:
            raise ValueError("the model is far larger than its weights")


def give_memory(model: nn.Module) -> None:
    """Tensors on the CPU, of any values, in place of a model's on the meta device.

    `Module.to_empty` does the same and imports sympy for it, two thirds of the time that loading takes.
    """
    own = model.state_dict()
    model.load_state_dict(
        {key: torch.empty(own[key].shape, dtype=own[key].dtype) for key in own}, assign=True
    )


def check_shapes(
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    where: str,
    what: str = "the weights are of another model;",
) -> None:
    """WeightsError naming missing, extra and misshapen tensors with the expected shapes, if any."""
    missing = [f"{name} {expected[name]}" for name in sorted(set(expected) - set(found))]
    extra = [f"{name} {found[name]}" for name in sorted(set(found) - set(expected))]
    wrong = [
        f"{name}: has {found[name]}, needs {expected[name]}"
        for name in sorted(set(found) & set(expected))
        if found[name] != expected[name]
    ]
    parts = []
    for title, names in (("missing", missing), ("not expected", extra), ("wrong shape", wrong)):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{title}: {'; '.join(names[:3])}{rest}")
    if parts:
        raise WeightsError(f"{what} " + "; ".join(parts), where=where)

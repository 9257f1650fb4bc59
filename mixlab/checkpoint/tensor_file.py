"""An open file of tensors, whatever its format, and how its faults are told."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mixlab.errors import WeightsError

Shape = tuple[int, ...]


class TensorFile:
    """An open file of tensors. shapes, dtypes: of every tensor, known before any is read. metadata: text by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self._read: Callable[[str], Tensor]
        self._close: Callable[[], object] = lambda: None

    def read(self, name: str) -> Tensor:
        """One tensor, in the file's own shape and type; WeightsError if it is damaged or not finite."""
        with named_errors(self.path, name):
            tensor = self._read(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                raise WeightsError(
                    f"{name} holds {float(tensor[tuple(place)])} at {place}",
                    where=str(self.path),
                    hint="these weights went wrong in training; take earlier ones",
                )
            return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


@contextmanager
def named_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Whatever a parser says about a file that someone may have made on purpose is a finding about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except WeightsError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        what = "it" if name is None else name
        raise WeightsError(
            f"{what} is damaged or not what it seems: {type(error).__name__}: {text}", where=str(path)
        ) from error


def refuse(path: Path, what: str, hint: str | None = None) -> WeightsError:
    return WeightsError(what, where=str(path), hint=hint)

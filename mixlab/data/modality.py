"""What a modality is: a kind of example, such as images, and how one becomes the model's input.

A modality is a folder here with a `Modality` and a `Preprocess`, and a line in data/__init__.py. Listing, reading,
loader, training, evaluation, checkpoints and reports know none of them: they ask these two classes.
"""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from mixlab.errors import ExampleError, UsageError, WeightsError, path_text

MAX_BYTES = 64 * 1024**2  # of one file
MOST_TOGETHER = 256  # parts of long examples that a model takes at once
MOST_PARTS = 8  # along a side of what is hidden part by part


def read_example_file(path: str | Path) -> bytes:
    """The bytes of a file, refused before reading if it is no regular file or too large. ExampleError says why."""
    where = path_text(path, "a file")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
            raise ExampleError("not a regular file", where=where)
        if status.st_size > MAX_BYTES:
            raise ExampleError(f"larger than {MAX_BYTES // 1024**2} MiB", where=where)
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        link = os.path.islink(path)
        raise ExampleError("a link to a missing file" if link else "no such file", where=where) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ExampleError(f"cannot be read: {reason}", where=where) from None


def array_digest(array: np.ndarray) -> str:
    """32 hexadecimal digits of a decoded example with its shape and type: XXH3 of 128 bits.

    Against chance, not against forgery; a SHA would cost a tenth of decoding, and several where a processor has no
    instructions for it.
    """
    digest = xxhash.xxh3_128(f"{array.shape} {array.dtype.str[1:]}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class View:
    """What a model takes in of one kept example, for a page.

    picture: uint8 (H, W, 1 or 3). grid: rows and columns of its parts, which are hidden one after another to learn
    which matter. seconds: what its width stands for, None where that is no time.
    """

    picture: np.ndarray
    grid: tuple[int, int]
    seconds: float | None = None


class Preprocess(ABC):
    """How any example of one modality becomes the model's input: what travels with the weights.

    modality_name: in MODALITIES. channels: of the model's input. kept_dtype: of an example as memory keeps it.
    graph_input: what the input of an exported model is called.
    """

    modality_name: ClassVar[str]
    kept_dtype: ClassVar[Any] = np.uint8
    graph_input: ClassVar[str] = "examples"
    channels: int

    @property
    def modality(self) -> "Modality":
        return MODALITIES[self.modality_name]

    @property
    @abstractmethod
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the model's input; of a sequence (1, length)."""

    @property
    @abstractmethod
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of one example as memory keeps it."""

    @abstractmethod
    def keep(self, example: np.ndarray) -> np.ndarray:
        """A decoded example as memory keeps it: `kept_dtype`, `kept_shape`."""

    def keep_all(self, examples: np.ndarray) -> np.ndarray | None:
        """`keep` of many decoded examples at once, where that is quick; else None."""
        return None

    @abstractmethod
    def to_input(self, kept: Tensor) -> Tensor:
        """Kept examples (B, *kept_shape) -> the model's input, float32 (B, channels, *input_size)."""

    def windows(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kept examples as they are measured and used: inputs, and of each the number of the example it is a part of.

        int64, in order; None for one input each. The model's outputs for an example are then their mean.
        """
        return self.to_input(kept), None

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def from_json(cls, values: dict[str, Any], where: str = "config.json") -> "Preprocess":
        """The inverse of `to_json`; WeightsError, with the place `where`, for values that no example fits."""

    def to_graph(self, kept: np.ndarray) -> np.ndarray:
        """Kept examples (n, *kept_shape) as an exported model takes them."""
        return kept

    def in_graph(self) -> Callable[[Tensor], Tensor]:
        """`to_input` of what `to_graph` gives, in operations that every runtime has; a module if it has constants."""
        return self.to_input

    def with_size(self, size: tuple[int, int]) -> "Preprocess":
        """For a model that was resampled to another input size. UsageError where there is no such thing."""
        raise UsageError(
            f"only weights for images are resampled, these take {self.modality.many}", where="image_size"
        )

    def render(self, kept: Tensor) -> list[np.ndarray]:
        """Kept examples to look at, for reports and pages: uint8 (H, W, 1 or 3) each."""
        return self.render_input(self.to_input(kept))

    def render_input(self, inputs: Tensor) -> list[np.ndarray]:
        """The same of the model's inputs: here channels below each other, from the lowest value to the highest."""
        rows = inputs.flatten(1, 2).float()
        low, high = rows.amin((1, 2), keepdim=True), rows.amax((1, 2), keepdim=True)
        grey = (255 * (rows - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8)
        return list(grey[..., None].cpu().numpy())

    def facts(self) -> dict[str, Any]:
        """What people and programs may want to know of the input, for a server."""
        return {"input_size": list(self.input_size), "channels": self.channels}

    def view(self, kept: Tensor) -> View:
        """One kept example, as a model takes it in."""
        height, width = self.input_size
        return View(self.render(kept[None])[0], (min(MOST_PARTS, height), min(MOST_PARTS, width)))

    def hidden(self, kept: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """As `windows` of (1, ...): one kept example as often as there are `parts`, each time with that one hidden.

        parts: numbers in the grid of `view`, row by row. Hidden is what is 0 in the input.
        """
        inputs = self.to_input(kept[None]).repeat_interleave(len(parts), 0)
        for one, place in zip(inputs, grid_places(self.view(kept).grid, self.input_size, parts), strict=True):
            one[place] = 0.0
        return inputs, None

    def read(self, source: str | Path | bytes) -> np.ndarray:
        """A file or its bytes, kept. ExampleError if it is no example."""
        content = source if isinstance(source, bytes) else read_example_file(source)
        return self.keep(self.modality.decode(content, self))


@dataclass(frozen=True)
class BadFile:
    """An example that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Look:
    """One example, read for the first time. fact: what `Modality.learn` wants to know of it, if anything."""

    example: np.ndarray
    digest: str
    fact: Any = None


@dataclass(frozen=True)
class Needs:
    """What a model wants of its input. side: of the images that it is made for. is_fixed: whether it takes no other
    unless it is told to. unit: of which sides should be multiples, None for what suits them."""

    side: int | None = None
    is_fixed: bool = False
    unit: int | None = None


@dataclass(frozen=True)
class Program:
    """What is in a package beside the model. file: in mixlab/exports. needs: packages. example: a file's name."""

    file: str
    needs: tuple[str, ...]
    example: str


def grid_places(
    grid: tuple[int, int], size: tuple[int, int], parts: Sequence[int]
) -> list[tuple[Any, slice, slice]]:
    """Where parts of a grid lie in an array (..., height, width): a part's number, row by row -> an index of it."""
    rows, columns = (
        np.linspace(0, side, count + 1).astype(int) for side, count in zip(size, grid, strict=True)
    )
    places = [divmod(part, grid[1]) for part in parts]
    return [(..., slice(rows[y], rows[y + 1]), slice(columns[x], columns[x + 1])) for y, x in places]


class Modality(ABC):
    """A kind of example. One object of it is registered.

    name: in files of weights. one, many: in messages. suffixes: file names' endings in lower case;
    foreign_suffixes: of files that are tried too, so that each is listed with what to do. part: of a recipe, which
    says how its examples are changed in training. taken: what `takes` takes, in words.
    column: the type of its columns in Hugging Face `datasets`; column_names: what they are called, the usual first.
    recipes: those that `auto` means for few examples and for many; None for the defaults of all keys.
    program: how a package uses its model; None where there is no such program.
    repair: what to do about a file that is damaged.
    split_lists: files beside class folders that list the paths of a split, by their names; beside: folders there that
    are no classes.
    """

    name: ClassVar[str]
    one: ClassVar[str]
    many: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    foreign_suffixes: ClassVar[frozenset[str]] = frozenset()
    part: ClassVar[str] = "augment"
    taken: ClassVar[str] = ""
    column: ClassVar[str] = ""
    column_names: ClassVar[tuple[str, ...]] = ()
    recipes: ClassVar[tuple[str, str] | None] = None
    program: ClassVar[Program | None] = None
    repair: ClassVar[str] = "the file itself is damaged: save it again"
    split_lists: ClassVar[Mapping[str, str]] = {}
    beside: ClassVar[frozenset[str]] = frozenset()
    preprocess_type: ClassVar[type[Preprocess]]

    def claims(self, start: bytes) -> bool:
        """Whether a file that begins so is one, where its name says nothing."""
        return False

    @abstractmethod
    def decode(self, content: bytes, preprocess: Any = None) -> np.ndarray:
        """One example of a file's bytes, before it is brought to the model's size. ExampleError if it is none."""

    def look(self, content: bytes, preprocess: Any = None) -> Look:
        """`decode` for the first time, with its digest."""
        example = self.decode(content, preprocess)
        return Look(example, array_digest(example))

    def encode(self, example: np.ndarray) -> tuple[bytes, str]:
        """A file of an example that was none, and its name's ending: for shards."""
        raise UsageError(f"{self.many} in memory cannot be written as files")

    def suffix_of(self, content: bytes) -> str:
        """The ending, without a dot, that a file of these bytes should have."""
        raise UsageError(f"{self.many} are not written into shards")

    @abstractmethod
    def resolve(self, data: Any, settings: Any, train: Any, needs: Needs) -> tuple[Any, Any]:
        """The DataConfig with image_size and channels, those of the model's input, as the training split has them,
        and `settings`, the recipe's `part`, with what they leave to the data.

        UsageError for keys of the data that are of another modality.
        """

    @abstractmethod
    def preprocess(self, data: Any, settings: Any) -> Preprocess:
        """What a resolved recipe's DataConfig and `part` say. UsageError where they do not fit together."""

    def learn(self, data: Any, facts: Sequence[Any]) -> tuple[Any, str | None]:
        """The DataConfig with what the facts of the training examples decide, and a sentence on it."""
        return data, None

    def start_from(self, data: Any, settings: Any, preprocess: Preprocess) -> tuple[Any, Any]:
        """DataConfig and `part` with what they leave open as the weights have it that a training starts from."""
        data = replace(
            data,
            image_size=data.image_size or preprocess.input_size,
            channels=data.channels or preprocess.channels,
        )
        return data, settings

    def settled(self, settings: Any, epochs: float) -> Any:
        """The recipe's `part` for a training of so many epochs."""
        return settings

    def augment(self, kept: Tensor, settings: Any, *, seed: int, epoch: int, index: np.ndarray) -> Tensor:
        """Kept examples (B, ...), changed as `settings` say; draws are pure functions of seed, epoch and index."""
        return kept

    def augment_input(
        self, inputs: Tensor, settings: Any, *, seed: int, epoch: int, index: np.ndarray
    ) -> Tensor:
        """Inputs of the model (B, channels, *input_size), changed as `settings` say; draws as for `augment`."""
        return inputs

    def drawn(
        self, examples: Any, settings: Any, *, seed: int, epoch: int, index: np.ndarray
    ) -> "tuple[Tensor, np.ndarray, list[BadFile]]":
        """The kept examples at `index` as training sees them in an epoch, their numbers, and what cannot be read.

        examples: `reading.Examples`. settings: the recipe's `part`.
        """
        kept, good, bad = examples.readable(index)
        return self.augment(kept, settings, seed=seed, epoch=epoch, index=good), good, bad

    def describe(self, content: bytes | None, look: Look) -> dict[str, Any]:
        """Facts of one example for `check`, by name; content: None where it is no file."""
        return {}

    def summarize(self, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What `check` says of all of them."""
        return {}

    def samples(self, count: int, preprocess: Any) -> list[np.ndarray]:
        """Some decoded examples that come with mixlab's libraries. UsageError where there are none."""
        raise UsageError(
            f"there are no {self.many} to compare on",
            where="--data",
            hint="name a data set, or a folder of some",
        )

    def near_hash(self, example: np.ndarray) -> int | None:
        """64 bits that are nearly the same for examples that nearly are; None where there is no such thing."""
        return None

    def picture(self, example: np.ndarray) -> np.ndarray | None:
        """A decoded example to look at as it came: uint8 (H, W, 1 or 3); None where only `render` can show it."""
        return None

    def playable(self, example: np.ndarray, preprocess: Any) -> tuple[str, bytes] | None:
        """A decoded example to listen to in a browser: media type and a file; None where there is no such thing."""
        return None

    def probe(self, preprocess: Any) -> bytes:
        """A small file of one, by which a server tries whether any are decoded. UsageError where none is known."""
        raise UsageError(f"the server is not made for weights that take {self.many}")

    def takes(self, item: Any) -> bool:
        """Whether `predict` takes this, beside paths, bytes and open files."""
        return False

    def contents(self, item: Any, preprocess: Any) -> "list[np.ndarray | ExampleError]":
        """The decoded examples of such an item; of an example that cannot be read its error."""
        return []


def mean_of_parts(model: Callable[[Tensor], Tensor], inputs: Tensor, owner: Tensor | None) -> Tensor:
    """What `model` says, float32 (B, ...) on the CPU, of the examples that `inputs` are parts of.

    On the CPU, since sums of parts have no fixed order on a GPU. owner: as `Preprocess.windows` gives it. Where a few
    examples have many parts, MOST_TOGETHER go in at a time.
    """
    if owner is None:
        return model(inputs).float().cpu()
    outputs = torch.cat([model(some).float().cpu() for some in inputs.split(MOST_TOGETHER)])
    owner = owner.cpu()
    counts = owner.bincount()
    sums = outputs.new_zeros(len(counts), *outputs.shape[1:]).index_add_(0, owner, outputs)
    return sums / counts.to(sums).view(-1, *[1] * (outputs.ndim - 1))


MODALITIES: dict[str, Modality] = {}
SETS: dict[str, Callable[[], Any]] = {}  # data sets that need no file, by the name that a person gives


def register(modality: Modality, sets: Mapping[str, Callable[[], Any]] | None = None) -> None:
    """Make a modality known; the first one is what a folder of nothing is taken for.

    sets: data sets of it that come with mixlab or its libraries: name -> a function that gives the `Source`.
    """
    MODALITIES[modality.name] = modality
    SETS.update(sets or {})


def registered(name: Any) -> Modality | None:
    """The modality of a name that a file has; None for an unknown one, and for what is no name."""
    return MODALITIES.get(name) if isinstance(name, str) else None


def read_preprocess(values: dict[str, Any], where: str) -> Preprocess:
    """A `Preprocess` as weights have it; those that name no modality take images. WeightsError for an unknown one."""
    name = values.get("modality", "images")
    modality = registered(name)
    if modality is None:
        known = ", ".join(MODALITIES)
        raise WeightsError(
            f"these weights take {str(name)[:40]!r}, which this mixlab does not know (it knows {known})",
            where=where,
            hint="use the mixlab that wrote them, or a newer one",
        )
    rest = {key: value for key, value in values.items() if key != "modality"}
    return modality.preprocess_type.from_json(rest, where)

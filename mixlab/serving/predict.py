"""A trained model for use: examples in, labels with probabilities out."""

import csv
import glob
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import nn

from mixlab.checkpoint.open import open_weights
from mixlab.cpu.inference import fast
from mixlab.data.listing import Skips, describe_skipped, files_below
from mixlab.data.modality import Modality, Preprocess, mean_of_parts
from mixlab.device import num_cores, pick_device
from mixlab.errors import ExampleError, UsageError, check_type
from mixlab.escape import for_csv
from mixlab.files import near_paths, write_atomically
from mixlab.models.layers import Gelu
from mixlab.serving.inputs import Given, read_inputs

Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | BinaryIO | np.ndarray
BATCH_SIZE = 64
NUM_NAMED = 5  # classes, in a repr
FEW = 8  # examples, below which no fast copy of the model is made


@dataclass(frozen=True, kw_only=True, repr=False)
class Classifier:
    """A model with its preprocessing and class names; what `mixlab.load` returns.

    model: float32 (B, channels, H, W), as `preprocess` gives it -> logits (B, K). cautions: to be read before
    it is trusted. temperature: of calibrated probabilities, 1 where none was fitted.
    """

    model: nn.Module
    preprocess: Preprocess
    class_names: tuple[str, ...]
    provenance: dict[str, Any]
    device: torch.device
    cautions: tuple[str, ...] = ()
    temperature: float = 1.0

    def __repr__(self) -> str:
        size = " x ".join(map(str, (*self.preprocess.input_size, self.preprocess.channels)))
        some = ", ".join(self.class_names[:NUM_NAMED]) + (
            ", ..." if len(self.class_names) > NUM_NAMED else ""
        )
        name = type(self.model).__name__
        return f"Classifier({name}, {len(self.class_names):,} classes ({some}), input {size})"

    @torch.inference_mode()
    def predict(
        self, images: Picture | Iterable[Picture], *, top: int = 5, calibrated: bool = True
    ) -> list[dict[str, Any]]:
        """For each image its `top` labels: {"path", "predictions": [{"label", "probability"}]} or {"path", "error"}.

        images: one of, or a list of: a path of a file or of a folder (all images below it); bytes, bytearray or
        memoryview of an image file; a PIL image; a binary file object, read from where it stands and left open; an
        array uint8 (H, W), (H, W, 1 or 3), or a batch (N, H, W, 1 or 3). What is no path has its number among all
        images as path. An image that cannot be read becomes an error row, not an exception; an argument of another
        kind is a UsageTypeError, which is a TypeError too, before anything is opened.
        calibrated: divide the logits by the temperature that was fitted on validation, where there is one.
        """
        temperature = self.temperature if calibrated else 1.0
        check_type(top, (Integral,), "top", "a number of labels")
        modality = self.preprocess.modality
        given = read_inputs(images, self.preprocess, lambda folder: find_examples([folder], modality))
        if top < 1:
            raise UsageError(f"top must be at least 1, got {top}", where="--top")
        rows: list[dict[str, Any]] = []
        # Packing the weights takes as long as a few images do.
        model = fast(self.model) if len(given) >= FEW else self.model
        for start in range(0, len(given), BATCH_SIZE):
            part = given[start : start + BATCH_SIZE]
            with ThreadPoolExecutor(num_cores()) as pool:
                read = list(pool.map(self._read, part))
            good = [i for i, result in enumerate(read) if isinstance(result, np.ndarray)]
            kept = np.stack([read[i] for i in good]) if good else None
            found = iter([] if kept is None else self._classify(model, kept, top, temperature))
            for one, result in zip(part, read, strict=True):
                if isinstance(result, np.ndarray):
                    rows.append({"path": one.name, "predictions": next(found)})
                else:
                    rows.append({"path": one.name, "error": result})
        return rows

    def _read(self, given: Given) -> np.ndarray | str:
        try:
            return given.read(self.preprocess)
        except ExampleError as error:
            return error.message

    def _classify(
        self, model: nn.Module, kept: np.ndarray, top: int, temperature: float
    ) -> list[list[dict[str, Any]]]:
        inputs, owner = self.preprocess.windows(torch.from_numpy(kept).to(self.device))
        logits = mean_of_parts(model, inputs, owner)
        probabilities = (logits / temperature).softmax(dim=1)
        values, labels = probabilities.topk(min(top, len(self.class_names)), dim=1)
        return [
            [
                {"label": self.class_names[int(label)], "probability": float(value)}
                for value, label in zip(row_values, row_labels, strict=True)
            ]
            for row_values, row_labels in zip(values, labels, strict=True)
        ]


def load(
    path_or_name: str | os.PathLike[str],
    image_size: int | tuple[int, int] | None = None,
    *,
    gelu: Gelu | None = None,
    layer_norm_eps: float | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """The classifier in a run, a weights folder or file of any known format, or of a published name.

    The arguments are those of `mixlab.checkpoint.open.open_weights`: image_size resamples a Mixer to another
    side or (height, width); gelu and layer_norm_eps replace what the format implies. What was assumed is in
    `.provenance["assumed"]`. WeightsError says what is missing or damaged, UsageTypeError what is no path or name.
    """
    weights = open_weights(
        path_or_name, image_size=image_size, gelu=gelu, layer_norm_eps=layer_norm_eps, progress=progress
    )
    torch_device = pick_device(device)
    return Classifier(
        model=weights.model.to(torch_device).eval(),
        preprocess=weights.preprocess,
        class_names=weights.class_names,
        provenance=weights.provenance,
        device=torch_device,
        cautions=weights.cautions,
        temperature=weights.temperature,
    )


def find_examples(arguments: Sequence[str], modality: Modality, skips: Skips | None = None) -> list[str]:
    """Files named by paths, folders (all examples below, sorted) and globs. UsageError if one names nothing.

    skips: takes what is left out of folders.
    """
    skips = skips or Skips()
    found: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = files_below(path, modality, skips)
            if not inside:
                hint = describe_skipped(skips.result()) or None
                raise UsageError(f"there are no {modality.many} in this folder", where=argument, hint=hint)
            found += inside
        elif path.exists() or path.is_symlink():
            found.append(argument)
        else:
            matches = sorted(p for p in glob.glob(argument, recursive=True) if not Path(p).is_dir())
            if not matches:
                near = near_paths(path)
                hint = f"did you mean {' or '.join(near)}?" if near else None
                raise UsageError(
                    f"there is no such {modality.one}, folder or match", where=argument, hint=hint
                )
            found += matches
    return found


def mark_unsure(rows: list[dict[str, Any]], min_confidence: float) -> None:
    """Give each row of `Classifier.predict` that has predictions "unsure": is the best below `min_confidence`?"""
    for row in rows:
        if "predictions" in row:
            row["unsure"] = row["predictions"][0]["probability"] < min_confidence


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """path, rank, label, probability, error: one line a label, one a failed image. Text as `for_csv` writes it.

    A last column, unsure, where the rows were marked (`mark_unsure`).
    """
    marked = any("unsure" in row for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "rank", "label", "probability", "error"] + ["unsure"] * marked)
    for row in rows:
        if "error" in row:
            writer.writerow([for_csv(row["path"]), "", "", "", for_csv(row["error"])] + [""] * marked)
        for rank, guess in enumerate(row.get("predictions", []), start=1):
            label, share = for_csv(guess["label"]), f"{guess['probability']:.6f}"
            unsure = ["true" if row.get("unsure") else "false"] * marked
            writer.writerow([for_csv(row["path"]), rank, label, share, "", *unsure])
    write_atomically(path, text.getvalue().encode("utf-8", errors="surrogateescape"))

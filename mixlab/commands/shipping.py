"""The commands that take a model out of the laboratory, one function each; its docstring is the command's help.

torch is imported inside the commands that need it, so that help and usage errors come at once.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mixlab.commands.context import (
    Context,
    emit,
    existing_run,
    find_weights,
    open_named,
    parse_size,
    plain_name,
)
from mixlab.errors import ExampleError, UsageError, path_text

if TYPE_CHECKING:
    import numpy as np

    from mixlab.checkpoint.store import Weights
    from mixlab.data.modality import Preprocess

NUM_PICTURES, NUM_SCALED = 64, 1000  # to compare an export on: of a plain graph, and of one that scales
NUM_TRAIN = 2000  # to calibrate on where nothing was held out


def export(
    run: str,
    /,
    *,
    to: str = "onnx",
    out: Path | None = None,
    int8: Annotated[bool, Parameter(negative="")] = False,
    image_size: str | None = None,
    batch: str = "dynamic",
    resize_in_graph: Annotated[bool, Parameter(negative="")] = False,
    pictures: Path | None = None,
    data: str | None = None,
    threads: int | None = None,
) -> None:
    """Write a model for another runtime, preprocessing and class names inside, compared on real images.

    The graph takes uint8 pixels at model size, (batch, height, width, channels), or int16 samples of sounds,
    (batch, samples), and gives logits.

    Parameters
    ----------
    run
        A run by name or path, a weights file of any known format, or a published name.
    to
        onnx, openvino (a folder) or torch-export.
    out
        What to write; by default the run's name with the target's ending.
    int8
        ONNX and images only: 8-bit products, calibrated on the validation split, or a part of train where
        there is none; accuracy and speed before and after.
    image_size
        Side, or HxW, in pixels: resample the Mixer to it first.
    batch
        How many images the graph takes: a number, or dynamic for any.
    resize_in_graph
        Take one image of any size, and crop and scale it inside the graph.
    pictures
        Folder of images to compare on; by default those of the run's test split, else two photos of scikit-learn's.
    data
        The data set, where the run's own has moved or the weights have none.
    threads
        For what is measured.
    """
    from mixlab.report.tables import show_export

    if batch != "dynamic" and not batch.isdigit():
        raise UsageError(f"{batch!r} is no number of images", where="--batch", hint="a number, or dynamic")
    result = export_run(
        run,
        to=to,
        out=out,
        int8=int8,
        image_size=parse_size(image_size),
        batch=None if batch == "dynamic" else int(batch),
        resize_in_graph=resize_in_graph,
        pictures=pictures,
        data=data,
        threads=threads,
    )
    show_export(result, Context.screen())
    emit(result)


def export_run(
    run: str | os.PathLike[str],
    *,
    to: str = "onnx",
    out: Path | None = None,
    int8: bool = False,
    image_size: tuple[int, int] | None = None,
    batch: int | None = None,
    resize_in_graph: bool = False,
    pictures: Path | None = None,
    data: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """`mixlab.export`: write a model for another runtime; returns what `mixlab export --json` prints.

    run: a run, a weights file, or a published name. to: onnx, openvino or torch-export. out: the file, or for
    OpenVINO the folder; by default the run's name. The rest is as for `mixlab export`. MixlabError, and no file, if
    what was written computes something else.
    """
    from mixlab.data.images.preprocess import for_images
    from mixlab.device import num_cores, set_threads
    from mixlab.exports.export import ENDINGS
    from mixlab.exports.export import export as export_weights

    run = path_text(run, "run", "a run, a weights file or a published name")
    if int8 and (to != "onnx" or resize_in_graph or batch is not None):
        raise UsageError("8-bit products are for plain ONNX models with any batch", where="--int8")
    set_threads(threads)
    weights = open_named(run, image_size=image_size)
    if int8:  # a sound's loudness spans more than 8 bits before its logarithm is taken
        for_images(weights.preprocess, "8-bit products", "--int8")
    destination = Path(plain_name(run) + ENDINGS.get(to, "")) if out is None else Path(out)
    shown = _examples(run, weights, data, pictures, NUM_SCALED if resize_in_graph else NUM_PICTURES)
    if int8:
        return _export_int8(run, weights, destination, data, shown, threads or num_cores())
    return export_weights(
        weights, destination, examples=shown, to=to, batch=batch, resize_in_graph=resize_in_graph
    )


def _export_int8(
    run: str, weights: "Weights", destination: Path, data: str | None, shown: list["np.ndarray"], threads: int
) -> dict[str, Any]:
    """The exact model beside it first, then the 8-bit one, and both on the test split."""
    import tempfile

    from mixlab.exports.export import export as export_weights
    from mixlab.exports.export import keep_record
    from mixlab.exports.int8 import accuracy_of, compare_speed, quantise

    if destination.exists():
        raise UsageError("it exists already", where=str(destination), hint="choose another --out")
    tested, test_labels = _labelled(run, weights, data, "test")
    judged_on = "val"
    try:
        chosen, labels = _labelled(run, weights, data, "val")
    except UsageError:  # nothing was held out: a part of train has to do, never the test split
        judged_on = "train"
        chosen, labels = _labelled(run, weights, data, "train", NUM_TRAIN)
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact.onnx"
        result = export_weights(weights, exact, to="onnx", examples=shown)
        found = quantise(exact, destination, chosen, labels, threads=threads)
        found |= {
            "test_before": accuracy_of(exact, tested, test_labels, threads),
            "test_after": accuracy_of(destination, tested, test_labels, threads),
            "judged_on": judged_on,
            "num_judged": len(chosen),
            "num_test": len(tested),
            "num_bytes_before": exact.stat().st_size,
            "num_bytes_after": destination.stat().st_size,
            "speed_ratio": compare_speed(exact, destination, tested, threads),
        }
    result |= {"destination": str(destination), "num_bytes": destination.stat().st_size, "int8": found}
    keep_record(result)
    return result


def _examples(
    run: str, weights: "Weights", data: str | None, folder: Path | None, count: int
) -> list["np.ndarray"]:
    """Real examples, as they are decoded: of a folder, of the test split, or such as libraries bring."""
    import numpy as np

    from mixlab.data.reading import read_example
    from mixlab.serving.predict import find_examples

    preprocess = weights.preprocess
    if folder is not None:
        paths = find_examples([str(folder)], preprocess.modality)[:count]
        return [_decoded(path, preprocess) for path in paths]
    try:
        split = _split(run, weights, data, "test")
    except UsageError:
        if data is not None:
            raise
        return preprocess.modality.samples(count, preprocess)
    places = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)
    return [read_example(split, int(i), preprocess) for i in places]


def _decoded(path: str, preprocess: "Preprocess") -> "np.ndarray":
    from mixlab.data.modality import read_example_file

    try:
        return preprocess.modality.decode(read_example_file(path), preprocess)
    except ExampleError as error:
        raise UsageError(error.message, where=path, hint="leave the file out") from None


def _split(run: str, weights: "Weights", data: str | None, name: str) -> Any:
    from mixlab.training.choose_split import choose_split
    from mixlab.training.evaluate import check_modality, with_class_numbers

    path = Path(find_weights(run))
    if data is None and not (path / "recipe.toml").is_file():
        raise UsageError(
            "these weights have no data set of their own", where="--data", hint="name one: --data FOLDER"
        )
    source, split = choose_split(path, data, name, None, Context.screen(), split_whole=True)
    check_modality(source, weights)
    return with_class_numbers(split, source, weights.class_names)


def _labelled(
    run: str, weights: "Weights", data: str | None, name: str, most: int | None = None
) -> tuple["np.ndarray", "np.ndarray"]:
    """Examples (n, ...) as the graph takes them and labels of a split, or of `most` of it."""
    import numpy as np

    from mixlab.data.reading import load_examples

    split = _split(run, weights, data, name)
    if most is not None:
        split = split.take(np.linspace(0, len(split) - 1, min(most, len(split))).astype(np.int64))
    examples = load_examples(split, weights.preprocess)
    kept = examples.at(np.arange(len(examples))).numpy()
    return weights.preprocess.to_graph(kept), examples.split.labels


def _card(run: str, weights: "Weights", licence: str, data_name: str | None) -> str:
    """The card of a run, or the one that stands beside weights, or what can be said of weights alone."""
    from mixlab.checkpoint.open import weights_folder
    from mixlab.exports.card import card_beside, write_card

    place, folder = existing_run(run), weights_folder(run)
    kept = (
        card_beside(folder, licence=licence, data=data_name) if folder is not None and place is None else None
    )
    return kept or write_card(weights, place, licence=licence, data=data_name)


def card(
    run: str, /, *, out: Path | None = None, licence: str = "not stated", data_name: str | None = None
) -> None:
    """Write a model card: what the model is, what was measured, how it was trained, where its limits are.

    Parameters
    ----------
    run
        A run by name or path, or weights of any known format.
    out
        The file; by default it is printed.
    licence
        Of the weights: an identifier of the Hugging Face Hub, such as apache-2.0; other for one of your own.
    data_name
        What to call the data set.
    """
    from mixlab.files import write_atomically

    text = _card(run, open_named(run), licence, data_name)
    if out is None:
        Context.screen().say_lines(text)
    else:
        write_atomically(out, text.encode())
        Context.screen().say(f"written to {out}")
    emit({"card": text, "out": None if out is None else str(out)})


def package(
    run: str, /, *, out: Path | None = None, data: str | None = None, licence: str = "not stated"
) -> None:
    """A zip for people without mixlab: the model as ONNX, a predict.py for ONNX Runtime alone, and the model card.

    Parameters
    ----------
    run
        A run by name or path, a weights file of any known format, or a published name.
    out
        The file; by default the run's name with .zip.
    data
        As for `export`.
    licence
        As for `card`.
    """
    from mixlab.exports.package import write_package

    weights = open_named(run)
    destination = out or Path(plain_name(run) + ".zip")
    text = _card(run, weights, licence, None)
    result = write_package(weights, destination, text, _examples(run, weights, data, None, NUM_PICTURES))
    Context.screen().say(f"written to {destination}: {', '.join(result['files'])}")
    emit(result)


def push(
    run: str,
    repository: str | None = None,
    /,
    *,
    folder: Path | None = None,
    format: str | None = None,
    private: Annotated[bool, Parameter(negative="")] = False,
    licence: str = "not stated",
    data_name: str | None = None,
) -> None:
    """Put weights with a model card on the Hugging Face Hub, or the same files into a folder.

    Parameters
    ----------
    run
        A run by name or path, a weights file of any known format, or a published name.
    repository
        OWNER/NAME on the Hub.
    folder
        Write there instead, and upload nothing.
    format
        mixlab-timm (loads in timm where mixlab is installed; for plain Mixers the default), timm or mixlab.
    private
        Make a new repository private.
    licence
        Of the weights: an identifier of the Hugging Face Hub, such as apache-2.0; other for one of your own.
    data_name
        What to call the data set.
    """
    from mixlab.exports.push import push as push_weights
    from mixlab.exports.push import write_repository

    if (repository is None) == (folder is None):
        raise UsageError("give a repository, or --folder", where="REPO")
    weights = open_named(run)
    text = _card(run, weights, licence, data_name)
    if folder is not None:
        result = write_repository(weights, folder, text, format=format)
    else:
        result = push_weights(weights, str(repository), text, format=format, private=private)
    where = result["folder"] or result["url"]
    Context.screen().say(f"{', '.join(result['files'])} as {result['format']} at {where}")
    emit(result)

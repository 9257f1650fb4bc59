"""The commands that use a model or look at data and machine, one function each; its docstring is the command's help.

torch is imported inside the commands that need it, so that help and usage errors come at once.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mixlab.commands.context import Context, emit, find_weights, parse_size, say_cautions
from mixlab.errors import UsageError
from mixlab.words import counted

if TYPE_CHECKING:
    from mixlab.data.modality import Modality

STDIN = "-"


def predict(
    run: str,
    /,
    *images: Annotated[str, Parameter(allow_leading_hyphen=True)],  # for "-"
    top: int = 5,
    csv: Path | None = None,
    min_confidence: float | None = None,
    raw_probabilities: Annotated[bool, Parameter(negative="")] = False,
    image_size: str | None = None,
    device: str = "auto",
) -> int:
    """Say what is in images or sounds: files, whole folders or quoted globs; - is one from standard input.

    Exit status: 0 if every one could be read, 1 if some could not; the others have their labels.

    Parameters
    ----------
    run
        A run by name or path, a weights file of any known format, or a published name such as mixer_b16:imagenet1k.
    images
        Files, folders, or globs; - reads one file from standard input.
    top
        How many labels for each image.
    csv
        Write path, rank, label, probability, error, unsure to this file; of many images nothing else is shown then.
    min_confidence
        Mark images whose best label has a lower probability as unsure; `evaluate` and the report name useful values.
    raw_probabilities
        Without the temperature that was fitted on validation.
    image_size
        Side, or HxW, in pixels: resample the Mixer to it first.
    """
    from mixlab.data.listing import Skips, describe_skipped
    from mixlab.device import set_threads
    from mixlab.report.tables import show_predictions
    from mixlab.serving.predict import find_examples, load, mark_unsure, write_csv

    paths = _paths(images)
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise UsageError(
            f"a probability is between 0 and 1, got {min_confidence:g}",
            where="--min-confidence",
            hint="such as 0.9",
        )
    set_threads(None)
    screen = Context.screen()
    with screen.progress_if_any("downloading") as progress:
        classifier = load(find_weights(run), parse_size(image_size), device=device, progress=progress)
    skips = Skips()
    say_cautions(classifier.cautions)
    found: list[Any] = find_examples(paths, classifier.preprocess.modality, skips)
    if STDIN in images:
        found.append(sys.stdin.buffer)
    rows = classifier.predict(found, top=top, calibrated=not raw_probabilities)
    if STDIN in images:
        rows[-1]["path"] = STDIN
    num_bad = sum("error" in row for row in rows)
    if min_confidence is not None:
        mark_unsure(rows, min_confidence)
    modality = classifier.preprocess.modality
    result = {modality.many: rows, "num_ok": len(rows) - num_bad, "num_bad": num_bad}
    if min_confidence is not None:
        result["num_unsure"] = sum(row.get("unsure", False) for row in rows)
    result["skipped"] = [one.to_json() for one in skips.result()]
    if csv is not None:
        write_csv(rows, csv)
    if csv is None or len(rows) == 1:
        show_predictions(result, modality.one, modality.many, screen)
    if skips.counts:
        screen.say(describe_skipped(skips.result()))
    if csv is not None:
        screen.say(_written(result, csv, modality))
    emit(result)
    return 1 if num_bad else 0


def _paths(arguments: tuple[str, ...]) -> list[str]:
    """What `predict` was given but for "-". UsageError for nothing at all, and for what looks like an option."""
    if not arguments:
        raise UsageError(
            "there is no image to look at",
            where="IMAGE",
            hint="name files, a folder or a glob, or - for one from standard input",
        )
    for one in arguments:
        if one.startswith("-") and one != STDIN:
            raise UsageError(
                f'Unknown option: "{one}"',
                hint="`mixlab predict --help` lists the options",
            )
    if arguments.count(STDIN) > 1:
        raise UsageError("standard input is one file, and - is there twice", where="IMAGE")
    return [one for one in arguments if one != STDIN]


def _written(result: dict[str, Any], csv: Path, modality: "Modality") -> str:
    """What of `predict` is in a CSV file, in a sentence."""
    text = f"written to {csv}: the labels of {counted(result['num_ok'], modality.one, modality.many)}"
    if "num_unsure" in result:
        text += f", {result['num_unsure']:,} of them unsure"
    return text + (
        f"; {result['num_bad']:,} could not be read, with the reasons" if result["num_bad"] else ""
    )


def check(
    data: str,
    /,
    *,
    data_dir: str | None = None,
    download: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Look through a data set: counts, sizes, unreadable files, images that are there twice.

    Exit status: 0 if every image could be read, 1 if some could not or a shard is damaged; duplicates count for 0.

    Parameters
    ----------
    data
        As for `train`.
    data_dir
        Where torchvision's sets lie; ./data by default.
    download
        Fetch a torchvision or hf: set that is not there yet.
    """
    from mixlab.data.check import check as check_source
    from mixlab.data.sources import open_source
    from mixlab.report.checks import show_check
    from mixlab.training.cautions import class_cautions

    screen = Context.screen()
    source = open_source(data, data_dir=data_dir, download=download)
    with screen.progress("checking", sum(len(split) for split in source.splits.values())) as bar:
        result = check_source(source, progress=lambda done, total: bar.update(done))
    many = source.modality.many
    learnt = source.splits.get("train", source.splits.get("all"))
    cautions = [] if learnt is None else class_cautions(source.class_names, learnt.labels, many)
    values = result.to_json() | {"cautions": cautions}
    show_check(values, source.modality.one, many, screen)
    if data.startswith("wds:") and source.root is not None:
        from mixlab.data.shards import verify_shards

        with screen.progress("comparing shards", len(list(source.root.glob("*.tar")))) as bar:
            bad = verify_shards(source.root, progress=lambda done, total: bar.update(done))
        values["bad_shards"] = bad
        for shard in bad:
            screen.say(f"{shard['path']}: {shard['reason']}")
    emit(values)
    return 1 if result.num_bad or source.lost or values.get("bad_shards") else 0


def shard(
    data: str,
    out: Path | None = None,
    /,
    *,
    shard_mib: int = 256,
    seed: int = 0,
    data_dir: str | None = None,
    download: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write a data set as tar shards (webdataset) with a manifest, to train from `wds:OUT`.

    Every image or sound is decoded once; those that cannot be are left out and listed in OUT/bad_files.csv. Without
    OUT, DATA is a folder of tar shards made elsewhere (KEY.jpg or KEY.wav, and KEY.cls), which is read once and gets
    its manifest. Exit status: 0 if all could be read, 1 if some were left out.

    Parameters
    ----------
    data
        As for `train`.
    out
        The folder to make.
    shard_mib
        Size at which the next shard is begun.
    seed
        Of the order of the examples in the shards.
    data_dir
        Where torchvision's sets lie; ./data by default.
    download
        Fetch a torchvision or hf: set that is not there yet.
    """
    from mixlab.data.shard_writer import index_shards, write_shards
    from mixlab.data.sources import open_source

    screen = Context.screen()
    if shard_mib < 1:
        raise UsageError(f"a shard of {shard_mib} MiB holds nothing", where="--shard-mib")
    with screen.progress_if_any("writing shards") as progress:
        if out is None:
            result = index_shards(Path(data), progress=progress)
        else:
            source = open_source(data, data_dir=data_dir, download=download)
            result = write_shards(source, out, shard_bytes=shard_mib << 20, seed=seed, progress=progress)
    parts = ", ".join(f"{count} in {name}" for name, count in result.splits.items())
    screen.say(
        f"{result.num_ok} {result.modality} ({parts}) in {result.num_shards} shards, {result.num_bytes / 1e6:,.1f} MB"
    )
    for row in result.bad[:10]:
        screen.say(f"left out {row['path']}: {row['reason']}")
    if result.num_bad:
        screen.say(f"{result.num_bad} files were left out: {out}/bad_files.csv")
    screen.say(f"train from them: mixlab train wds:{out or data}")
    emit(vars(result))
    return 1 if result.num_bad else 0


def doctor() -> None:
    """What this installation has to work with: ok, slow or missing, and what to do about it."""
    import os
    from importlib.util import find_spec

    from mixlab.commands.verdicts import verdicts
    from mixlab.cpu.products import IS_FUSED
    from mixlab.cpu.workers import try_program
    from mixlab.device import describe_machine, keep_memory, multiplies_bf16, pick_device, set_threads
    from mixlab.report.checks import show_doctor

    facts = describe_machine()
    facts["device"] = str(pick_device())
    facts["threads"] = set_threads(None)
    facts["memory_kept_for_tensors"] = keep_memory()
    facts["fast_passes_of_mixers"] = True
    facts["fused_products"] = IS_FUSED  # else MKL multiplies, or torch, in two passes
    facts["programs_for_cores"] = try_program()
    facts["bf16_products"] = multiplies_bf16()
    facts["openmp_wait"] = os.environ.get("OMP_WAIT_POLICY") or os.environ.get(
        "GOMP_SPINCOUNT", "its default"
    )
    facts["jpeg_decoder"] = (
        "simplejpeg" if find_spec("simplejpeg") else "Pillow (install simplejpeg for speed)"
    )
    rows = verdicts(facts, lambda module: find_spec(module) is not None)
    show_doctor(rows, Context.screen())
    emit(facts | {"verdicts": rows})

"""What a Mixer learns (section 3.5, Figures 5 to 7): token-mixing units, patch embeddings, in images, numbers.

A hidden unit of a token-mixing MLP has a weight for every patch: an image of the grid. The paper shows them in pairs
of opposite phase, sorted by frequency, and gives no numbers; here every layer has its share of units with an opposite
partner, its frequency and its locality, beside weights as they are drawn at first and shuffled ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mixlab.checkpoint.open import existing_path, open_weights
from mixlab.checkpoint.store import Weights
from mixlab.data.images.preprocess import for_images
from mixlab.errors import UsageError
from mixlab.models.catalog import MIXER, create_model, display_name, family_of
from mixlab.report.study_figures import layer_numbers, over_steps, stem_filters, unit_pictures
from mixlab.studies.harness import Answer, Finding, Options, Shown, Study
from mixlab.studies.rows import make_folder, write_rows
from mixlab.studies.units import frequencies, measure, paired, shuffled

NUM_NULLS = 5
SHOWN_LAYERS = 3  # as in Figure 5
COLUMNS = ("step", "layer", "weights", "units", "opposed", "mutual_pairs", "frequency", "spread")


def run(options: Options) -> Answer:
    """Look at weights, or at every checkpoint of a run."""
    if options.subject is None:
        raise UsageError(
            "this study looks at weights",
            where="WEIGHTS",
            hint="a run, a file or a published name, such as mixer_cifar:cifar10",
        )
    weights = open_weights(existing_path(options.subject) or options.subject)
    for_images(weights.preprocess, "this study", "WEIGHTS")
    layers = token_units(weights.model, weights.model_settings["name"])
    model: Any = weights.model
    grid = model.config.grid
    rows, drawn = _rows(layers, grid, "trained"), []
    for seed in range(1 if options.smoke else NUM_NULLS):
        torch.manual_seed(seed)
        drawn.append(token_units(create_model(**weights.model_settings), ""))
        rows += _rows(drawn[-1], grid, "at initialisation")
        rows += _rows([shuffled(units, seed) for units in layers], grid, "shuffled")
    rows = _averaged(rows)
    history = _history(options, weights)
    make_folder(options.out)
    text = [{key: "" if row.get(key) is None else str(row[key]) for key in COLUMNS} for row in rows + history]
    write_rows(options.out / "filters.csv", COLUMNS, text)
    return _answer(weights, options.subject, layers, drawn, rows, history)


def token_units(model: Any, name: str) -> list[np.ndarray]:
    """Weights of the hidden units of every token-mixing MLP, float64 (D_S, S) each. UsageError for another model."""
    if family_of(model, exactly=True) is not MIXER:
        raise UsageError(
            f"{name} has no token-mixing MLPs over all patches whose units could be shown",
            where="WEIGHTS",
            hint="take a flat Mixer",
        )
    blocks: Any = model.blocks
    return [block.token_mixing.fc1.weight.detach().double().numpy() for block in blocks]


def _rows(
    layers: Sequence[np.ndarray], grid: tuple[int, int], what: str, step: int | None = None
) -> list[Any]:
    return [
        {"step": step, "layer": number, "weights": what} | vars(measure(units, grid))
        for number, units in enumerate(layers, start=1)
    ]


def _averaged(rows: list[Any]) -> list[Any]:
    """One row for each layer and kind of weights: the mean over several draws."""
    found: dict[tuple[str, int], list[Any]] = {}
    for row in rows:
        found.setdefault((row["weights"], row["layer"]), []).append(row)
    numbers = ("opposed", "mutual_pairs", "frequency", "spread")
    return [
        same[0] | {key: float(np.mean([row[key] for row in same])) for key in numbers}
        for same in found.values()
    ]


def _history(options: Options, weights: Weights) -> list[Any]:
    """The same numbers at every checkpoint of a run; none for anything else."""
    path = existing_path(str(options.subject))
    rows = []
    for folder in sorted((path / "checkpoints").glob("step_*")) if path is not None and path.is_dir() else []:
        model: Any = create_model(**weights.model_settings)
        tensors, own = load_file(folder / "model.safetensors"), model.state_dict()
        if any(tensors[name].shape != own[name].shape for name in own):
            continue  # of an older run that began with larger patches
        model.load_state_dict(tensors)
        step = int(folder.name.removeprefix("step_"))
        rows += _rows(token_units(model, ""), model.config.grid, "checkpoint", step)
    return rows


def _answer(
    weights: Weights,
    subject: str,
    layers: list[np.ndarray],
    drawn: list[list[np.ndarray]],
    rows: list[Any],
    history: list[Any],
) -> Answer:
    model: Any = weights.model
    grid = model.config.grid
    kinds = ("trained", "at initialisation", "shuffled")
    by = {(row["weights"], row["layer"]): row for row in rows}
    numbers = range(1, len(layers) + 1)
    columns = ["layer", "units"]
    for title in ("opposite partner, %", "mutual pairs", "frequency, cycles a patch", "spread"):
        columns += [f"{title}: {kind}" for kind in kinds]
    table = []
    for layer in numbers:
        line = [str(layer), str(by["trained", layer]["units"])]
        for key, form, scale in (
            ("opposed", ".1f", 100), ("mutual_pairs", ".1f", 1), ("frequency", ".3f", 1), ("spread", ".3f", 1),
        ):  # fmt: skip
            line += [f"{scale * by[kind, layer][key]:{form}}" for kind in kinds]
        table.append(line)
    shown = [
        Shown(
            name=f"units-{number}",
            heading=f"Hidden units of token mixing, layer {number}",
            text=f"Input weights of each unit as an image of the {grid[0]} x {grid[1]} patches, beside its closest "
            "inverse; pairs in order of frequency, low first. Blue is negative, red positive, each unit on its own "
            "scale. As the paper's Figure 5.",
            figure=unit_pictures(units, paired(units, grid), grid),
        )
        for number, units in list(enumerate(layers, start=1))[:SHOWN_LAYERS]
    ]
    shown.append(
        Shown(
            name="units-drawn",
            heading="Hidden units of token mixing, at initialisation",
            text="Layer 1 of the same model before any training, drawn in the same way.",
            figure=unit_pictures(drawn[0][0], paired(drawn[0][0], grid), grid),
        )
    )
    stem = model.stem.weight.detach().double().numpy()
    shown.append(
        Shown(
            name="stem",
            heading="Patch embeddings",
            text="The filters of the stem in their colours, each on its own scale, in order of frequency. As the "
            "paper's Figure 7.",
            figure=stem_filters(stem[np.argsort(_stem_frequency(stem), kind="stable")]),
        )
    )
    shown.append(
        Shown(
            name="layers",
            heading="Layer by layer",
            text="Share of units with an opposite partner (cosine below -0.8), frequency and spread of the units of "
            f"each layer, beside weights at initialisation and the same weights shuffled in each unit (means of "
            f"{len(drawn)}).",
            figure=layer_numbers(rows, kinds),
        )
    )
    if history:
        shown.append(
            Shown(
                name="history",
                heading="How they come to be",
                text="The same numbers at each checkpoint of the run, a line for each layer.",
                figure=over_steps(history),
            )
        )
    name = weights.model_settings["name"]
    return Answer(
        settings=[
            ("Weights", f"{subject}: {display_name(name)}"),
            ("Grid of patches", f"{grid[0]} x {grid[1]}, {model.config.patch_size} pixels a side"),
            (
                "Trained on",
                str(weights.provenance.get("data", weights.provenance.get("source", "not known"))),
            ),
        ],
        findings=_findings(by, len(layers)),
        tables=[("Numbers of each layer", columns, table)],
        figures=shown,
    )


def _stem_frequency(stem: np.ndarray) -> np.ndarray:
    side = stem.shape[-1]
    of_channels = [
        frequencies(stem[:, channel].reshape(len(stem), -1), (side, side)) for channel in range(stem.shape[1])
    ]
    return np.asarray(np.mean(of_channels, axis=0))


def _findings(by: dict[tuple[str, int], Any], num_layers: int) -> list[Finding]:
    limits = "One set of weights; the paper looked at Mixer-B/16 and B/32 pre-trained on JFT-300M, by eye."
    first, last = by["trained", 1], by["trained", num_layers]
    nulls = [
        by[kind, layer]["opposed"]
        for kind in ("at initialisation", "shuffled")
        for layer in range(1, num_layers + 1)
    ]
    shares = [by["trained", layer]["opposed"] for layer in range(1, num_layers + 1)]
    highest = int(np.argmax(shares)) + 1
    opposed = max(shares) > max(nulls) + 0.02
    drawn = by["at initialisation", 1]
    structured = first["frequency"] < 0.9 * drawn["frequency"]
    return [
        Finding(
            statement="Many hidden units appear in pairs of opposite phase.",
            paper="Shown for the first three layers (Figure 5), without a number.",
            here=f"{100 * first['opposed']:.1f} % of the units of layer 1 have a partner with a cosine below -0.8, "
            f"at most {100 * max(shares):.1f} % (layer {highest}); at most {100 * max(nulls):.1f} % where weights "
            "are at initialisation or shuffled.",
            verdict="holds" if opposed else "does not hold",
            limits=limits,
        ),
        Finding(
            statement="Units of the first layer are of low frequency; those of deeper layers have less structure.",
            paper="Some of the first layer are global, some local; deeper ones show no structure that can be named.",
            here=f"Frequency {first['frequency']:.3f} cycles a patch in layer 1, "
            + (f"{last['frequency']:.3f} in layer {num_layers}, " if num_layers > 1 else "")
            + f"{drawn['frequency']:.3f} at initialisation.",
            verdict="open"
            if num_layers == 1
            else "holds"
            if structured and last["frequency"] > first["frequency"]
            else "does not hold",
            limits=limits,
        ),
    ]


STUDY = Study(
    name="filters",
    title="What a Mixer learns",
    question="What do the hidden units of token mixing and the patch embeddings look like, and how regular are they?",
    paper="Section 3.5, Appendix D and Figures 5 to 7: pairs of opposite phase and low frequencies in the first "
    "token-mixing MLPs.",
    run=run,
    subject="WEIGHTS",
)

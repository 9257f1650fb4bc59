"""What a Mixer learns (section 4, Figures 5 to 7): token-mixing units and patch embeddings, as pictures and numbers.

A hidden unit of a token-mixing MLP has a weight for every patch: a picture of the grid. The paper shows them in pairs
of opposite phase, sorted by frequency, and gives no numbers; here every layer has its share of units with an opposite
partner, its frequency and its locality, beside weights as they are drawn at first and shuffled ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mixlab.checkpoint.open import existing_path, open_weights
from mixlab.checkpoint.store import Weights
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model, display_name
from mixlab.models.mixer import Mixer
from mixlab.report.study_figures import layer_numbers, over_steps, stem_filters, unit_pictures
from mixlab.studies.harness import Answer, Finding, Options, Shown, Study
from mixlab.studies.trainings import write_rows

OPPOSED = 0.8  # a unit has an opposite partner if another's cosine with it is below minus this
NUM_NULLS = 5
SHOWN_LAYERS, SHOWN_PAIRS = 3, 64  # as in Figure 5
COLUMNS = ("step", "layer", "weights", "units", "opposed", "mutual_pairs", "frequency", "spread")


@dataclass(frozen=True)
class LayerNumbers:
    """Of the hidden units of one token-mixing MLP; every number is a mean over its units, or a share of them.

    opposed: share with a partner whose cosine is below -0.8. mutual_pairs: how many pairs of units are each other's
    nearest opposite, and below -0.8. frequency: centre of the power spectrum, cycles a patch; 0 is constant, 0.5
    changes sign from patch to patch. spread: distance of the squared weights from their centre, root mean square,
    over what equal weights would have: 1 is everywhere, 0 a single patch.
    """

    units: int
    opposed: float
    mutual_pairs: int
    frequency: float
    spread: float


def cosines(units: np.ndarray) -> np.ndarray:
    """(D, D): cosine of each two of the rows (D, S); 0 for a row of zeros, and on the diagonal."""
    length = np.linalg.norm(units, axis=1, keepdims=True)
    unit = units / np.where(length == 0, 1, length)
    found = unit @ unit.T
    np.fill_diagonal(found, 0)
    return np.asarray(found)


def frequencies(units: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(D,): the centre of the power spectrum of each unit's picture over the radius, in cycles a patch."""
    power = np.abs(np.fft.fft2(units.reshape(-1, *grid))) ** 2
    rows, columns = (np.fft.fftfreq(side) for side in grid)
    radius = np.hypot(rows[:, None], columns[None, :])
    total = power.sum(axis=(1, 2))
    return np.asarray((power * radius).sum(axis=(1, 2)) / np.where(total == 0, 1, total))


def spreads(units: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(D,): how far a unit's squared weights are from their centre, as a share of what equal weights have."""
    weight = units.reshape(-1, *grid) ** 2
    total = weight.sum(axis=(1, 2))
    weight = weight / np.where(total == 0, 1, total)[:, None, None]
    places = np.meshgrid(*(np.arange(side, dtype=np.float64) for side in grid), indexing="ij")
    variance = sum(
        (weight * place**2).sum(axis=(1, 2)) - (weight * place).sum(axis=(1, 2)) ** 2 for place in places
    )
    return np.asarray(np.sqrt(np.maximum(variance, 0) / sum(place.var() for place in places)))


def measure(units: np.ndarray, grid: tuple[int, int]) -> LayerNumbers:
    """All numbers of the units (D, S) of a layer."""
    cosine = cosines(units)
    nearest, lowest = cosine.argmin(axis=1), cosine.min(axis=1)
    has_partner = lowest < -OPPOSED
    mutual = has_partner & (nearest[nearest] == np.arange(len(units)))
    return LayerNumbers(
        units=len(units),
        opposed=float(has_partner.mean()),
        mutual_pairs=int(mutual.sum()) // 2,
        frequency=float(frequencies(units, grid).mean()),
        spread=float(spreads(units, grid).mean()),
    )


def paired(units: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(D // 2, 2): each unit with its closest inverse, the closest first taken, in order of frequency, low first."""
    cosine = cosines(units)
    order = np.argsort(cosine, axis=None, kind="stable")
    free, pairs = np.ones(len(units), dtype=bool), []
    for flat in order:
        a, b = divmod(int(flat), len(units))
        if a != b and free[a] and free[b]:
            free[[a, b]] = False
            pairs.append((a, b))
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[np.argsort(frequencies(units, grid)[found].mean(axis=1), kind="stable")]


def shuffled(units: np.ndarray, seed: int) -> np.ndarray:
    """Each unit's own weights in an order of its own."""
    return np.random.default_rng(seed).permuted(units, axis=1)


def run(options: Options) -> Answer:
    """Look at weights, or at every checkpoint of a run."""
    if options.subject is None:
        raise UsageError(
            "this study looks at weights",
            where="WEIGHTS",
            hint="a run, a file or a published name, such as mixer_cifar:cifar10",
        )
    weights = open_weights(existing_path(options.subject) or options.subject)
    layers = token_units(weights.model, weights.model_settings["name"])
    model: Any = weights.model
    grid = model.config.grid
    rows = _rows(layers, grid, "trained")
    for seed in range(1 if options.smoke else NUM_NULLS):
        torch.manual_seed(seed)
        fresh = create_model(**weights.model_settings)
        rows += _rows(token_units(fresh, ""), grid, "as drawn at first")
        rows += _rows([shuffled(units, seed) for units in layers], grid, "shuffled")
    rows = _averaged(rows)
    history = _history(options, weights)
    options.out.mkdir(parents=True, exist_ok=True)
    text = [{key: "" if row.get(key) is None else str(row[key]) for key in COLUMNS} for row in rows + history]
    write_rows(options.out / "filters.csv", COLUMNS, text)
    return _answer(weights, options.subject, layers, grid, rows, history)


def token_units(model: Any, name: str) -> list[np.ndarray]:
    """Weights of the hidden units of every token-mixing MLP, float64 (D_S, S) each. UsageError for another model."""
    if type(model) is not Mixer:
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
            continue  # of the coarse patches of a curriculum
        model.load_state_dict(tensors)
        step = int(folder.name.removeprefix("step_"))
        rows += _rows(token_units(model, ""), model.config.grid, "checkpoint", step)
    return rows


def _answer(
    weights: Weights,
    subject: str,
    layers: list[np.ndarray],
    grid: tuple[int, int],
    rows: list[Any],
    history: list[Any],
) -> Answer:
    model: Any = weights.model
    kinds = ("trained", "as drawn at first", "shuffled")
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
            text=f"Input weights of each unit as a picture of the {grid[0]} x {grid[1]} patches, beside its closest "
            "inverse; pairs in order of frequency, low first. Blue is negative, red positive, each unit on its own "
            "scale. As the paper's Figure 5.",
            figure=unit_pictures(units, paired(units, grid)[:SHOWN_PAIRS], grid),
        )
        for number, units in list(enumerate(layers, start=1))[:SHOWN_LAYERS]
    ]
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
            f"each layer, beside {NUM_NULLS} models as drawn at first and the same weights shuffled in each unit.",
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
        for kind in ("as drawn at first", "shuffled")
        for layer in range(1, num_layers + 1)
    ]
    shares = [by["trained", layer]["opposed"] for layer in range(1, num_layers + 1)]
    highest = int(np.argmax(shares)) + 1
    opposed = max(shares) > max(nulls) + 0.02
    drawn = by["as drawn at first", 1]
    structured = first["frequency"] < 0.9 * drawn["frequency"]
    return [
        Finding(
            statement="Many hidden units appear in pairs of opposite phase.",
            paper="Shown for the first three layers (Figure 5), without a number.",
            here=f"{100 * first['opposed']:.1f} % of the units of layer 1 have a partner with a cosine below -0.8, "
            f"at most {100 * max(shares):.1f} % (layer {highest}); at most {100 * max(nulls):.1f} % where weights "
            "are as drawn at first or shuffled.",
            verdict="holds" if opposed else "does not hold",
            limits=limits,
        ),
        Finding(
            statement="Units of the first layer are of low frequency; those of deeper layers have less structure.",
            paper="Some of the first layer are global, some local; deeper ones show no structure that can be named.",
            here=f"Frequency {first['frequency']:.3f} cycles a patch in layer 1, {last['frequency']:.3f} in layer "
            f"{num_layers}, {drawn['frequency']:.3f} as drawn at first.",
            verdict="holds" if structured and last["frequency"] > first["frequency"] else "does not hold",
            limits=limits,
        ),
    ]


STUDY = Study(
    name="filters",
    title="What a Mixer learns",
    question="What do the hidden units of token mixing and the patch embeddings look like, and how regular are they?",
    paper="Section 4 and Figures 5 to 7: pairs of opposite phase and low frequencies in the first token-mixing MLPs.",
    run=run,
    subject="WEIGHTS",
)

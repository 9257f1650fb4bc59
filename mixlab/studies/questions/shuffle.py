"""What a model assumes about the order of pixels (section 3.4, Figure 4): train on permuted images and compare.

Every image is permuted in the same way, after augmentation. `patch + pixel` moves the patches, and the pixels
inside all patches alike: a Mixer, or a ViT, can absorb that into its weights, a convolution cannot. `global` moves
all pixels.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixlab.checkpoint.store import load_weights
from mixlab.data.images.preprocess import for_images
from mixlab.data.loader import evaluation_batches
from mixlab.data.reading import load_examples
from mixlab.evaluation.classify import classify
from mixlab.report.study_figures import accuracies, curves_by_model, relative_drops
from mixlab.studies.exactness import (
    COUPLED_TOLERANCE,
    GLOBAL,
    ORIGINAL,
    PROOF_TOLERANCE,
    SETTINGS,
    SHARED,
    permutation_of,
    prove_exactly,
)
from mixlab.studies.harness import Answer, Finding, Options, Shown, Study
from mixlab.studies.presets import Preset, describe_preset, patch_side, presets
from mixlab.studies.rows import Row
from mixlab.studies.statistics import Mean, is_above_zero, mean_of
from mixlab.studies.trainings import Cell, describe_origin, describe_trainings, fill, read_recipe
from mixlab.training.recipe import Recipe
from mixlab.training.setup import open_data
from mixlab.training.splits import reopen_splits

PRESETS = presets({"Mixer": 3, "ResNet": 3, "ViT": 1, "pyramid": 1}, paper_seeds=1)
# Mixer-B/16 and ResNet50x1 on JFT-300M, linear 5-shot accuracy on ImageNet: relative drops as the paper words them.
PAPER_DROPS = {("Mixer", SHARED): 0.0, ("Mixer", GLOBAL): 0.45, ("ResNet", GLOBAL): 0.75}
AT_TEST = {"top1_patch_pixel_at_test": SHARED, "top1_global_at_test": GLOBAL}


def run(options: Options) -> Answer:
    """Train the table, then prove and answer; all that is found stands in the folder too."""
    preset = PRESETS[options.preset]
    resolved = preset.resolved(options)
    rows, curves = fill(
        options,
        preset,
        _cells(options, preset, resolved),
        extra_columns=tuple(AT_TEST),
        measure=lambda run, cell: _permuted_at_test(run, cell, resolved),
    )
    return _answer(rows, curves, prove_exactly(options, resolved), preset, resolved)


def _cells(options: Options, preset: Preset, resolved: Recipe) -> list[Cell]:
    """Seed by seed, so that a study that is stopped early can compare what it has."""
    cells = []
    for seed in range(max(preset.seeds_of(model, options) for model in preset.models)):
        for model in preset.models:
            if seed >= preset.seeds_of(model, options):
                continue
            changes = preset.changes_of(model, resolved)
            for setting, kind in SETTINGS.items():
                moved = {"data.permutation": kind, "data.permutation_patch_size": patch_side(resolved)}
                cells.append(
                    Cell(
                        model=model,
                        setting=setting,
                        seed=seed,
                        changes=changes | (moved if setting != ORIGINAL else {}),
                    )
                )
    return cells


def _permuted_at_test(run: Path, cell: Cell, resolved: Recipe) -> dict[str, Any]:
    """The control: what a model that learnt on ordinary images makes of permuted ones."""
    if cell.setting != ORIGINAL:
        return dict.fromkeys(AT_TEST)
    weights, recipe = load_weights(run), read_recipe(run)
    test = reopen_splits(open_data(recipe), run / "split.csv")["test"]
    found = {}
    for column, setting in AT_TEST.items():
        preprocess = replace(
            for_images(weights.preprocess, "this study"), permutation=permutation_of(setting, resolved)
        )
        images = load_examples(test, preprocess)
        predictions = classify(weights.model, evaluation_batches(images, 256), torch.device("cpu"))
        found[column] = float((predictions.predicted == predictions.label).mean())
    return found


def _by_seed(rows: list[Row], model: str, setting: str, column: str = "top1") -> dict[str, float]:
    return {
        row["seed"]: float(row[column])
        for row in rows
        if (row["model"], row["setting"]) == (model, setting) and row[column]
    }


def relative_drop(rows: list[Row], model: str, setting: str) -> Mean | None:
    """Share of its accuracy that a model loses by a permutation, seed by seed; None if nothing can be compared."""
    before, after = _by_seed(rows, model, ORIGINAL), _by_seed(rows, model, setting)
    drops = [1 - after[seed] / before[seed] for seed in before if seed in after and before[seed]]
    return mean_of(drops) if drops else None


def paired_difference(rows: list[Row], model: str, setting: str) -> Mean | None:
    """Accuracy under a permutation minus the original one, seed by seed."""
    before, after = _by_seed(rows, model, ORIGINAL), _by_seed(rows, model, setting)
    differences = [after[seed] - before[seed] for seed in before if seed in after]
    return mean_of(differences) if differences else None


def _answer(
    rows: list[Row], curves: list[Row], proof: dict[str, Any], preset: Preset, resolved: Recipe
) -> Answer:
    models = [model for model in preset.models if _by_seed(rows, model, ORIGINAL)]
    drops = {
        (model, setting): drop
        for model in models
        for setting in (SHARED, GLOBAL)
        if (drop := relative_drop(rows, model, setting)) is not None
    }
    table, costs = [], []
    for model in models:
        cells = [mean_of(list(_by_seed(rows, model, setting).values())).text(100) for setting in SETTINGS]
        at_test = [
            mean_of(list(_by_seed(rows, model, ORIGINAL, column).values())).text(100) for column in AT_TEST
        ]
        table.append([model, *cells, *at_test])
        for setting in (SHARED, GLOBAL):
            points, drop = paired_difference(rows, model, setting), drops.get((model, setting))
            if points is not None and drop is not None:
                texts = [points.text(100, sign=True, interval=True), drop.text(100, interval=True)]
                costs.append([model, setting, *texts])
    columns = [
        "model", *(f"{setting}, %" for setting in SETTINGS),
        "patch + pixel at test only, %", "global at test only, %",
    ]  # fmt: skip
    absorbed, coupled = proof["absorbed"], proof["coupled"]
    exact = [
        [f"{model}, trained weights", f"{found['max_difference']:.1e}", f"{found['control']:.2g}"]
        for model, found in absorbed.items()
    ]
    differences = coupled["differences"]
    exact.append(
        [
            f"Mixer, losses of {coupled['steps']} training steps",
            f"{differences['absorbed']:.1e}",
            f"{differences['control']:.2g}",
        ]
    )
    size = resolved.data.image_size
    assert size is not None
    settings = [
        (
            "Data",
            f"{Path(resolved.data.source).name}, {size[0]} x {size[1]} pixels, {rows[0]['num_images']} test images",
        ),
        ("Recipe", describe_preset(preset)),
        ("Trainings", describe_trainings(rows)),
        ("Patches", f"{patch_side(resolved)} pixels a side; one permutation for all images, seed 0"),
        *describe_origin(rows),
    ]
    return Answer(
        settings=settings,
        findings=_findings(rows, drops, proof, preset.scale),
        tables=[
            ("Accuracy on the test split, mean ± standard deviation over seeds", columns, table),
            (
                "What a permutation costs: differences seed by seed",
                ["model", "permutation", "accuracy, points", "share of the original accuracy lost, %"],
                costs,
            ),
            (
                "Exact proof in float64: largest difference",
                ["of what", "permutation absorbed in the weights", "control: not absorbed"],
                exact,
            ),
        ],
        figures=[
            Shown(
                name="accuracy",
                heading="Accuracy by model and order of pixels",
                text="Bars are means, points are seeds. The dashed line is chance.",
                figure=accuracies(rows, list(SETTINGS), chance=_chance(resolved)),
            ),
            Shown(
                name="drops",
                heading="What a permutation costs, beside the paper",
                text="Share of the original accuracy that is lost, with 95 % intervals over seeds; diamonds are the "
                "paper's words on Mixer-B/16 and ResNet50x1 trained on JFT-300M.",
                figure=relative_drops(drops, PAPER_DROPS),
            ),
            Shown(
                name="curves",
                heading="Learning curves",
                text="Accuracy on the validation split during training, the mean of the seeds.",
                figure=curves_by_model(curves, models, list(SETTINGS)),
            ),
        ],
    )


def _chance(resolved: Recipe) -> float:
    return 1 / len(open_data(resolved).class_names)


def _findings(
    rows: list[Row], drops: dict[tuple[str, str], Mean], proof: dict[str, Any], scale: str
) -> list[Finding]:
    scale = (
        f"{scale}: the paper had Mixer-B/16 and ResNet50x1, JFT-300M, and "
        "measured 5-shot accuracy on ImageNet, not that of the training's own classes."
    )
    findings = []
    difference = paired_difference(rows, "Mixer", SHARED)
    if difference is not None:
        exact = max(found["max_difference"] for found in proof["absorbed"].values())
        coupled = proof["coupled"]["differences"]["absorbed"]
        is_lower = difference.high is not None and difference.high < 0
        is_exact = exact <= PROOF_TOLERANCE and coupled <= COUPLED_TOLERANCE
        findings.append(
            Finding(
                statement="A Mixer learns as well when patches, and the pixels in them, are shuffled alike.",
                paper="Original and patch + pixel curves match perfectly (Figure 4).",
                here=f"Accuracy changes by {difference.text(100, 2, sign=True, unit='points', interval=True)}. "
                f"Exactly: with the permutation absorbed, trained weights give the "
                f"same logits within {exact:.1e}, and a training from absorbed initial weights has the same "
                f"losses within {coupled:.1e}.",
                verdict="does not hold"
                if is_lower or not is_exact
                else "open"
                if difference.n == 1
                else "holds",
                limits="Independent trainings differ by their initial weights, so an interval that contains zero is "
                "no proof; the exact statements are. A ViT with learnt position embeddings has the same property.",
            )
        )
    if (drop := drops.get(("ResNet", SHARED))) is not None:
        findings.append(
            Finding(
                statement="A ResNet learns less well when they are.",
                paper="Its accuracy drops significantly (Figure 4).",
                here=f"It loses {drop.text(100, unit='% of its accuracy', interval=True)}.",
                verdict=is_above_zero(drop),
                limits=scale,
            )
        )
    if ("Mixer", GLOBAL) in drops and ("ResNet", GLOBAL) in drops:
        mixer, resnet = (
            {
                seed: 1 - after / before
                for seed, after in _by_seed(rows, model, GLOBAL).items()
                if (before := _by_seed(rows, model, ORIGINAL).get(seed))
            }
            for model in ("Mixer", "ResNet")
        )
        gaps = [resnet[seed] - mixer[seed] for seed in mixer if seed in resnet]
        gap = mean_of(gaps)
        lost = " against ".join(
            f"{model} {drops[model, GLOBAL].text(100, unit='%')}" for model in ("Mixer", "ResNet")
        )
        findings.append(
            Finding(
                statement="Under one permutation of all pixels a Mixer loses less than a ResNet.",
                paper="About 45 % against about 75 % of the original accuracy.",
                here=f"{lost} of the original accuracy. The ResNet's share minus the Mixer's: "
                f"{gap.text(100, sign=True, unit='points', interval=True)}.",
                verdict=is_above_zero(gap),
                limits=scale,
            )
        )
    return findings


STUDY = Study(
    name="shuffle",
    title="What a model assumes about the order of pixels",
    question="How well do a Mixer, a ResNet, a ViT and a pyramid learn when all images are permuted alike?",
    paper="Section 3.4 and Figure 4: Mixer-B/16 and ResNet50x1 on JFT-300M with the original pixels, with patches "
    "and the pixels inside them shuffled alike everywhere, and with all pixels shuffled.",
    run=run,
)

"""Does a Mixer match ViTs and CNNs (sections 3.1 to 3.3, Tables 2 and 3)? One recipe and budget for all; speed too.

The paper's own tables are in paper_results.csv and drawn beside.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixlab.checkpoint.store import load_weights
from mixlab.cpu.inference import fast
from mixlab.device import describe_machine, machine_name, set_threads
from mixlab.errors import UsageError
from mixlab.report.frontier import frontier
from mixlab.report.study_figures import accuracies
from mixlab.studies.harness import Answer, Finding, Options, Shown, Study
from mixlab.studies.presets import CPU_MODELS, SOUNDS, Preset, describe_preset, examples_of, presets
from mixlab.studies.published import paper_frontiers, paper_results, paper_tables
from mixlab.studies.rows import Row, distinct, read_rows, write_rows
from mixlab.studies.statistics import is_above_zero, mean_of
from mixlab.studies.trainings import Cell, describe_origin, describe_trainings, fill
from mixlab.studies.turns import alternate, forward
from mixlab.training.setup import open_data

SETTING = "from scratch"
PRESETS = presets(dict.fromkeys(CPU_MODELS, 2), paper_seeds=3)
SPEEDS = "speeds.csv"
ROUNDS, SPEED_BATCH = 7, 64


def run(options: Options) -> Answer:
    """Train the table, measure how fast the trained models are, and answer beside the paper's tables."""
    preset = _preset_of(options)
    resolved = preset.resolved(options)
    cells = [
        Cell(model=model, setting=SETTING, seed=seed, changes=preset.changes_of(model, resolved))
        for seed in range(max(preset.seeds_of(model, options) for model in preset.models))
        for model in preset.models
        if seed < preset.seeds_of(model, options)
    ]
    rows, _ = fill(options, preset, cells)
    speeds = _speeds(options, rows)
    chance = 1 / len(open_data(resolved).class_names)
    return _answer(rows, speeds, preset, chance, Path(resolved.data.source).name)


def _preset_of(options: Options) -> Preset:
    """The preset that was given, or for sounds theirs. UsageError for the paper's models on sounds."""
    if examples_of(options) != SOUNDS.examples:
        return PRESETS[options.preset]
    if options.preset == "paper":
        raise UsageError(
            "the paper's models are for images, and the data has sounds",
            where="--preset",
            hint="leave it out",
        )
    return SOUNDS


@torch.inference_mode()
def _speeds(options: Options, rows: list[Row]) -> dict[str, dict[str, str]]:
    """Examples a second and core of the trained models at inference, measured in turns; kept once measured, with the
    machine."""
    path = options.out / SPEEDS
    models = list(dict.fromkeys(row["model"] for row in rows))
    kept = {row["model"]: row for row in read_rows(path)}
    if set(models) <= set(kept):
        return kept
    options.screen.say("measuring inference")
    set_threads(options.threads)
    threads, batch = torch.get_num_threads(), 8 if options.smoke else SPEED_BATCH
    works: list[Callable[[], Any]] = []
    names: list[tuple[str, str]] = []
    for model in models:
        run = options.out / "runs" / Cell(model=model, setting=SETTING, seed=0, changes={}).folder_name
        weights = load_weights(run)
        image = torch.randn(batch, weights.preprocess.channels, *weights.preprocess.input_size)
        plain = weights.model.eval()
        works += [forward(plain, image), forward(fast(plain), image)]
        names += [(model, "plain"), (model, "fast")]
    times = alternate(works, 2 if options.smoke else ROUNDS)
    machine = {"threads": str(threads), "machine": machine_name(describe_machine())}
    found: dict[str, dict[str, str]] = {model: {"model": model} | machine for model in models}
    for (model, way), seconds in zip(names, times, strict=True):
        found[model][way] = f"{batch / statistics.median(seconds) / threads:.1f}"
    columns = ("model", "plain", "fast", "threads", "machine")
    write_rows(path, columns, list(found.values()))
    return found


def _answer(
    rows: list[Row], speeds: dict[str, dict[str, str]], preset: Preset, chance: float, data: str
) -> Answer:
    models = list(dict.fromkeys(row["model"] for row in rows))
    tops = {model: {r["seed"]: float(r["top1"]) for r in rows if r["model"] == model} for model in models}
    costs = {
        model: statistics.fmean(float(r["core_seconds"]) for r in rows if r["model"] == model)
        for model in models
    }
    first = {model: next(r for r in rows if r["model"] == model) for model in models}
    table = [
        [
            model,
            mean_of(list(tops[model].values())).text(100),
            f"{int(first[model]['num_parameters']):,}",
            f"{int(first[model]['macs']) / 1e6:,.1f}",
            f"{float(first[model]['epochs']):.1f}",
            f"{costs[model]:,.0f}",
            speeds[model]["plain"],
            speeds[model]["fast"],
        ]
        for model in models
    ]
    columns = [
        "model", "test accuracy, %", "parameters", "million multiply-accumulates", "epochs", "core-seconds",
        f"{preset.examples}/s and core, its own forward pass", f"{preset.examples}/s and core, as mixlab runs it",
    ]  # fmt: skip
    local = [
        (model, model, float(speeds[model]["fast"]), 100 * statistics.fmean(tops[model].values()))
        for model in models
    ]
    by_cost = [(family, name, costs[name], top) for family, name, _, top in local]
    published = paper_results()
    sort = "time" if preset.minutes is not None else "number of epochs"
    return Answer(
        settings=[
            ("Data", f"{data}, {rows[0]['num_images']} test {preset.examples}"),
            ("Recipe", describe_preset(preset)),
            ("Trainings", describe_trainings(rows)),
            *describe_origin(rows),
            ("Inference on", distinct(list(speeds.values()), "machine")),
        ],
        findings=_findings(tops, speeds, preset),
        tables=[
            (f"The same recipe and the same {sort} for all", columns, table),
            *paper_tables(published),
        ],
        figures=[
            Shown(
                name="accuracy",
                heading="Test accuracy",
                text="Bars are means, points are seeds. The dashed line is chance.",
                figure=accuracies(rows, [SETTING], chance=chance),
            ),
            Shown(
                name="frontier",
                heading="Accuracy against speed and cost, measured here",
                text="Means over seeds. A dashed line joins the models that no other beats in both, where there are "
                "several.",
                figure=frontier(
                    [
                        ("Inference", f"{preset.examples} per second and core", "more", local),
                        ("Training", "core-seconds", "less", by_cost),
                    ],
                    y_label="test accuracy, %",
                ),
            ),
            *paper_frontiers(published),
        ],
        notes=[
            "Training time is planned to be the same for all models, so the second panel compares accuracies only."
        ]
        if preset.minutes is not None
        else [],
    )


def _findings(
    tops: dict[str, dict[str, float]], speeds: dict[str, dict[str, str]], preset: Preset
) -> list[Finding]:
    scale = (
        f"{preset.scale}; one recipe, tuned for none of them. The paper's figures are of 19 to 430 million "
        "parameters, trained on 1.3 to 300 million images."
    )
    findings = []
    for other, statement, paper in (
        (
            "ViT",
            "Trained on little data, a Mixer is less accurate than a ViT.",
            "On ImageNet from scratch Mixer-B/16 reaches 76.44 %, ViT-B/16 79.67 % (Table 3).",
        ),
        (
            "ResNet",
            "Trained on little data, a Mixer is less accurate than a CNN.",
            "With 3 % of JFT-300M, 5-shot accuracy is 35.5 % (Mixer-L/16) and 52.5 % (BiT-R152x2; Figure 2).",
        ),
    ):
        if other in tops and "Mixer" in tops:
            gap = mean_of([tops[other][s] - tops["Mixer"][s] for s in tops["Mixer"] if s in tops[other]])
            findings.append(
                Finding(
                    statement=statement,
                    paper=paper,
                    here=f"{other} minus Mixer: {gap.text(100, sign=True, unit='points', interval=True)}.",
                    verdict=is_above_zero(gap),
                    limits=scale,
                )
            )
    if "ViT" in speeds and "Mixer" in speeds:
        plain = float(speeds["Mixer"]["plain"]) / float(speeds["ViT"]["plain"])
        quick = float(speeds["Mixer"]["fast"]) / float(speeds["ViT"]["fast"])
        findings.append(
            Finding(
                statement="A Mixer is faster than a ViT of the same kind.",
                paper="1,384 against 861 images/s and core for B/16: 1.61 times (Table 3).",
                here=f"{plain:.2f} times with each model's own forward pass, {quick:.2f} times as mixlab runs them.",
                verdict="holds"
                if min(plain, quick) > 1.05
                else "does not hold"
                if max(plain, quick) < 0.95
                else "open",
                limits=f"{preset.likeness}; on another kind of machine: `mixlab study throughput` measures "
                "the paper's own.",
            )
        )
    return findings


STUDY = Study(
    name="compare",
    title="Mixer, ViT and CNN under one recipe",
    question="With the same recipe and the same time, how accurate and how fast are a Mixer, a ViT and a ResNet?",
    paper="Sections 3.1 to 3.3, Tables 2 and 3, Figures 2 and 3: on the frontier with ViTs and CNNs when pre-trained "
    "on much data, behind them on little.",
    run=run,
)

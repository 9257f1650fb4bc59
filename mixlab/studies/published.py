"""The paper's own tables, and its claims of speed measured on this machine: what `compare` shows beside its own."""

import csv
import importlib.resources
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mixlab.device import describe_machine, machine_name, set_threads
from mixlab.models.catalog import create_model
from mixlab.models.fast import fast
from mixlab.report.frontier import frontier
from mixlab.studies.harness import Answer, Finding, Options, Shown
from mixlab.studies.trainings import Row, read_rows, write_rows

RATIOS = "throughput.csv"
# The paper's pairs: Mixer, ViT, and their images a second on a TPUv3 core (Tables 2 and 3). A Mixer at K times the
# resolution has K^2 times as wide token-mixing MLPs (Appendix C).
PAIRS: tuple[tuple[tuple[str, dict[str, Any], float], tuple[str, dict[str, Any], float]], ...] = (
    (("mixer_l16", {"image_size": 224}, 419), ("timm/vit_large_patch16_224", {"image_size": 224}, 280)),
    (
        ("mixer_l16", {"image_size": 448, "token_mlp_dim": 2048}, 105),
        ("timm/vit_large_patch16_224", {"image_size": 512}, 32),
    ),
    (("mixer_h14", {"image_size": 224}, 194), ("timm/vit_huge_patch14_224", {"image_size": 224}, 87)),
    (
        ("mixer_h14", {"image_size": 448, "token_mlp_dim": 2560}, 40),
        ("timm/vit_huge_patch14_224", {"image_size": 518}, 15),
    ),
)
RATIO_COLUMNS = (
    "mixer", "mixer_size", "vit", "vit_size", "batch_size", "mixer_images_per_second", "vit_images_per_second",
    "ratio", "lowest", "highest", "paper_ratio", "rounds", "machine",
)  # fmt: skip


def paper_results() -> list[Row]:
    """Every row of the paper's Tables 2 and 3, with its place."""
    text = importlib.resources.files("mixlab.studies").joinpath("paper_results.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def alternate(works: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds that each of `works` takes, turn by turn, after one turn that is not counted."""
    times: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for work, found in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            if number:
                found.append(time.perf_counter() - began)
    return times


def forward(model: Any, image: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(image)


def paper_tables(published: list[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    columns = [
        "model",
        "pre-training",
        "pixels",
        "epochs",
        "ImageNet, %",
        "ReaL, %",
        "images/s and core",
        "core-days",
        "where",
    ]
    keys = (
        "model", "pretraining", "resolution", "epochs", "imagenet", "real", "images_per_second_per_core", "core_days",
        "source",
    )  # fmt: skip
    return [
        (
            "The paper's Tables 2 and 3, TPUv3 cores",
            columns,
            [[row[key] for key in keys] for row in published],
        )
    ]


def paper_frontier(published: list[Row]) -> Shown:
    """Table 3, pre-trained on JFT-300M: the rows with all numbers, named by model and resolution.

    Where these are the same twice, the epochs of pre-training tell them apart.
    """
    rows = [
        row
        for row in published
        if row["source"].endswith("Table 3")
        and row["pretraining"] == "JFT-300M"
        and row["images_per_second_per_core"]
    ]
    kinds = [(row["model"], row["resolution"]) for row in rows]
    names = [
        f"{row['model'].removeprefix(row['family'] + '-')}@{row['resolution']}"
        + (f", {row['epochs']} epochs" if kinds.count(kind) > 1 else "")
        for kind, row in zip(kinds, rows, strict=True)
    ]
    points = {
        key: [
            (row["family"], name, float(row[key]), float(row["imagenet"]))
            for name, row in zip(names, rows, strict=True)
        ]
        for key in ("images_per_second_per_core", "core_days")
    }
    return Shown(
        name="paper",
        heading="The paper's own frontier",
        text="ImageNet top-1 of models pre-trained on JFT-300M (Table 3), against inference speed and training cost "
        "on TPUv3 cores. The dashed line joins the models that no other beats in both.",
        figure=frontier(
            [
                ("Inference", "images per second and core", "more", points["images_per_second_per_core"]),
                ("Training", "core-days", "less", points["core_days"]),
            ],
            y_label="ImageNet top-1, %",
        ),
    )


@torch.inference_mode()
def measure_ratios(options: Options) -> list[Row]:
    """The paper's pairs on this machine, in turns; a row of throughput.csv as soon as a pair is measured."""
    path = options.out / RATIOS
    options.out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    set_threads(options.threads)
    machine = machine_name(describe_machine())
    pairs = PAIRS[:1] if options.smoke else PAIRS
    rounds, batch = (1, 1) if options.smoke else (5, 4)
    for mixer, vit in pairs:
        key = {"mixer": mixer[0], "mixer_size": str(mixer[1]["image_size"])}
        if any(all(row[name] == value for name, value in key.items()) for row in rows):
            continue
        options.screen.say(f"measuring {mixer[0]} at {mixer[1]['image_size']} against {vit[0]}")
        works = []
        for name, settings, _ in (mixer, vit):
            model = create_model(name, **settings).eval()
            size = settings["image_size"]
            works.append(forward(fast(model), torch.randn(batch, 3, size, size)))
        ours, theirs = alternate(works, rounds)
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        rows.append(
            key
            | {
                "vit": vit[0],
                "vit_size": str(vit[1]["image_size"]),
                "batch_size": str(batch),
                "mixer_images_per_second": f"{batch / statistics.median(ours):.4g}",
                "vit_images_per_second": f"{batch / statistics.median(theirs):.4g}",
                "ratio": f"{statistics.median(ratios):.3f}",
                "lowest": f"{ratios[0]:.3f}",
                "highest": f"{ratios[-1]:.3f}",
                "paper_ratio": f"{mixer[2] / vit[2]:.2f}",
                "rounds": str(rounds),
                "machine": machine,
            }
        )
        write_rows(path, RATIO_COLUMNS, rows)
    return rows


def answer_ratios(rows: list[Row]) -> Answer:
    findings = [
        Finding(
            statement=f"{row['mixer']} at {row['mixer_size']} pixels is faster than "
            f"{row['vit'].removeprefix('timm/')} at {row['vit_size']}.",
            paper=f"{row['paper_ratio']} times, on a TPUv3 core.",
            here=f"{row['ratio']} times ({row['lowest']} to {row['highest']} in {row['rounds']} turns): "
            f"{row['mixer_images_per_second']} against {row['vit_images_per_second']} images a second.",
            verdict="holds"
            if float(row["lowest"]) > 1
            else "does not hold"
            if float(row["highest"]) < 1
            else "open",
            limits="Another machine, its own kinds of arithmetic and libraries: the ViT runs as timm's code does in "
            "PyTorch, the Mixer through mixlab's inference pass. Weights are drawn at random, which changes no time.",
        )
        for row in rows
    ]
    columns = ["Mixer", "pixels", "ViT", "pixels of the ViT", "ratio", "range", "paper"]
    table = [
        [
            row["mixer"], row["mixer_size"], row["vit"], row["vit_size"], row["ratio"],
            f"{row['lowest']} to {row['highest']}", row["paper_ratio"],
        ]
        for row in rows
    ]  # fmt: skip
    return Answer(
        settings=[
            ("Machine", rows[0]["machine"]),
            ("Batch", rows[0]["batch_size"]),
            ("Turns", rows[0]["rounds"]),
        ],
        findings=findings,
        tables=[("How many times faster", columns, table), *paper_tables(paper_results())],
        figures=[paper_frontier(paper_results())],
    )

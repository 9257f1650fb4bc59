"""The paper's own tables, which `compare` shows beside its own, and its claims of speed measured on this machine."""

import csv
import importlib.resources
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mixlab.cpu.inference import fast
from mixlab.device import describe_machine, machine_name, set_threads
from mixlab.models.catalog import create_model
from mixlab.report.frontier import frontier
from mixlab.studies.harness import Answer, Finding, Options, Shown, Study
from mixlab.studies.rows import Row, distinct, make_folder, read_rows, write_rows

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
FAMILIES = ("Mixer", "ResNet", "ViT", "CNN", "HaloNet")  # in the order in which figures colour them
RATIO_COLUMNS = (
    "mixer", "mixer_size", "vit", "vit_size", "batch_size", "mixer_images_per_second_per_core",
    "vit_images_per_second_per_core", "ratio", "lowest", "highest", "paper_ratio", "rounds", "threads", "machine",
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
    columns = {
        "model": "model", "pretraining": "pre-training", "resolution": "pixels", "epochs": "epochs",
        "imagenet": "ImageNet, %", "real": "ReaL, %", "avg5": "Avg 5, %", "vtab": "VTAB-1k, %",
        "images_per_second_per_core": "images/s and core", "core_days": "core-days", "source": "where",
        "note": "note",
    }  # fmt: skip
    rows = [[row[key] for key in columns] for row in published]
    return [("The paper's Tables 2 and 3, TPUv3 cores", list(columns.values()), rows)]


def paper_frontiers(published: list[Row]) -> list[Shown]:
    """The best of each kind (Table 2, as the paper's Figure 2), and the models pre-trained on JFT-300M (Table 3)."""
    best = [row for row in published if row["source"].endswith("Table 2")]
    best.sort(key=lambda row: FAMILIES.index(row["family"]))
    scaled = [
        row for row in published if row["source"].endswith("Table 3") and row["pretraining"] == "JFT-300M"
    ]
    kinds = [(row["model"], row["resolution"]) for row in scaled]
    text = "ImageNet top-1 against inference speed and training cost on TPUv3 cores. A dashed line joins the models "
    text += "that no other beats in both."
    return [
        _paper_frontier(
            "paper_best",
            "The paper's frontier: the best of each kind",
            f"Table 2, whatever they were pre-trained on. {text} 21k: on ImageNet-21k. MPL's speed is not given.",
            best,
            [
                row["model"].partition(" (")[0].removeprefix(f"{row['family']}-")
                + (", 21k" if row["pretraining"] == "ImageNet-21k" else "")
                for row in best
            ],
        ),
        _paper_frontier(
            "paper",
            "The paper's models pre-trained on JFT-300M",
            f"Table 3, three rows of it from version 2, at the resolution in pixels behind the @. {text}",
            scaled,
            [
                f"{row['model'].removeprefix(row['family'] + '-')}@{row['resolution']}"
                + (f", {row['epochs']} epochs" if kinds.count(kind) > 1 else "")
                for kind, row in zip(kinds, scaled, strict=True)
            ],
        ),
    ]


def _paper_frontier(name: str, heading: str, text: str, rows: list[Row], labels: list[str]) -> Shown:
    points = {
        key: [
            (row["family"], label, float(row[key]), float(row["imagenet"]))
            for label, row in zip(labels, rows, strict=True)
            if row[key]
        ]
        for key in ("images_per_second_per_core", "core_days")
    }
    panels = [
        ("Inference", "images per second and core", "more", points["images_per_second_per_core"]),
        ("Training", "core-days", "less", points["core_days"]),
    ]
    figure = frontier(panels, y_label="ImageNet top-1, %")
    return Shown(name=name, heading=heading, text=text, figure=figure)


@torch.inference_mode()
def measure_ratios(options: Options) -> list[Row]:
    """The paper's pairs on this machine, in turns; a row of throughput.csv as soon as a pair is measured.

    Rows of other machines, numbers of threads, batches or rounds stay in the file and are not returned.
    """
    path = options.out / RATIOS
    make_folder(options.out)
    rows = read_rows(path)
    set_threads(options.threads)
    threads = torch.get_num_threads()
    rounds, batch = (1, 1) if options.smoke else (5, 4)
    here = {"batch_size": str(batch), "rounds": str(rounds), "threads": str(threads)}
    here |= {"machine": machine_name(describe_machine())}
    found = []
    for mixer, vit in PAIRS[:1] if options.smoke else PAIRS:
        key = here | {"mixer": mixer[0], "mixer_size": str(mixer[1]["image_size"])}
        known = next((row for row in rows if key.items() <= row.items()), None)
        if known is None:
            options.screen.say(f"measuring {mixer[0]} at {mixer[1]['image_size']} against {vit[0]}")
            works = []
            for name, settings, _ in (mixer, vit):
                model = create_model(name, **settings).eval()
                size = settings["image_size"]
                works.append(forward(fast(model), torch.randn(batch, 3, size, size)))
            ours, theirs = alternate(works, rounds)
            ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
            known = key | {
                "vit": vit[0],
                "vit_size": str(vit[1]["image_size"]),
                "mixer_images_per_second_per_core": f"{batch / statistics.median(ours) / threads:.4g}",
                "vit_images_per_second_per_core": f"{batch / statistics.median(theirs) / threads:.4g}",
                "ratio": f"{statistics.median(ratios):.3f}",
                "lowest": f"{ratios[0]:.3f}",
                "highest": f"{ratios[-1]:.3f}",
                "paper_ratio": f"{mixer[2] / vit[2]:.2f}",
            }
            rows.append(known)
            write_rows(path, RATIO_COLUMNS, rows)
        found.append(known)
    return found


def answer_ratios(rows: list[Row]) -> Answer:
    findings = [
        Finding(
            statement=f"{row['mixer']} at {row['mixer_size']} pixels is faster than "
            f"{row['vit'].removeprefix('timm/')} at {row['vit_size']}.",
            paper=f"{row['paper_ratio']} times, on a TPUv3 core.",
            here=f"{row['ratio']} times ({row['lowest']} to {row['highest']} in {row['rounds']} turns): "
            f"{row['mixer_images_per_second_per_core']} against {row['vit_images_per_second_per_core']} images a "
            "second and core.",
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
            (heading, distinct(rows, column))
            for heading, column in (
                ("Machine", "machine"), ("Threads", "threads"), ("Batch", "batch_size"), ("Turns", "rounds"),
            )
        ],
        findings=findings,
        tables=[("How many times faster", columns, table), *paper_tables(paper_results())],
        figures=paper_frontiers(paper_results()),
    )  # fmt: skip


THROUGHPUT = Study(
    name="throughput",
    title="Mixer against ViT: speed",
    question="How many times as fast as a ViT are the paper's large Mixers on this machine?",
    paper="Sections 3.1 and 3.2, Tables 2 and 3: Mixer-H/14 2.5 times as fast as ViT-H/14 at the resolution of "
    "fine-tuning (2.2 times at 224 pixels), Mixer-L/16 105 images a second and core against 32.",
    run=lambda options: answer_ratios(measure_ratios(options)),
    subject="",
)

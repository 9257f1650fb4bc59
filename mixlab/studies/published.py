"""The paper's own tables, which `compare` and `throughput` show beside what they measure."""

import csv
import importlib.resources

from mixlab.report.frontier import frontier
from mixlab.studies.harness import Shown
from mixlab.studies.rows import Row

FAMILIES = ("Mixer", "ResNet", "ViT", "CNN", "HaloNet")  # in the order in which figures colour them


def paper_results() -> list[Row]:
    """Every row of the paper's Tables 2 and 3, with its place."""
    text = importlib.resources.files("mixlab.studies").joinpath("paper_results.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


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

"""A model card: what a model is, what it was measured to do, and where its limits are, as Markdown for the Hub."""

import json
import re
from pathlib import Path
from typing import Any

from mixlab.checkpoint.store import Weights
from mixlab.models.catalog import display_name
from mixlab.models.cost import measure_cost
from mixlab.report.run_log import read_run_log

LIMITS = (
    "It knows the classes below and no others: any picture gets one of them. Its probabilities come from "
    "pictures like those it was trained on and say little about others. It was not examined for bias or for safety."
)


def write_card(
    weights: Weights, run: Path | None, *, licence: str = "not stated", data: str | None = None
) -> str:
    """The card of a run, or of weights alone (`run` None): only what is known, the rest said to be unknown.

    data: the name of the data set, instead of the run's own path. licence: of the weights.
    """
    facts = _facts(run)
    name = display_name(weights.model_settings["name"])
    cost = measure_cost(weights.model, weights.preprocess.image_size, in_channels=weights.preprocess.channels)
    data = data or Path(str(weights.provenance.get("data", "not stated"))).name
    size = "x".join(map(str, weights.preprocess.image_size))
    test = facts.get("test")
    lines = ["---", f"license: {licence if licence != 'not stated' else 'other'}", "library_name: mixlab"]
    lines += [
        "pipeline_tag: image-classification",
        "tags:",
        "- image-classification",
        "- mlp-mixer",
        "- mixlab",
    ]
    if test:
        lines += [
            "model-index:", f"- name: {name}", "  results:", "  - task:", "      type: image-classification",
            "    dataset:", f"      name: {json.dumps(data)}", "      type: image-folder", "      split: test",
            "    metrics:", "    - type: accuracy", f"      value: {test['num_correct'] / test['num_images']:.4f}",
        ]  # fmt: skip
    lines += ["---", "", f"# {name}, {data}", ""]
    lines += [
        f"An image classifier of {cost.num_parameters:,} parameters and {cost.macs / 1e6:,.1f} million "
        f"multiply-accumulates a picture of {size} pixels, made of nothing but MLPs over patches and channels "
        "(MLP-Mixer, Tolstikhin et al. 2021, arXiv 2105.01601"
        + (
            "; a hierarchical one of mixlab's own)."
            if "pyramid" in str(weights.model_settings["name"])
            else ")."
        ),
        "",
        "## Use",
        "",
        "```",
        "pip install mixlab",
        "mixlab predict FOLDER_OR_NAME photo.jpg",
        "```",
        "",
        "## Measured",
        "",
    ]
    if test:
        lines.append(
            f"Test accuracy {100 * test['num_correct'] / test['num_images']:.2f} % ({test['num_correct']:,} of "
            f"{test['num_images']:,} images), one training, single view."
        )
        if test.get("ece") is not None:
            lines.append(f"Expected calibration error {test['ece']:.3f}.")
    else:
        lines.append("Not yet measured.")
    lines += [
        "",
        "## Training",
        "",
        *_training(facts),
        f"- Data: {data}",
        f"- Licence of the weights: {licence}",
        "",
    ]
    lines += ["## Classes", "", ", ".join(weights.class_names[:1000]), "", "## Limits", "", LIMITS, ""]
    return "\n".join(lines)


def card_beside(folder: Path, *, licence: str = "not stated", data: str | None = None) -> str | None:
    """The card that mixlab wrote beside weights, with another licence and data set if given; None without one."""
    path = folder / "README.md"
    text = path.read_text(errors="replace") if path.is_file() else ""
    head, closing, rest = text.removeprefix("---\n").partition("\n---\n")
    if not text.startswith("---\n") or "library_name: mixlab" not in head.splitlines():
        return None  # somebody else's
    if licence != "not stated":
        head = re.sub(r"^license: .*$", lambda _: f"license: {licence}", head, flags=re.M)
        rest = re.sub(r"^(- Licence of the weights: ).*$", lambda m: m[1] + licence, rest, flags=re.M)
    if data is not None:
        head = re.sub(r"^(      name: ).*$", lambda m: m[1] + json.dumps(data), head, flags=re.M)
        rest = re.sub(r"^(- Data: ).*$", lambda m: m[1] + data, rest, flags=re.M)
    return f"---\n{head}{closing}{rest}"


def with_use(card: str, lines: str) -> str:
    """The same card with other commands under `Use`."""
    return re.sub(r"(?<=## Use\n\n```\n).*?(?=\n```)", lambda _: lines, card, count=1, flags=re.S)


def _facts(run: Path | None) -> dict[str, Any]:
    """The end of a run, and its surroundings; nothing for weights alone."""
    if run is None or not (run / "metrics.jsonl").is_file():
        return {}
    ends = [row for row in read_run_log(run / "metrics.jsonl") if row["event"] == "end"]
    facts: dict[str, Any] = dict(ends[-1]) if ends else {}
    if (run / "environment.json").is_file():
        facts["environment"] = json.loads((run / "environment.json").read_text())
    if (run / "recipe.toml").is_file():
        facts["recipe"] = (run / "recipe.toml").read_text()
    return facts


def _training(facts: dict[str, Any]) -> list[str]:
    if not facts:
        return ["- Not known: these are weights without their run."]
    lines = []
    if "epochs" in facts:
        lines.append(
            f"- {facts['step']:,} steps, {facts['epochs']:.1f} epochs, {facts['seconds'] / 60:.0f} minutes"
        )
    if "environment" in facts:
        environment = facts["environment"]
        version = environment.get("versions", {}).get("torch", "not known")
        lines.append(f"- {environment.get('cores')} cores, {environment.get('cpu')}, torch {version}")
        lines.append(f"- Commit {environment.get('commit')}")
    if "recipe" in facts:
        lines += [
            "",
            "<details><summary>Recipe</summary>",
            "",
            "```toml",
            facts["recipe"].rstrip(),
            "```",
            "",
            "</details>",
            "",
        ]
    return lines

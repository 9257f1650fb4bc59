"""A model card: what a model is, what it was measured to do, and where its limits are, as Markdown for the Hub."""

import json
import re
from pathlib import Path
from typing import Any

import tomli_w

from mixlab.checkpoint.store import Weights
from mixlab.cpu.cost import measure_cost
from mixlab.escape import for_markdown, visible, visible_values, without_places
from mixlab.exports.licences import NOT_STATED, checked_licence, hub_identifier
from mixlab.models.catalog import display_name
from mixlab.records import read_json, read_text, read_toml
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import format_seconds
from mixlab.words import counted

MAX_CARD_BYTES = 4 * 2**20

# What works until mixlab is on PyPI.
USE = """\
pip install .  # in a clone of mixlab, which is not on PyPI yet; or pip install with the path of its wheel
mixlab predict FOLDER_OR_NAME {example}"""
LIMITS = (
    "It knows the classes above and no others: any {one} gets one of them. Its probabilities come from "
    "{many} like those it was trained on and say little about others. It was not examined for bias or for safety."
)


def write_card(
    weights: Weights, run: Path | None, *, licence: str = NOT_STATED, data: str | None = None
) -> str:
    """The card of a run, or of weights alone (`run` None): only what is known, the rest is named as unknown.

    data: the name of the data set, instead of the run's own path. licence: of the weights, one that the Hub knows;
    UsageError for another.
    """
    licence = checked_licence(licence)
    facts = _facts(run)
    name = display_name(weights.model_settings["name"])
    cost = measure_cost(weights.model, weights.preprocess.input_size, in_channels=weights.preprocess.channels)
    data = data or str(without_places(str(weights.provenance.get("data", "not stated"))))
    size = "x".join(map(str, weights.preprocess.input_size))
    modality = weights.preprocess.modality
    task = "image-classification" if modality.name == "images" else "other"
    task = "audio-classification" if modality.name == "sounds" else task
    words = {"one": modality.one, "many": modality.many, "example": "FILE"}
    if modality.program is not None:
        words["example"] = modality.program.example
    test = facts.get("test")
    if test and not (test.get("num_images") and test.get("num_correct") is not None):
        test = None
    lines = ["---", f"license: {hub_identifier(licence)}", "library_name: mixlab"]
    lines += [
        f"pipeline_tag: {task}",
        "tags:",
        f"- {task}",
        "- mlp-mixer",
        "- mixlab",
    ]
    if test:
        lines += [
            "model-index:", f"- name: {name}", "  results:", "  - task:", f"      type: {task}",
            "    dataset:", f"      name: {json.dumps(visible(data))}",
            f"      type: {modality.one}-folder", "      split: test",
            "    metrics:", "    - type: accuracy", f"      value: {test['num_correct'] / test['num_images']:.4f}",
        ]  # fmt: skip
    lines += ["---", "", f"# {name}, {for_markdown(data)}", ""]
    lines += [
        f"{_article(modality.one).capitalize()} classifier of {cost.num_parameters:,} parameters and "
        f"{cost.macs / 1e6:,.1f} million multiply-accumulates {_article(modality.one)} of {size} "
        f"{'pixels' if modality.name == 'images' else 'numbers'}, made of nothing but MLPs over patches and channels "
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
        USE.format(**words),
        "```",
        "",
        "## Measured",
        "",
    ]
    if test:
        lines.append(
            f"Test accuracy {100 * test['num_correct'] / test['num_images']:.2f} % ({test['num_correct']:,} of "
            f"{test['num_images']:,} {modality.many}), one training, single view."
        )
        if test.get("ece") is not None:
            lines.append(f"Expected calibration error {test['ece']:.3f}.")
    else:
        reason = facts.get("test_reason")
        lines.append(f"Nothing was tested: {reason}." if reason else "Not yet measured.")
    lines += [
        "",
        "## Training",
        "",
        *_training(facts),
        f"- Data: {for_markdown(data)}",
        f"- Licence of the weights: {for_markdown(licence)}",
        *(f"- Caution: {for_markdown(caution)}" for caution in weights.cautions),
        "",
    ]
    classes = ", ".join(map(for_markdown, weights.class_names[:1000]))
    lines += ["## Classes", "", classes, "", "## Limits", "", LIMITS.format(**words), ""]
    return "\n".join(lines)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def card_beside(folder: Path, *, licence: str = NOT_STATED, data: str | None = None) -> str | None:
    """The card that mixlab wrote beside weights, with another licence and data set if given; None without one."""
    licence = checked_licence(licence)
    path = folder / "README.md"
    # The Hub's cache consists of links; what is no card of ours is not shown, wherever it comes from.
    text = read_text(path, MAX_CARD_BYTES, follow=True) if path.is_file() else ""
    head, closing, rest = text.removeprefix("---\n").partition("\n---\n")
    if not text.startswith("---\n") or "library_name: mixlab" not in head.splitlines():
        return None  # somebody else's
    if licence != NOT_STATED:
        head = re.sub(r"^license: .*$", f"license: {licence}", head, flags=re.M)
        shown = for_markdown(licence)
        rest = re.sub(r"^(- Licence of the weights: ).*$", lambda m: m[1] + shown, rest, flags=re.M)
    if data is not None:
        name = json.dumps(visible(data))
        head = re.sub(r"^(      name: ).*$", lambda m: m[1] + name, head, flags=re.M)
        rest = re.sub(r"^(- Data: ).*$", lambda m: m[1] + for_markdown(data), rest, flags=re.M)
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
        facts["environment"] = visible_values(without_places(read_json(run / "environment.json")))
    if (run / "recipe.toml").is_file():
        recipe = without_places(read_toml(run / "recipe.toml"))
        if ends:
            recipe["steps"] = facts["step"]  # that were taken, where the plan was another
            recipe.pop("epochs", None)  # the plan's, which steps go before
        facts["recipe"] = tomli_w.dumps(recipe)
    return facts


def _training(facts: dict[str, Any]) -> list[str]:
    if not facts:
        return ["- Not known: these are weights without their run."]
    lines = []
    if "epochs" in facts:
        lines.append(
            f"- {counted(facts['step'], 'step', 'steps')}, {facts['epochs'] or 0:,.2f} epochs, "
            f"{format_seconds(facts.get('seconds') or 0)}"
        )
    else:
        lines.append("- Not finished: the recipe below is what was planned.")
    if "environment" in facts:
        environment = facts["environment"]
        versions = environment.get("versions")
        version = versions.get("torch") if isinstance(versions, dict) else "not known"
        cores, cpu, commit = (for_markdown(str(environment.get(key))) for key in ("cores", "cpu", "commit"))
        lines.append(f"- {cores} cores, {cpu}, torch {for_markdown(str(version))}")
        lines.append(f"- Commit {commit}")
    if "recipe" in facts:
        # Longer than any in the recipe, whose texts may hold some.
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", facts["recipe"])), default=0))
        lines += [
            "",
            "<details><summary>Recipe</summary>",
            "",
            f"{fence}toml",
            facts["recipe"].rstrip(),
            fence,
            "",
            "</details>",
            "",
        ]
    return lines

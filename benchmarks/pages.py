"""The pages of docs/ that are made, not written: settings.md, commands.md, and results.md from docs/results/*.csv.

    python -m benchmarks.pages

writes them. tests/test_pages.py says when one is not what it would write.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path

from mixlab.cli import make_app
from mixlab.recipes import RECIPES
from mixlab.training.keys import keys_as_markdown

DOCS = Path(__file__).parent.parent / "docs"

COMMANDS_INTRO = """\
# Commands

This page is made from the command line itself, by `python -m benchmarks.pages`; `mixlab COMMAND --help` says it too.

Every command takes three more options:

- `--json` prints one JSON object on standard output (fractions, not per cent), and everything else on standard error;
- `--quiet` prints nothing but errors and notes of caution, and with `--json` the object;
- `--traceback` shows where in the code an error came from.

| exit status | what it says |
|---|---|
| 0 | all is done |
| 1 | it failed; or it is done but for some: images that could not be read, a side of `bench` that failed |
| 2 | the command is wrong: an option, a name or a path |
| 130, 143 | stopped by Ctrl-C, or by SIGTERM; a training has saved its state |

`mixlab train` and `mixlab finetune` take every key of a recipe as well: [Settings](settings.md).
"""


def commands_page() -> str:
    """docs/commands.md: every command with its arguments and options."""
    text = make_app(()).generate_docs()
    text = text[text.index("\n**") + 1 :]  # the first list of commands; before it the same without sentences
    # cyclopts takes `python -m benchmarks.pages` for the name of a program, and its rest for arguments.
    text = re.sub(r"^(mixlab \S+) -m \S+", r"\1", text, flags=re.MULTILINE)
    # An indented line would be a block of code, and the sentence that it belongs to is one.
    text = re.sub(r"\n {4,}(?=\S)", " ", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    # A switch is off by default; a star is no emphasis.
    text = text.replace(" *[default: False]*", "").replace("/*", r"/\*")
    return f"{COMMANDS_INTRO}\n{text.strip()}\n"


RESULTS_INTRO = """\
# Results

This page is made from the files in `docs/results/` by `python -m benchmarks.pages`; write rows there, not here.

- **accuracy** is on the test split, which is read once for each seed, after the recipe was committed.
- **s.d.** is the standard deviation between seeds, in points; **n** is the number of seeds or measurements.
- An empty cell was not recorded.
- How the figures came about, with every seed and what went wrong, is in [the archive](results-archive.md).
  Speed beside other libraries is in [Speed](benchmarks.md), memory in [Memory](memory.md).
"""
NOT_YET = """\
## Not yet measured

- Anything on a GPU, and on macOS.
- `small_data` on images of more than 32 pixels.
- `small_images` at its own 30 epochs.
- More than one machine, more than 4 processes, a Hub set over a network, real power cuts.
- What the published weights give here: no published file could be downloaded.
"""
HEADINGS = {
    "cifar10": "CIFAR-10 from scratch",
    "cifar10, 200 a class": "2,000 images of CIFAR-10",
    "digits": "Digits",
    "hand signs": "A folder of photos: the digits 0 to 9 as hand signs, 2,062 photos, a tenth for the test",
    "spoken digits": "Spoken digits (Free Spoken Digit Dataset): 3,000 clips of six speakers, the source's own split",
    "tones": "Tones, the synthetic sounds that come with mixlab",
}
ACCURACY_TITLES = {
    "recipe": "recipe", "model": "model", "machine": "machine", "budget": "budget", "accuracy": "accuracy, %",
    "sd": "s.d.", "n": "n", "epochs": "epochs", "commit": "commit", "date": "date", "note": "note",
}  # fmt: skip
MEASURE_TITLES = {
    "what": "what", "machine": "machine", "value": "measured", "range": "range", "n": "n", "target": "target",
    "commit": "commit", "date": "date", "script": "by", "note": "note",
}  # fmt: skip
MACHINE_TITLES = {
    "name": "machine", "processor": "processor", "cores": "cores", "instructions": "instructions",
    "memory": "memory", "float32_product": "best float32 product", "torch": "torch", "note": "note",
}  # fmt: skip


def read_results(name: str) -> list[dict[str, str]]:
    """Rows of docs/results/NAME.csv."""
    with (DOCS / "results" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]], titles: dict[str, str]) -> str:
    """A Markdown table with the columns of `titles` that have a value in some row."""
    used = [key for key in titles if any(row[key] for row in rows)]
    lines = [f"| {' | '.join(titles[key] for key in used)} |", "|---" * len(used) + "|"]
    lines += [f"| {' | '.join(row[key].replace('|', chr(92) + '|') for key in used)} |" for row in rows]
    return "\n".join(lines)


def results_page() -> str:
    """docs/results.md: accuracies by task, other measurements by topic, the machines."""
    parts = [RESULTS_INTRO]
    accuracies = read_results("accuracy")
    for task, heading in HEADINGS.items():
        rows = [row for row in accuracies if row["task"] == task]
        now = [row for row in rows if is_of_today(row["recipe"])]
        parts.append(f"## {heading}\n\n{table(now, ACCURACY_TITLES)}\n")
        if before := [row for row in rows if row not in now]:
            parts.append(f"Recipes of before, and others beside them:\n\n{table(before, ACCURACY_TITLES)}\n")
    others = [row for row in accuracies if row["task"] not in HEADINGS]
    parts.append(f"## Transfer\n\n{table(others, {'task': 'to'} | ACCURACY_TITLES)}\n")
    measures = read_results("measures")
    for topic in dict.fromkeys(row["topic"] for row in measures):
        mine = [row for row in measures if row["topic"] == topic]
        parts.append(f"## {topic}\n\n{table(mine, MEASURE_TITLES)}\n")
    parts.append(f"## Machines\n\n{table(read_results('machines'), MACHINE_TITLES)}\n")
    return "\n".join([*parts, NOT_YET])


def is_of_today(recipe: str) -> bool:
    """Whether a row's recipe is one that `mixlab recipes` lists, as it is now."""
    return recipe in RECIPES


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": keys_as_markdown,
    "commands.md": commands_page,
    "results.md": results_page,
}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

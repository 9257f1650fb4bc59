"""Every command in README and docs is typed on small data, trainings for two steps; or here is the reason why not."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from sklearn.datasets import load_digits

from mixlab.commands.learning import RECIPE_COMMANDS
from mixlab.report.run_log import read_run_log
from tests.forked import mixlab

ROOT = Path(__file__).parent.parent
PAGES = sorted({ROOT / "README.md", ROOT / "README.ko.md", *(ROOT / "docs").rglob("*.md")})
PAGES = [
    page for page in PAGES if page.name not in ("architecture.md", "api.md")
]  # their blocks are no commands
# Why a command is not typed: one of these is in it.
NOT_TYPED = {
    "git clone": "the network", "pip install": "the network",
    "-m venv": ".ci/run makes one for the wheel", "make ": "continuous integration does",
    "export TORCH": "a variable of the shell", "export MIXLAB": "the same",
    "torchrun": "tests/training/test_torchrun.py",
    "benchmarks": "hours; tests/recipes/test_transfer.py", "hf:": "tests/data/test_hub.py",
    "mixlab serve": "tests/serving/test_server.py", "mixlab ui": "tests/serving/test_ui.py",
    "mixlab study shuffle": "hours; --smoke in tests/studies", "mixlab study compare": "the same",
    "--int8": "tests/exports/test_export_command.py", "--to torch-export": "tests/exports/test_export.py",
    "--to openvino": "tests/exports/test_export.py", "--labels real": "tests/data/images/test_imagenet.py",
    "docker ": "a daemon",
    "curl ": "the same with a running server: tests/serving/test_bodies.py",
    "--format timm": "a size that timm has is large; tests/checkpoint/test_convert.py",
}  # fmt: skip
# What stands for something of the reader's own, and the small thing that it is here.
OWN = {
    "PATH": "photos", "DATA": "photos", "RUN": "first", "OUT": "out", "WEIGHTS": "mixer_cifar:cifar10",
    "clip.wav": "photo.jpg", "mixer_b16:imagenet1k": "mixer_cifar:cifar10", "288x448": "24x40", "448": "48",
}  # fmt: skip
OWN_WORD = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, OWN))})(?![A-Za-z0-9])")
SHORT = ["--steps", "2", "--batch-size", "8", "--without-figures"]
# Words of a command whose file or folder other commands make first. The authors' weights have tanh's GELU, ours erf.
AFTER = {
    "wds:out": [["shard", "photos", "out"]],
    "Mixer-B_16.npz": [["convert", "mixer_cifar:cifar10", "Mixer-B_16.npz", "--accept-gelu-change"]],
    "mixer-b16": [
        ["train", "photos", "--recipe", "small_images_flat", "--gelu", "tanh", "--run", "tanh", *SHORT],
        ["convert", "tanh", "mixer-b16"],
    ],
}  # fmt: skip


def commands(page: Path) -> list[str]:
    """Lines of a page's indented or fenced blocks that are commands, continued lines joined, comments left out."""
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^(?: {4}|\$ )(\S.*)$", text, flags=re.MULTILINE)
    return [line.split("  #")[0].split(" # ")[0].strip() for line in lines]


def all_commands() -> list[str]:
    return list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def mentioned() -> list[list[str]]:
    """The words of `mixlab COMMAND ...` in a page's running text and tables."""
    found = (re.findall(r"`mixlab ([a-z][^`]*)`", page.read_text()) for page in PAGES)
    return [re.split(r"[\s=]+", text) for texts in found for text in texts]


def reason(command: str) -> str:
    return next((why for word, why in NOT_TYPED.items() if word in command), "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of a person who has images in folders by class, and trained once."""
    folder = tmp_path_factory.mktemp("docs")
    digits = load_digits()
    for number in range(120):
        path = folder / "photos" / ("cat", "dog")[digits.target[number] % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = np.kron(digits.images[number] * 15, np.ones((4, 4))).astype("uint8")
        Image.fromarray(side).convert("RGB").save(path)
    Image.open(path).save(folder / "photo.jpg")
    plain = ["--recipe", "small_images_flat", "--gelu", "tanh"]  # what every format can hold
    done = mixlab("train", "photos", "--run", "first", *plain, *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["index.md", pytest.param("index.ko.md", marks=pytest.mark.slow)])
def test_the_python_of_the_start_page_runs(name, place, tmp_path):
    page = ROOT / "docs" / name
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert 'budget="60s"' in code
    (tmp_path / "script.py").write_text(code.replace('budget="60s"', "steps=2"))
    (tmp_path / "photo.jpg").symlink_to(place / "photo.jpg")
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "predictions" in done.stdout


def test_pages_have_commands_and_reasons_are_of_use():
    found = all_commands()
    assert len([command for command in found if not reason(command)]) > 40
    unused = [word for word in NOT_TYPED if not any(word in command for command in found)]
    assert not unused


LONG = ("export", "package", "--lr-grid")  # in a command: it takes seconds


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow) if any(word in command for word in LONG) else command
        for command in all_commands()
        if not reason(command)
    ],
)
def test_command_of_the_docs(command, place, tmp_path):
    words = shlex.split(command)
    assert words[0] == "mixlab", f"neither a command of mixlab nor one with a reason: {command}"
    words = [OWN_WORD.sub(lambda found: OWN[found[1]], word) for word in words[1:] if word != "..."]
    for name in ("photos", "photo.jpg"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(place / "runs" / "first")
    written = words[2] if words[0] == "convert" else ""
    for word, makes in AFTER.items():
        if word in words and word != written:
            assert all(mixlab(*one, cwd=tmp_path).returncode == 0 for one in makes)
    if words[0] in ("train", "finetune") and "--resume" not in words:
        if "--budget" in words:
            del words[words.index("--budget") : words.index("--budget") + 2]
        words += SHORT
    done = mixlab(*words, cwd=tmp_path)
    assert done.returncode == 0, f"mixlab {shlex.join(words)}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("name", sorted({words[0] for words in mentioned()}))
def test_mentioned_commands_have_their_options(name, tmp_path):
    done = mixlab(name, "--help-all" if name in RECIPE_COMMANDS else "--help", cwd=tmp_path)
    assert done.returncode == 0, f"{name} is mentioned, and is no command"
    options = {word for words in mentioned() if words[0] == name for word in words if word.startswith("--")}
    known = set(re.findall(r"--[a-z0-9.-]+", done.stdout))
    assert {option for option in options if "." not in option} <= known


def test_the_notebook_shows_what_its_cells_gave():
    text = (ROOT / "docs" / "guides" / "first_steps.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert "image/png" in text
    assert "/home/" not in text
    assert str(ROOT) not in text


@pytest.mark.slow  # a kernel of its own, a training
def test_the_notebook_runs(tmp_path):
    book = nbformat.read(ROOT / "docs" / "guides" / "first_steps.ipynb", as_version=4)
    NotebookClient(
        book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert read_run_log(next(tmp_path.glob("runs/*/metrics.jsonl")))


def test_every_promise_names_a_test_that_is_there():
    page = (ROOT / "docs" / "design" / "promises.md").read_text()
    rows = re.findall(r"^\| .* \| `(tests/\S+)` \| `(test_\w+)` \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 40
    assert [row for row in rows if f"def {row[1]}(" not in (ROOT / row[0]).read_text()] == []

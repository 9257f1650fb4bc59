"""The architecture, checked: who imports whom, and what importing mixlab costs."""

import ast
import subprocess
import sys
from pathlib import Path

import mixlab

PACKAGE = Path(mixlab.__file__).parent
LEVELS = {
    "errors": 0,
    "language": 0,
    "settings": 0,
    "version": 0,
    "words": 0,
    "files": 1,
    "records": 1,
    "escape": 1,
    "threads": 1,
    "data": 2,
    "models": 2,
    "report": 2,
    "device": 2,
    "cpu": 3,
    "checkpoint": 4,
    "evaluation": 4,
    "timm": 4,
    "training": 5,
    "serving": 5,
    "exports": 5,
    "bench": 6,
    "planning": 6,
    "recipes": 7,
    "api": 8,
    "studies": 8,
    "commands": 9,
    "cli": 10,
}


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "mixlab" and len(parts) > 1 else None


def imported_modules(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [
                f"{node.module}.{alias.name}" if node.module == "mixlab" else str(node.module)
                for alias in node.names
            ]
    return found


def test_a_layer_imports_lower_layers_only():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        layer = relative.parts[0].removesuffix(".py")
        if layer in ("__init__", "__main__"):
            continue
        for module in imported_modules(path):
            other = layer_of(module)
            if other is None or other in (layer, "STARTED", "__version__"):
                continue
            if other not in LEVELS or LEVELS[other] >= LEVELS[layer]:
                wrong.append(f"{relative} imports {module}")
    assert wrong == []


def test_there_is_no_layer_without_a_subject():
    names = {path.stem for path in PACKAGE.rglob("*")}
    assert not names & {"utils", "common", "helpers", "core", "base", "misc"}


def modules_after(code: str) -> set[str]:
    probe = f"{code}\nimport sys; print(' '.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    return set(output.splitlines()[-1].split())


def test_importing_mixlab_or_its_command_line_imports_no_torch():
    loaded = modules_after("import mixlab, mixlab.cli")
    assert not loaded & {"torch", "timm", "torchvision", "matplotlib", "sklearn"}


def test_help_and_a_wrong_command_import_no_torch():
    code = """
import contextlib, io
from mixlab.cli import main
for arguments in (["--help"], ["trian"], ["predict", "--help"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(arguments)
        except SystemExit:
            pass
"""
    assert not modules_after(code) & {"torch", "timm", "torchvision"}


def test_training_waits_for_no_import_that_most_trainings_do_without():
    loaded = modules_after(
        "import mixlab.recipes\nfrom mixlab.data.sources import open_source\nopen_source('digits')"
    )
    assert not loaded & {"sklearn", "scipy.stats", "pandas", "timm", "torchvision", "torch._dynamo"}
    assert not loaded & {"torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"}


def test_loading_weights_waits_for_no_import_that_a_mixer_does_without():
    loaded = modules_after("import mixlab\nmixlab.load('mixer_cifar:cifar10')")
    assert "torch" in loaded
    assert not loaded & {"sympy", "timm", "torchvision", "torch._dynamo"}

"""A zip that says what is in examples wherever ONNX Runtime is: `mixlab package`."""

import importlib.resources
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.store import Weights
from mixlab.errors import UsageError
from mixlab.exports.card import with_use
from mixlab.exports.export import export
from mixlab.files import written_whole

USE = "pip install -r requirements.txt\npython predict.py {example}"
FILES = ("model.onnx", "predict.py", "requirements.txt", "README.md")


def write_package(
    weights: Weights, destination: Path, card: str, examples: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write the zip; what `mixlab package --json` prints. examples: as for `export`."""
    if destination.exists():
        raise UsageError("it exists already", where=str(destination), hint="choose another --out")
    modality = weights.preprocess.modality
    program = modality.program
    if program is None:
        raise UsageError(
            f"there is no package for {modality.many}", hint="`mixlab export` writes the model alone"
        )
    text_of_program = importlib.resources.files("mixlab.exports").joinpath(program.file).read_text()
    with tempfile.TemporaryDirectory() as folder, written_whole(destination) as temporary:
        model = Path(folder) / "model.onnx"
        result = export(weights, model, to="onnx", examples=examples)
        for name, text in {
            "predict.py": text_of_program,
            "requirements.txt": "".join(f"{package}\n" for package in program.needs),
            "README.md": with_use(card, USE.format(example=program.example)),
        }.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in FILES:
                path = Path(folder) / name
                path.chmod(
                    0o644
                )  # zip keeps it: who unpacks the files, on a server say, may not be who reads them
                archive.write(path, name)
    return result | {"destination": str(destination), "files": list(FILES)}

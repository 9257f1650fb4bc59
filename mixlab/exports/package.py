"""A zip that says what is in images wherever ONNX Runtime is: `mixlab package`."""

import importlib.resources
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.store import Weights
from mixlab.data.images.preprocess import for_images
from mixlab.errors import UsageError
from mixlab.exports.card import with_use
from mixlab.exports.export import export
from mixlab.files import written_whole

USE = "pip install -r requirements.txt\npython predict.py photo.jpg"
FILES = ("model.onnx", "predict.py", "requirements.txt", "README.md")
REQUIREMENTS = "numpy\nonnxruntime\npillow\n"


def write_package(
    weights: Weights, destination: Path, card: str, examples: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write the zip; what `mixlab package --json` prints. examples: as for `export`."""
    if destination.exists():
        raise UsageError("it exists already", where=str(destination), hint="choose another --out")
    for_images(weights.preprocess, "a package")
    program = importlib.resources.files("mixlab.exports").joinpath("standalone.py").read_text()
    with tempfile.TemporaryDirectory() as folder, written_whole(destination) as temporary:
        model = Path(folder) / "model.onnx"
        result = export(weights, model, to="onnx", examples=examples)
        for name, text in {
            "predict.py": program,
            "requirements.txt": REQUIREMENTS,
            "README.md": with_use(card, USE),
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

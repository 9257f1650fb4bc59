"""How long the first answer takes: `mixlab --help`, `import mixlab`, and weights loaded by mixlab and by timm.

    python benchmarks/startup.py [--rounds 5]

Every figure is of whole processes, which take turns; the first round, which brings files into memory, is left out.
Nothing else may run meanwhile. Writes docs/results/startup.json and prints the table (under 3 minutes).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mixlab.checkpoint.layouts import LAYOUTS
from mixlab.checkpoint.store import Weights, save_weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.device import describe_machine
from mixlab.models.catalog import create_model
from mixlab.models.mixer import Mixer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "startup.json"
MODEL, NUM_CLASSES = "mixer_s16", 1000
# Each loads from the folder it starts in, and prints the seconds that this took after the imports.
MIXLAB = """
import time
import mixlab
mixlab.load
import mixlab.checkpoint.open
began = time.perf_counter()
model = mixlab.load("mixlab").model
print(time.perf_counter() - began)
"""
TIMM = """
import time
import timm, torch
from safetensors.torch import load_file
began = time.perf_counter()
model = timm.create_model("mixer_s16_224").eval()
model.load_state_dict(load_file("timm.safetensors"))
print(time.perf_counter() - began)
"""
SIDES: dict[str, list[str]] = {
    "python -c pass": ["-c", "pass"],
    "import mixlab": ["-c", "import mixlab"],
    "mixlab --help": ["-m", "mixlab", "--help"],
    "import torch": ["-c", "import torch"],
    f"mixlab.load of {MODEL}": ["-c", MIXLAB],
    f"timm.create_model and load_state_dict of {MODEL}": ["-c", TIMM],
}


def write_weights(folder: Path) -> None:
    """The same weights for both: a mixlab folder, and a file with timm's keys."""
    model = create_model(MODEL, num_classes=NUM_CLASSES)
    assert isinstance(model, Mixer)
    side = model.config.image_size
    save_weights(
        folder / "mixlab",
        Weights(
            model=model, model_settings={"name": MODEL, "num_classes": NUM_CLASSES, "image_size": side},
            preprocess=ImagePreprocess(image_size=side), provenance={},
            class_names=tuple(map(str, range(NUM_CLASSES))),
        ),
    )  # fmt: skip
    keys = LAYOUTS["timm"].keys(model.config.num_blocks)
    save_file(
        {keys[name]: tensor for name, tensor in model.state_dict().items()}, folder / "timm.safetensors"
    )


def take_turns(rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every side: of whole processes, and of the loading alone where it says so."""
    whole: dict[str, list[float]] = {name: [] for name in SIDES}
    alone: dict[str, list[float]] = {name: [] for name in SIDES}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mixlab").mkdir()
        write_weights(Path(folder))
        for round_ in range(rounds + 1):
            for name, arguments in SIDES.items():
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
                )
                seconds = time.perf_counter() - began
                if done.returncode:
                    raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
                if round_:
                    whole[name].append(seconds)
                    if "load" in name:
                        alone[name].append(float(done.stdout))
    return {
        name: {
            "seconds": statistics.median(whole[name]),
            "range": [min(whole[name]), max(whole[name])],
            "load_seconds": statistics.median(alone[name]) if alone[name] else None,
            "rounds": rounds,
        }
        for name in SIDES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = take_turns(options.rounds)
    facts = describe_machine()
    machine = f"{facts['cores']} cores of {facts['cpu']}, torch {torch.__version__}"
    options.results.write_text(
        json.dumps({"machine": machine, "date": time.strftime("%Y-%m-%d"), "rows": found}, indent=1) + "\n"
    )
    print("| process | seconds in all (range) | loading alone |\n|---|---|---|")
    for name, row in found.items():
        low, high = row["range"]
        alone = "" if row["load_seconds"] is None else f"{row['load_seconds']:.2f} s"
        print(f"| `{name}` | {row['seconds']:.2f} ({low:.2f} to {high:.2f}) | {alone} |")
    print(f"\n{machine}, n={options.rounds}, files in the page cache.")


if __name__ == "__main__":
    main()

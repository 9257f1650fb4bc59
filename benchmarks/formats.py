"""Every weight format against the authors' numbers, the conversion matrix, and what loading costs.

    python benchmarks/formats.py --reference DIR [--repeats 5] [--json FILE]

DIR holds the reference arrays computed by the authors' code (its README says how the full-size weights are drawn).
Prints tables in Markdown: for every model and format the largest difference of the logits and pre_logits from the
authors' 64-bit ones; which format was converted to which with identical tensors; what half precision changes; how
near weights come to themselves when resampled to twice the grid and back; and time and peak memory of loading B/16
from .npz, alternately with np.load + timm.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mixlab.checkpoint.convert import FORMATS, TIMM_NAMES, convert
from mixlab.checkpoint.layouts import OFFICIAL
from mixlab.checkpoint.open import open_weights
from mixlab.models.catalog import create_model
from mixlab.models.mixer import Mixer
from mixlab.models.resolution import resample

SMALL = ("square16", "square32", "rect16x32")
FULL = {"S_16": "mixer_s16", "B_16": "mixer_b16"}
SEED = 20210504  # of the reference's README


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of the full-size reference weights."""
    z = np.random.default_rng([SEED, zlib.crc32(key.encode())]).standard_normal(shape)
    if key.endswith("/kernel"):
        # In the README's order of operations: another one changes the last bit of a few numbers.
        z = z * (4.0 if key == "head/kernel" else 1.0) / np.sqrt(np.prod(shape[:-1]))
    else:
        z = 1 + 0.1 * z if key.endswith("/scale") else 0.1 * z
    return z.astype(np.float32)


def draw_images() -> np.ndarray:
    """The two images of the full-size reference, NHWC."""
    rng = np.random.default_rng([SEED, zlib.crc32(b"image")])
    coarse = rng.uniform(-1, 1, (2, 7, 7, 3)).repeat(32, 1).repeat(32, 2)
    return (0.75 * coarse + 0.25 * rng.uniform(-1, 1, (2, 224, 224, 3))).astype(np.float32)


def write_full_size(name: str, path: Path) -> None:
    """The reference weights of S/16 or B/16 as an official .npz."""
    with torch.device("meta"):
        model = create_model(FULL[name])
    assert isinstance(model, Mixer)
    keys = OFFICIAL.keys(model.config.num_blocks)
    shapes = {keys[n]: OFFICIAL.their_shape(n, tuple(t.shape)) for n, t in model.state_dict().items()}
    with path.open("wb") as file:
        np.savez(file, **{key: draw(key, shape) for key, shape in shapes.items()})  # type: ignore[arg-type]


@torch.inference_mode()
def differences(
    model: torch.nn.Module, images: np.ndarray, expected: Any, dtype: torch.dtype
) -> tuple[float, float]:
    """Largest difference of logits and pre_logits from the authors' 64-bit ones."""
    assert isinstance(model, Mixer)
    model = model.to(dtype)
    image = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)
    features = model.features(image)
    logits = model.head(features)
    return (
        float(np.abs(logits.double().numpy() - expected["logits_f64"]).max()),
        float(np.abs(features.double().numpy() - expected["pre_logits_f64"]).max()),
    )


def compare_formats(reference: Path, folder: Path) -> list[dict[str, Any]]:
    """A row for every model and format: weights go from the authors' file to it, and are read back from it."""
    rows = []
    for name in (*SMALL, *FULL):
        source = reference / name / "weights.npz"
        if name in FULL:
            source = folder / f"{name}.npz"
            write_full_size(name, source)
            images, expected = draw_images(), np.load(reference / "full_size" / f"{name}.npz")
        else:
            images = np.load(reference / name / "batch.npz")["images"]
            expected = np.load(reference / name / "expected.npz")
        size = images.shape[1:3]
        paths = {"official": source}
        if name in SMALL:
            paths["official, older layout"] = reference / name / "weights_old.npz"
        weights = open_weights(source, image_size=size)
        for format in FORMATS:
            config = weights.model.config
            if format == "official" or (
                format == "timm"
                and (config.num_blocks, config.hidden_dim, config.patch_size) not in TIMM_NAMES
            ):
                continue
            paths[format] = folder / f"{name}-{format}"
            convert(weights, paths[format], format=format, accept_gelu_change=True)
        for format, path in paths.items():
            row: dict[str, Any] = {"model": name, "format": format}
            for dtype in (torch.float32, torch.float64):
                # Files of erf projects are run here as what they were made from: tanh, epsilon 1e-6.
                again = open_weights(path, image_size=size, gelu="tanh", layer_norm_eps=1e-6)
                row[str(dtype).removeprefix("torch.")] = differences(again.model, images, expected, dtype)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def conversion_matrix(reference: Path, folder: Path) -> dict[str, dict[str, bool]]:
    """from -> to -> identical tensors, on square16 (timm's own folder needs one of timm's sizes, so S/16 there)."""
    first = {
        "small": open_weights(reference / "square16" / "weights.npz"),
        "S/16": open_weights(folder / "S_16.npz"),
    }
    found: dict[str, dict[str, bool]] = {}
    for one in ("official", "official-old", *(f for f in FORMATS if f != "official")):
        found[one] = {}
        for other in FORMATS:
            weights = first["S/16" if "timm" in (one, other) else "small"]
            numerics: dict[str, Any] = {"gelu": "tanh", "layer_norm_eps": 1e-6}
            path = folder / f"matrix-{one}-{other}"
            if one == "official-old":
                if other == "timm":  # the only older file at hand is too small for timm
                    continue
                middle = reference / "square16" / "weights_old.npz"
            else:
                middle = path.with_name(path.name + "-1")
                convert(weights, middle, format=one, accept_gelu_change=True)
            convert(open_weights(middle, **numerics), path, format=other, accept_gelu_change=True)
            last = open_weights(path, **numerics).model.state_dict()
            found[one][other] = all(torch.equal(t, last[n]) for n, t in weights.model.state_dict().items())
    return found


@torch.inference_mode()
def half_precision(folder: Path) -> list[dict[str, Any]]:
    """Logits and pre_logits under autocast on the CPU, relative to those in float64."""
    rows = []
    image = torch.from_numpy(draw_images().transpose(0, 3, 1, 2).copy())
    for name in FULL:
        model = open_weights(folder / f"{name}.npz").model
        assert isinstance(model, Mixer)
        exact = [value.double() for value in _outputs(model.double(), image.double())]
        model.float()
        for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                found = _outputs(model, image)
            logits, features = (
                float((ours.double() - theirs).norm() / theirs.norm())
                for ours, theirs in zip(found, exact, strict=True)
            )
            same = int((found[0].argmax(dim=1) == exact[0].argmax(dim=1)).sum())
            rows.append({"model": name, "precision": precision, "logits": logits, "pre_logits": features,
                         "same_top1": f"{same} of {len(image)}"})  # fmt: skip
    return rows


def _outputs(model: Mixer, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = model.features(image)
    return model.head(features), features


@torch.inference_mode()
def round_trip(folder: Path) -> list[dict[str, Any]]:
    """S/16 from a grid of 14 x 14 to 28 x 28 and back: change of the first kernels, relative to their norm.

    Kernels: at initialisation (white noise, which no averaging keeps), and the 196 lowest cosines over the grid (the
    largest frequency half a wave a patch), of which every hidden unit gets a random mixture with
    amplitude 1 / frequency.
    """
    model = open_weights(folder / "S_16.npz").model
    assert isinstance(model, Mixer)
    rows = []
    grid = (torch.arange(14, dtype=torch.float64) + 0.5) / 14
    waves = torch.stack([torch.cos(torch.pi * k * grid) for k in range(14)])
    frequency = (1 + torch.arange(14.0)[:, None] + torch.arange(14.0)).double()
    for kind in ("white noise", "amplitude 1 / frequency"):
        if kind != "white noise":
            generator = torch.Generator().manual_seed(0)
            for block in model.blocks:
                for kernel in (block.token_mixing.fc1.weight, block.token_mixing.fc2.weight.T):
                    mixture = torch.randn(len(kernel), 14, 14, generator=generator) / frequency
                    drawn = torch.einsum("dij,ix,jy->dxy", mixture, waves, waves).flatten(1)
                    kernel.copy_(drawn * kernel.norm() / drawn.norm())
        again = resample(resample(model, (448, 448)), (224, 224))
        pairs = zip(model.blocks, again.blocks, strict=True)
        image = torch.from_numpy(draw_images().transpose(0, 3, 1, 2).copy())
        expected = model(image)
        rows.append(
            {
                "kernels": kind,
                "kernel": max(
                    _relative(a.token_mixing.fc1.weight, b.token_mixing.fc1.weight) for a, b in pairs
                ),
                "logits": _relative(expected, again(image)),
            }
        )
    return rows


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


LOADERS = {
    "mixlab": """
from mixlab.checkpoint.open import open_weights
import timm
before = ready()
model = open_weights(path).model
""",
    "np.load + timm": """
import numpy as np, timm
from mixlab.checkpoint.layouts import OFFICIAL, TIMM
import mixlab.checkpoint.open
before = ready()
arrays = np.load(path)
model = timm.create_model('mixer_b16_224')
official, theirs = OFFICIAL.keys(12), TIMM.keys(12)
state = {theirs[n]: OFFICIAL.to_ours(n, torch.from_numpy(arrays[official[n]]), model.state_dict()[theirs[n]].shape)
         for n in official}
model.load_state_dict(state)
""",
}
PROBE = """
import sys, time, torch
path = sys.argv[1]
torch.nn.Linear(4, 4)(torch.zeros(1, 4))
def memory(key):  # not ru_maxrss, which a child inherits from its parent
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))
def ready():
    global began
    open('/proc/self/clear_refs', 'w').write('5')  # the peak starts again from here
    began = time.perf_counter()
    return memory('VmRSS')
{code}
seconds = time.perf_counter() - began
print(seconds, memory('VmHWM') - before)
"""


def measure_loading(path: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes above the process after its imports, alternately; medians, and the range."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
    for _ in range(repeats):
        for name, code in LOADERS.items():
            output = subprocess.run(
                [sys.executable, "-c", PROBE.replace("{code}", code), str(path)],
                capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
            seen[name].append((float(output[-2]), float(output[-1])))
    size = path.stat().st_size
    return {
        name: {
            "seconds": median(s for s, _ in values),
            "seconds_min": min(s for s, _ in values),
            "seconds_max": max(s for s, _ in values),
            "peak_over_file": median(p for _, p in values) / size,
            "peak_over_file_max": max(p for _, p in values) / size,
        }
        for name, values in seen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = compare_formats(options.reference, folder)
        matrix = conversion_matrix(options.reference, folder)
        half, trip = half_precision(folder), round_trip(folder)
        loading = measure_loading(folder / "B_16.npz", options.repeats)
    print(
        "| model | format | logits fp32 | pre_logits fp32 | logits fp64 | pre_logits fp64 |\n"
        + "|---" * 6
        + "|"
    )
    for row in rows:
        values = [*row["float32"], *row["float64"]]
        print(
            f"| {row['model']} | {row['format']} | " + " | ".join(f"{value:.1e}" for value in values) + " |"
        )
    print("\n| from \\ to | " + " | ".join(FORMATS) + " |\n|" + "---|" * (len(FORMATS) + 1))
    for one, others in matrix.items():
        marks = ["not tried" if f not in others else "identical" if others[f] else "DIFFERS" for f in FORMATS]
        print(f"| {one} | " + " | ".join(marks) + " |")
    for title, found in (
        ("half precision, relative to float64", half),
        ("14 x 14 -> 28 x 28 -> 14 x 14", trip),
    ):
        print(f"\n{title}\n\n| " + " | ".join(found[0]) + " |\n" + "|---" * len(found[0]) + "|")
        for row in found:
            cells = [f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()]
            print("| " + " | ".join(cells) + " |")
    print("\n| B/16 .npz loaded by | seconds (range) | peak / file size (largest) |\n|---|---|---|")
    for loader, v in loading.items():
        print(
            f"| {loader} | {v['seconds']:.2f} ({v['seconds_min']:.2f} to {v['seconds_max']:.2f}) "
            f"| {v['peak_over_file']:.2f} ({v['peak_over_file_max']:.2f}) |"
        )
    print(f"\n{time.perf_counter() - began:.0f} s, n={options.repeats} loads each, alternately")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "matrix": matrix, "half_precision": half,
                                            "round_trip": trip, "loading": loading}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()

"""The whole comparison with peers; writes docs/benchmarks.md from docs/results/benchmarks.json.

    python benchmarks/peers.py [--cifar DIR] [--photos DIR] [--official-code DIR] [--only NAME...]

Every measurement is a row that is kept in the JSON file, so parts can be measured again alone (`--only`). Ratios come
from sides that take turns; what they were is in each row. CIFAR is a folder of small images with train/ and test/,
photos one of JPEGs, of which files of 500 pixels and of 12 megapixels are made. Nothing else may run meanwhile.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixlab.bench.backends import timm_twin
from mixlab.bench.bench import bench
from mixlab.device import describe_machine, num_cores, set_threads

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "results" / "benchmarks.json", ROOT / "docs" / "benchmarks.md"
ALL = ("timm", "timm-compile", "onnxruntime", "openvino", "jax")
CIFAR_SIZE = "mixer_nano4"  # patch 4, C 128, 8 blocks, D_C 512
#        name: (model, side, batch size, mode, against, options of the model)
MODELS: dict[str, tuple[str, int, int, str, tuple[str, ...], dict[str, Any]]] = {
    "s16": ("mixer_s16", 224, 16, "inference", ALL, {}),
    "b16": ("mixer_b16", 224, 16, "inference", ALL, {}),
    "s16-erf": ("mixer_s16", 224, 16, "inference", ("timm",), {"gelu": "erf"}),
    "cifar": (CIFAR_SIZE, 32, 256, "inference", ALL, {}),
    "cifar-erf": (CIFAR_SIZE, 32, 256, "inference", ("timm",), {"gelu": "erf"}),
    "micro": ("mixer_micro4", 32, 256, "inference", ("timm", "openvino"), {}),
    "train-cifar": (CIFAR_SIZE, 32, 128, "train", ("timm", "timm-compile", "jax"), {}),
    "train-cifar-erf": (CIFAR_SIZE, 32, 128, "train", ("timm",), {"gelu": "erf"}),
    "train-micro": ("mixer_micro4", 32, 128, "train", ("timm", "jax"), {}),
    "train-s16": ("mixer_s16", 224, 16, "train", ("timm", "jax"), {}),
    "train-b16": ("mixer_b16", 224, 16, "train", ("timm", "jax"), {}),
}
STEPS, TRAINING_BATCH = 120, 128


def turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Speeds of all sides, measured A B A B, and how many times faster the first is than each other."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            speeds[name].append(measure())
    first, *others = sides
    ratios = {
        name: sorted(a / b for a, b in zip(speeds[first], speeds[name], strict=True)) for name in others
    }
    return {
        "speed": {name: statistics.median(values) for name, values in speeds.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "range": {name: [values[0], values[-1]] for name, values in ratios.items()},
        "rounds": rounds,
    }


def run(*arguments: str, folder: Path, **environment: str) -> dict[str, Any]:
    """`mixlab ARGUMENTS --json` as a command of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mixlab", *arguments, "--json"],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"mixlab {' '.join(arguments)} failed: {done.stderr[-2000:]}")
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def train_cifar(cifar: Path, folder: Path, model: str = CIFAR_SIZE, steps: int = STEPS, **keys: str) -> float:
    """Images a second of `mixlab train`, from the first step to the last."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    keys = {"precision": "fp32", "gelu": "tanh"} | keys  # as the other side has it
    options = [text for key, value in keys.items() for text in (f"--{key}", value)]
    common = ("--steps", str(steps), "--batch-size", str(TRAINING_BATCH), "--optimizer.name", "adamw")
    result = run("train", str(cifar), "--model", model, *common, *options, "--run", "speed", folder=folder)
    return float(result["images_per_second"])


def theirs(what: str, *arguments: str) -> float:
    """A function of this file in a process of its own; it prints one number."""
    done = subprocess.run(
        [sys.executable, __file__, f"--side={what}", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{what} failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def timm_loader(root: str, split: str, is_training: bool, batch_size: int) -> Any:
    from timm.data import add_img_extensions, create_dataset, create_loader, create_transform

    add_img_extensions(".webp")
    dataset = create_dataset("", root=root, split=split, is_training=is_training)
    loader = create_loader(
        dataset, input_size=(3, 32, 32), batch_size=batch_size, is_training=is_training,
        num_workers=num_cores(), use_prefetcher=False, device=torch.device("cpu"), crop_pct=1.0,
    )  # fmt: skip
    if is_training:
        dataset.transform = create_transform(32, is_training=True, color_jitter=0.0)
        # For small images its train.py is given a padded crop instead of a resized one.
        from torchvision import transforms

        dataset.transform.transforms[0] = transforms.RandomCrop(32, padding=4)
    return loader


def timm_model(gelu: str = "tanh") -> torch.nn.Module:
    from mixlab.models.catalog import create_model

    return timm_twin(create_model(CIFAR_SIZE, num_classes=10, gelu=gelu))


def side_timm_train(root: str) -> float:
    """timm's usual training: its loader with a worker a core, its model, AdamW; images a second without the start."""
    model = timm_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    loss_of, seen, began = torch.nn.CrossEntropyLoss(), 0, 0.0
    for step, (image, label) in enumerate(timm_loader(root, "train", True, TRAINING_BATCH)):
        if step == 5:
            began = time.perf_counter()
        loss = loss_of(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seen += len(image) if step >= 5 else 0
        if step == STEPS:
            break
    return seen / (time.perf_counter() - began)


def side_timm_validate(root: str, weights: str) -> float:
    """What timm's validate.py does with 10,000 images; the accuracy is printed, so that it can be compared."""
    model = timm_model()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    correct = total = 0
    with torch.inference_mode():
        for image, label in timm_loader(root, "test", False, 256):
            correct += int((model(image).argmax(1) == label).sum())
            total += len(label)
    return correct / total


def side_torchvision_loader(root: str, batch_size: str) -> float:
    """Pillow and torchvision's v2 in a DataLoader with a worker a core; images a second after the first batch."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([
        v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    loader = torch.utils.data.DataLoader(
        ImageFolder(root, transform), batch_size=int(batch_size), shuffle=True, num_workers=num_cores()
    )
    return _batches_per_second(loader)


def side_mixlab_loader(root: str, batch_size: str) -> float:
    """The same by mixlab's loader, as it feeds a training that does not fit in memory."""
    from mixlab.data.images.augment import AugmentConfig
    from mixlab.data.images.preprocess import ImagePreprocess
    from mixlab.data.loader import TrainingDataset, training_batches
    from mixlab.data.reading import load_examples
    from mixlab.data.sources import open_source

    set_threads(None)
    split = open_source(root).splits["all"]
    images = load_examples(split, ImagePreprocess(image_size=(224, 224)), in_memory=False)
    dataset = TrainingDataset(
        examples=images, augment=AugmentConfig(crop="resized", flip=True), batch_size=int(batch_size), seed=0
    )
    steps = len(split) // int(batch_size)
    batches = training_batches(dataset, first_step=0, num_steps=steps, num_workers=num_cores(), on_bad=print)
    return _batches_per_second(batch.inputs for batch in batches)


def _batches_per_second(batches: Any) -> float:
    seen, began = 0, 0.0
    for number, batch in enumerate(batches):
        image = batch[0] if isinstance(batch, list) else batch
        if number == 0:
            began = time.perf_counter()
        else:
            seen += len(image)
    return seen / (time.perf_counter() - began)


def make_jpegs(photos: Path, folder: Path, size: tuple[int, int], count: int) -> None:
    from PIL import Image

    sources = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    for number in range(count):
        target = folder / f"class{number % 4}" / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        if number < len(sources):
            with Image.open(sources[number]) as image:
                image.convert("RGB").resize(size).save(target, quality=90)
        else:
            shutil.copy(
                folder / f"class{(number - len(sources)) % 4}" / f"{number - len(sources)}.jpg", target
            )


def loader(photos: Path, folder: Path, size: tuple[int, int], count: int, batch_size: int) -> dict[str, Any]:
    make_jpegs(photos, folder, size, count)
    batch = str(batch_size)
    sides = {
        "mixlab": lambda: theirs("mixlab_loader", str(folder), batch),
        "Pillow + v2": lambda: theirs("torchvision_loader", str(folder), batch),
    }
    return turns(sides, 3) | {"unit": "images/s", "files": count, "pixels": list(size)}


def evaluation(cifar: Path, folder: Path) -> dict[str, Any]:
    """Whole commands: from the shell to the answer."""
    train_cifar(cifar, folder, steps=20)
    weights = folder / "timm.pth"
    from mixlab.checkpoint.layouts import LAYOUTS
    from mixlab.checkpoint.store import load_weights

    model = load_weights(folder / "runs" / "speed").model
    keys = LAYOUTS["timm"].keys(model.config.num_blocks)
    torch.save({keys[name]: tensor for name, tensor in model.state_dict().items()}, weights)
    answers: dict[str, list[float]] = {"mixlab": [], "timm": []}

    def measured(name: str, call: Callable[[], float]) -> Callable[[], float]:
        def measure() -> float:
            began = time.perf_counter()
            answers[name].append(call())
            return 10_000 / (time.perf_counter() - began)

        return measure

    sides = {
        "mixlab": measured(
            "mixlab",
            lambda: float(run("evaluate", "speed", str(cifar), "--split", "test", folder=folder)["top1"]),
        ),
        "timm": measured("timm", lambda: theirs("timm_validate", str(cifar), str(weights))),
    }
    return turns(sides, 5) | {
        "unit": "images/s",
        "accuracy": {name: found[0] for name, found in answers.items()},
    }


def busy(cifar: Path, folder: Path, **keys: str) -> dict[str, Any]:
    """A training with one core taken by something else, and without."""

    def beside() -> float:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            return train_cifar(cifar, folder, "mixer_micro4", **keys)
        finally:
            other.kill()
            other.wait()

    sides = {"busy": beside, "quiet": lambda: train_cifar(cifar, folder, "mixer_micro4", **keys)}
    return turns(sides, 3) | {"unit": "images/s"}


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """The row `name`, or None where what it needs was not given."""
    if name in MODELS:
        model, side, batch_size, mode, against, settings = MODELS[name]
        if options.official_code is None:
            against = tuple(backend for backend in against if backend != "jax")
        rows = bench(
            model, against, image_size=(side, side), batch_size=batch_size, threads=num_cores(),
            train=mode == "train", rounds=options.rounds, options=settings, official_code=options.official_code,
            say=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
        return {"rows": rows, "gelu": settings.get("gelu", "tanh")}
    if name.startswith("loader"):
        if options.photos is None:
            return None
        small = name == "loader-500"
        size, count, batch = ((500, 375), 1024, 64) if small else ((4000, 3000), 96, 16)
        return loader(options.photos, folder / "jpeg", size, count, batch)
    if options.cifar is None:
        return None
    cifar = options.cifar.resolve()
    if name == "evaluation":
        return evaluation(cifar, folder)
    if name.startswith("train-loader"):
        precision = "bf16" if name == "train-loader-bf16" else "fp32"
        sides = {
            "mixlab": lambda: train_cifar(cifar, folder, precision=precision),
            "timm": lambda: theirs("timm_train", str(cifar)),
        }
        return turns(sides, 3) | {"unit": "images/s"}
    return busy(cifar, folder, fast="false" if name == "busy-torch" else "true")


OTHERS = (
    "train-loader",
    "train-loader-bf16",
    "evaluation",
    "loader-500",
    "loader-12mp",
    "busy",
    "busy-torch",
)
TITLES = {
    "train-loader": "Training the CIFAR-size model on a folder of CIFAR-10 with the loader, batches of 128",
    "train-loader-bf16": "The same, mixlab in bfloat16 (`--precision bf16`), timm in float32 as it comes",
    "evaluation": "Evaluation of 10,000 CIFAR images, whole command",
    "loader-500": "JPEG files of 500 x 375 to training batches of 224 pixels",
    "loader-12mp": "JPEG files of 4000 x 3000 to training batches of 224 pixels",
    "busy": "Training Micro/4 while another process takes a core, against a quiet machine",
    "busy-torch": "The same by torch's own operations (`--fast false`)",
}


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Benchmarks", "",
        "Written by `python benchmarks/peers.py` from docs/results/benchmarks.json; do not edit.",
        "All sides of a row take",
        "turns in one run, each in a warm process of its own with its own defaults; ratios are medians over the",
        "rounds (range). Logits agree within 1e-4, the first training loss too. A share of the peak is of the",
        "machine's best 4096^3 product in float32. `timm` is its model as it stands, with the same weights and GELU.",
        "",
    ]  # fmt: skip
    for name in MODELS:
        if name not in results:
            continue
        value = results[name]
        first = value["rows"][0]
        side = "x".join(str(length) for length in first["image_size"])
        lines += [
            f"## {first['model']}, {'training step' if first['mode'] == 'train' else 'inference'}, {side} pixels, "
            f"batches of {first['batch_size']}, {value['gelu']} GELU", "",
            "| backend | images/s | GFLOP/s | of peak | ms for one | peak MiB | mixlab is | for one image |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in value["rows"]:
            if "error" in row:
                lines.append(f"| {row['backend']} | {row['error']} | | | | | | |")
                continue
            times = alone = ""
            if row is not first:
                low, high = first["ratio_range"][row["backend"]]
                times = f"{first['ratio'][row['backend']]:.2f}x ({low:.2f} to {high:.2f})"
                if "ratio_batch_1" in first:
                    low, high = first["ratio_batch_1_range"][row["backend"]]
                    alone = f"{first['ratio_batch_1'][row['backend']]:.2f}x ({low:.2f} to {high:.2f})"
            one = "" if row["ms_batch_1"] is None else f"{row['ms_batch_1']:.1f}"
            speed = f"{row['images_per_second']:,.1f} | {row['gflops']:.0f} | {row['peak_share']:.0%}"
            memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}"
            lines.append(f"| {row['backend']} | {speed} | {one} | {memory} | {times} | {alone} |")
        lines += ["", _where(value, first["rounds"]), ""]
    lines += [
        "## Whole commands and loaders",
        "",
        "| what | speeds | ratio (range) | n |",
        "|---|---|---|---|",
    ]
    for name in OTHERS:
        if name in results:
            value = results[name]
            speeds = ", ".join(
                f"{side} {speed:,.0f} {value['unit']}" for side, speed in value["speed"].items()
            )
            ((other, ratio),) = value["ratio"].items()
            low, high = value["range"][other]
            lines.append(
                f"| {TITLES[name]} | {speeds} | {ratio:.2f}x ({low:.2f} to {high:.2f}) | {value['rounds']} |"
            )
    return "\n".join([*lines, ""])


def _where(value: dict[str, Any], rounds: int) -> str:
    return f"{value['machine']}, commit {value['commit']}, {value['date']}, n={rounds}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--official-code", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*MODELS, *OTHERS], default=[*MODELS, *OTHERS])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(globals()[f"side_{options.side}"](*options.arguments))
        return
    facts = describe_machine()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    machine = f"{facts['cores']} cores of {facts['cpu']} ({facts['cpu_capability']})"
    about = {
        "machine": f"{machine}, torch {facts['versions']['torch']}",
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, options, Path(folder))
        if found is None:
            print(f"{name}: left out, it needs --cifar or --photos", file=sys.stderr)
            continue
        results[name] = found | about
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        options.page.write_text(page(results))
        print(f"{name}: measured", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Spoken digits by a Mixer, a small CNN of equal cost, and logistic regression of MFCCs, under one protocol.

    python -m benchmarks.sound FOLDER [--splits source speakers] [--models mixer cnn mfcc] [--seeds 5] [--csv FILE]
        [--runs DIR] [--epochs N]
    python -m benchmarks.sound FOLDER --speeds

FOLDER holds the Free Spoken Digit Dataset's recordings, DIGIT_SPEAKER_NUMBER.wav. Two splits: `source`, its own,
where the recordings 0 to 4 of each digit and speaker are the test split (300 clips), so that all speakers are heard
in training; and `speakers`, where one speaker in turn is the test split, whom training never heard. A tenth of the
rest is held out for validation, drawn by the seed; the kept weights, the regression's C and the temperature are
chosen on it. The test split is read once in each cell, after training. Every cell is a row of the CSV file; a
second call measures only what is missing in it. A table with paired differences comes at the end.

The Mixer trains by the recipe `small_sounds`. The CNN is timm's ResNet with a basic block in each of four stages, as
wide as gives the same multiply-accumulates, on the same log-mel pictures, by the same recipe. The regression takes
means and standard deviations over time of 20 MFCCs and of their differences from frame to frame.

`--speeds`: the CNN's and the Mixer's training and one-clip speed in turns, and the loader's.
"""

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mixlab
from benchmarks.cells import measure_missing
from mixlab import recipes
from mixlab.checkpoint.open import open_weights
from mixlab.device import describe_machine, machine_name, set_threads
from mixlab.report.screen import Screen
from mixlab.studies.rows import read_rows
from mixlab.studies.turns import alternate

COLUMNS = (
    "split", "test", "model", "seed", "num_correct", "num_clips", "accuracy", "num_parameters", "epochs", "seconds",
    "commit",
)  # fmt: skip
CELL = COLUMNS[:4]


MODELS: dict[str, dict[str, Any]] = {
    "mixer": {},
    "cnn": {
        "model__name": "timm/baseline_resnet_sound",
        "model__branch_init_scale": 1.0,
        "audio__tokens": "patches",
    },
    "mfcc": {},
}


def write_table(folder: Path, split: str, test: str, path: Path) -> Path:
    """The CSV file of a split: test is `own` for the source's, or the speaker who is left out."""
    rows = ["path,label,split"]
    for file in sorted(folder.glob("*.wav")):
        digit, speaker, number = file.stem.split("_")
        is_test = int(number) < 5 if split == "source" else speaker == test
        rows.append(f"{file.resolve()},{digit},{'test' if is_test else 'train'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


def speakers(folder: Path) -> list[str]:
    return sorted({file.stem.split("_")[1] for file in folder.glob("*.wav")})


def measure(cell: dict[str, Any], folder: Path, runs: Path, epochs: float | None) -> dict[str, Any]:
    """One row: train, and read the test split once."""
    name = "-".join(str(cell[key]) for key in CELL)
    table = write_table(folder, cell["split"], cell["test"], runs / f"{cell['split']}-{cell['test']}.csv")
    began = time.monotonic()
    if cell["model"] == "mfcc":
        found = regression(table, cell["seed"])
    else:
        keys = MODELS[cell["model"]] | ({} if epochs is None else {"epochs": epochs})
        run = runs / name
        if (run / "recipe.toml").exists():
            result = mixlab.resume(run, screen=Screen(quiet=True), figures=False)
        else:
            result = mixlab.train(
                str(table), recipe="small_sounds", run=run, screen=Screen(quiet=True), figures=False,
                seed=cell["seed"], data__split_seed=cell["seed"], **keys,
            )  # fmt: skip
        test = result["test"]
        found = {
            "num_correct": test["num_correct"],
            "num_clips": test["num_images"],
            "num_parameters": result["num_parameters"],
            "epochs": round(result["epochs"], 1),
        }
    row = cell | found | {"seconds": round(time.monotonic() - began), "commit": commit()}
    row["accuracy"] = round(100 * row["num_correct"] / row["num_clips"], 2)
    print(json.dumps(row), flush=True)
    return row


def commit() -> str:
    root = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


def regression(table: Path, seed: int) -> dict[str, Any]:
    """Logistic regression of MFCCs, C chosen on a tenth of the training clips, then fitted to all of them."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    lines = [line.split(",") for line in table.read_text().splitlines()[1:]]
    features = np.stack([mfcc_statistics(path) for path, _, _ in lines])
    label = np.array([int(digit) for _, digit, _ in lines])
    is_test = np.array([split == "test" for *_, split in lines])
    train, val = train_test_split(
        np.flatnonzero(~is_test), test_size=0.1, random_state=seed, stratify=label[~is_test]
    )

    def fit(rows: np.ndarray, c: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(
            features[rows], label[rows]
        )

    best = max((0.001, 0.01, 0.1, 1.0, 10.0), key=lambda c: fit(train, c).score(features[val], label[val]))
    model = fit(np.concatenate([train, val]), best)
    correct = int((model.predict(features[is_test]) == label[is_test]).sum())
    num_parameters = 10 * (features.shape[1] + 1)
    return {
        "num_correct": correct,
        "num_clips": int(is_test.sum()),
        "num_parameters": num_parameters,
        "epochs": "",
    }


def mfcc_statistics(path: str, num: int = 20) -> np.ndarray:
    """Means and standard deviations over time of MFCCs and of their differences, of the whole clip."""
    from scipy.fft import dct

    from mixlab.data.audio.decode import decode
    from mixlab.data.audio.preprocess import SoundPreprocess

    clip = decode(Path(path).read_bytes()).samples
    preprocess = SoundPreprocess(
        rate=8000,
        window=240,
        hop=80,
        fft=256,
        bands=40,
        frames=1 + max(len(clip) - 240, 0) // 80,
        max_samples=len(clip),
    )
    mel = preprocess.to_input(torch.from_numpy(clip)[None])[0, :, 0].numpy()
    found = dct(mel, axis=0, norm="ortho")[:num]
    steps = np.diff(found, axis=1) if found.shape[1] > 1 else np.zeros((num, 1))
    return np.concatenate([found.mean(1), found.std(1), steps.mean(1), steps.std(1)])


def differences(rows: list[dict[str, str]], split: str, first: str, second: str) -> str:
    """Of the same test clips and seeds, in points, with the 95 % interval of their mean by Student's t.

    A pair is a seed of the source's split. Where speakers are left out it is a speaker, over the seeds that both
    models have: the seeds of one speaker are alike, and the question is how it goes with another speaker.
    """
    from scipy.stats import t

    by_cell = {
        (row["model"], row["test"], row["seed"]): float(row["accuracy"])
        for row in rows
        if row["split"] == split
    }
    pairs: dict[str, list[float]] = {}
    for (model, test, seed), value in by_cell.items():
        if model == first and (second, test, seed) in by_cell:
            unit = test if split == "speakers" else seed
            pairs.setdefault(unit, []).append(value - by_cell[second, test, seed])
    if len(pairs) < 2:
        return "too few pairs"
    found = [statistics.mean(values) for values in pairs.values()]
    mean, spread = statistics.mean(found), statistics.stdev(found)
    half = float(t.ppf(0.975, len(found) - 1)) * spread / math.sqrt(len(found))
    return f"{mean:+.2f} points (95 % interval {mean - half:+.2f} to {mean + half:+.2f}, {len(found)} pairs)"


def summary(rows: list[dict[str, str]]) -> str:
    lines = ["| split | test | model | accuracy, % | s.d. | lowest | n |", "|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["split"], row["test"], row["model"]), []).append(float(row["accuracy"]))
        if row["split"] == "speakers":
            groups.setdefault(("speakers", "all", row["model"]), []).append(float(row["accuracy"]))
    for (split, test, model), found in sorted(groups.items()):
        sd = f"{statistics.stdev(found):.2f}" if len(found) > 1 else ""
        lines.append(
            f"| {split} | {test} | {model} | {statistics.mean(found):.2f} | {sd} | {min(found):.2f} | {len(found)} |"
        )
    for split in dict.fromkeys(row["split"] for row in rows):
        for other in ("cnn", "mfcc"):
            lines.append(f"\n{split}: mixer - {other}: {differences(rows, split, 'mixer', other)}")
    return "\n".join(lines)


def speeds(folder: Path, runs: Path, rounds: int) -> None:
    """Prints a row of JSON each, Mixer over CNN in turns: training, one clip, 64 clips; and the loader alone.

    Training is whole runs of 400 steps, by each model's own engine; the loader gives the same
    batches without a model. Clips are in memory as int16; log-mel pictures are computed in all of them.
    """
    from mixlab.cpu.inference import fast
    from mixlab.data.loader import TrainingDataset, training_batches
    from mixlab.data.reading import load_examples
    from mixlab.data.sources import open_source

    table = write_table(folder, "source", "own", runs / "source-own.csv")
    machine = machine_name(describe_machine())

    def say(what: str, first: list[float], second: list[float]) -> None:
        ratios = sorted(a / b for a, b in zip(first, second, strict=True))
        row = {
            "what": what, "mixer": round(statistics.median(first), 1), "other": round(statistics.median(second), 1),
            "ratio": round(statistics.median(ratios), 3), "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3), "n": len(ratios), "machine": machine, "commit": commit(),
        }  # fmt: skip
        print(json.dumps(row), flush=True)

    rates: dict[str, list[float]] = {"mixer": [], "cnn": []}
    trained: dict[str, Path] = {}
    for number in range(rounds):
        for model in rates:
            trained[model] = runs / f"speed-{model}-{number}"
            result = mixlab.train(
                str(table), recipe="small_sounds", run=trained[model], screen=Screen(quiet=True), figures=False,
                steps=400, **MODELS[model],
            )  # fmt: skip
            rates[model].append(result["images_per_second"])
    say("clips a second in training, Mixer over CNN", rates["mixer"], rates["cnn"])
    set_threads(None)
    preprocess = open_weights(trained["mixer"]).preprocess
    examples = load_examples(open_source(str(table)).splits["train"], preprocess)
    # The run's own recipe, with what followed from the data.
    settings = recipes.find_recipe(str(trained["mixer"] / "recipe.toml")).audio
    dataset = TrainingDataset(examples=examples, augment=settings, batch_size=64, seed=0)
    loaded = []
    for _ in range(rounds):
        began = time.perf_counter()
        seen = sum(
            len(batch.inputs)
            for batch in training_batches(dataset, first_step=0, num_steps=200, num_workers=0, on_bad=print)
        )
        loaded.append(seen / (time.perf_counter() - began))
    say("clips a second of the loader alone, over the Mixer's training", loaded, rates["mixer"])
    models = {name: open_weights(run) for name, run in trained.items()}
    for batch in (1, 64):
        works = []
        for weights in models.values():
            inputs = torch.randn(batch, weights.preprocess.channels, *weights.preprocess.input_size)
            works.append(repeated(fast(weights.model.eval()), inputs, 200 if batch == 1 else 10))
        with torch.inference_mode():
            times = alternate(works, max(rounds, 9))
        first, second = ([1 / seconds for seconds in found] for found in times)
        say(f"inference of {batch}, Mixer over CNN (relative speed)", first, second)


def repeated(
    model: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, times: int
) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            model(inputs)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--splits", nargs="+", choices=("source", "speakers"), default=["source", "speakers"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="other than the recipe's")
    parser.add_argument("--csv", type=Path, default=Path("docs/results/sound.csv"))
    parser.add_argument("--runs", type=Path, default=Path("runs/sound"))
    parser.add_argument("--speeds", action="store_true", help="speed instead of accuracy")
    parser.add_argument("--rounds", type=int, default=5, help="of --speeds")
    options = parser.parse_args()
    if options.speeds:
        speeds(options.folder, options.runs, options.rounds)
        return
    cells = [
        {"split": split, "test": test, "model": model, "seed": seed}
        for split in options.splits
        for seed in range(options.seeds)
        for test in (["own"] if split == "source" else speakers(options.folder))
        for model in options.models
    ]
    measure_missing(
        cells, lambda cell: measure(cell, options.folder, options.runs, options.epochs), options.csv, COLUMNS
    )
    print(summary(read_rows(options.csv)))


if __name__ == "__main__":
    main()

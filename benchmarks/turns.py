"""How long commands take in two trees of mixlab, in turns: `predict`, `evaluate`, and `serve` until it answers.

    python benchmarks/turns.py BEFORE AFTER [--rounds 15]

BEFORE and AFTER are checkouts (`git worktree add BEFORE COMMIT`). Each opens a run that it has trained itself. Every
figure is of whole processes; the first round, which brings files into memory, is left out. Prints the median of each,
and the median of the ratios of a round with its range. Nothing else may run meanwhile.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PORT = 18_765
COMMANDS = {
    "predict": ["predict", "RUN", "picture.png"],
    "evaluate": ["evaluate", "RUN"],
    "serve until it answers": ["serve", "RUN", "--port", str(PORT)],
}


def start(tree: Path, arguments: list[str], place: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(tree)}
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "mixlab", *arguments]
    return subprocess.Popen(command, cwd=place, env=environment, stdout=quiet, stderr=quiet)


def seconds(tree: Path, name: str, place: Path, run: Path) -> float:
    """Of one process, to its end or its first answer."""
    began = time.perf_counter()
    process = start(tree, [str(run) if word == "RUN" else word for word in COMMANDS[name]], place)
    if not name.startswith("serve"):
        if process.wait(timeout=300):
            raise SystemExit(f"{name} failed in {tree}")
        return time.perf_counter() - began
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=5).close()
                return time.perf_counter() - began
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None:
                    raise SystemExit(f"serve ended in {tree}") from None
                time.sleep(0.01)
    finally:
        process.terminate()
        process.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    trees = [options.before.resolve(), options.after.resolve()]
    with tempfile.TemporaryDirectory() as folder:
        from PIL import Image

        place = Path(folder)
        Image.new("L", (8, 8), 128).save(place / "picture.png")
        for side, tree in enumerate(trees):
            run = ["train", "digits", "--steps", "50", "--run", str(place / f"run{side}")]
            if start(tree, run, place).wait():
                raise SystemExit(f"no run could be trained in {tree}")
        taken: dict[str, list[list[float]]] = {name: [[], []] for name in COMMANDS}
        for round_ in range(options.rounds + 1):
            for name in COMMANDS:
                for side in (0, 1) if round_ % 2 else (1, 0):
                    found = seconds(trees[side], name, place, place / f"run{side}")
                    if round_:
                        taken[name][side].append(found)
    print("| command | before, s | after, s | ratio (range) |\n|---|---|---|---|")
    for name, (before, after) in taken.items():
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        shown = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {name} | {statistics.median(before):.2f} | {statistics.median(after):.2f} | {shown} |")


if __name__ == "__main__":
    main()

"""Mutated run folders against every command that opens one: what was refused, what was read, and what went wrong.

    python -m benchmarks.fuzz_runs [--cases 20000] [--seed 0] [--processes 1] [--json FILE]

Each case is a small run, finished or not, with one to three changes in config, state, manifest, log, CSV, TOML or
tensors: bytes flipped, cut or repeated, values of other types and sizes, keys gone, files that are links, pipes or
folders, with the digests that stand elsewhere put right or not. It is listed, shown in `ui`, described in a card,
used for predict, evaluated, exported (every fiftieth) and resumed, in the process itself. A right command succeeds or
raises MixlabError. A finding is any other exception, a file outside the run that changed, a file of the run that is
gone, a command of more than 20 seconds of the processor or 60 of the clock, or a peak of memory above 1.5 GB.
"""

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import mixlab
from mixlab.checkpoint.store import CONFIG_DIGEST_KEY, _config_digest
from mixlab.commands.shipping import _card
from mixlab.errors import MixlabError
from mixlab.exports.export import export
from mixlab.files import sha256
from mixlab.report.screen import Screen
from mixlab.report.tables import show_runs
from mixlab.serving.predict import load
from mixlab.serving.ui import describe_run, figures_of
from mixlab.training import fit
from mixlab.training.evaluate import evaluate
from mixlab.training.run_folder import list_runs

MAX_SECONDS, MAX_BYTES = 20.0, 1.5e9
RESUME_STEPS = 6  # that a resumed training may take before it is stopped
QUIET = Screen(quiet=True)
OPTIONS: dict[str, Any] = {
    "model__hidden_dim": 8, "model__token_mlp_dim": 4, "model__channel_mlp_dim": 8, "model__num_blocks": 1,
    "threads": 1, "epochs": None, "steps": 8, "batch_size": 16, "checkpoint_seconds": 0.0,
}  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 2**31, 2**63, 10**40, 0.0, -1.5, 1e308, 5e-324, float("nan"), float("inf"), "", "a",
    "nan", "../../x", "/etc/passwd", "\x1b[31mred", "\u202eabc", "=1+1", "a\nb", "x" * 5000, [], [1], [[1]], [None],
    {}, {"a": 1}, ["a"] * 50, [4096, 4096], [20000, 20000], [0, 0], "timm/vit_giant_patch14_224",
    "timm/resnet10t", "mixer_h14", "mixer_custom2", "mixer_pyramid_mini2", [10_000_000], "hf:x", "wds:/nowhere",
)  # fmt: skip


def make_run(folder: Path) -> Path:
    """A finished run of 12 steps on small images, with two checkpoints."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(40):
        path = folder / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    mixlab.train(str(folder / "data"), "digits", run=folder / "run", screen=QUIET, figures=False, **OPTIONS)
    (folder / "run" / "figures").mkdir(exist_ok=True)
    (folder / "run" / "figures" / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    return folder / "run"


def files_of(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        found += [(value, key), *places(value[key])]
    return found


def change_value(draw: random.Random, value: Any) -> None:
    """Replace, remove or double something in a JSON value."""
    found = places(value)
    if not found:
        return
    container, key = draw.choice(found)
    kind = draw.randrange(6)
    if kind == 0 and isinstance(container, dict):
        del container[key]
    elif kind == 1:
        deep: Any = 1
        for _ in range(draw.choice((5, 40, 900))):
            deep = [deep] if draw.random() < 0.5 else {"a": deep}
        container[key] = deep
    elif kind == 2 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
        container[key] = container[key] * draw.choice((-1, 0, 2, 0.5, 1e9, 10**12)) + draw.choice((0, 1, -1))
    elif kind == 3 and isinstance(container[key], list):
        container[key] = container[key] * draw.choice((0, 2, 50)) + draw.choice(([], [None], ["a"], [0]))
    else:
        container[key] = draw.choice(VALUES)


def change_bytes(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(changed) + 1)
        kind = draw.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + draw.choice((1, 4, 30))] = draw.randbytes(draw.choice((1, 4, 30)))
        elif kind == 2:
            del changed[place : place + draw.choice((1, 10, 200))]
        elif kind == 3:
            changed[place:place] = changed[place : place + 200] * draw.choice((1, 3, 100))
        elif kind == 4:
            del changed[place:]
        else:
            piece = (
                b"\x00",
                b'"',
                b"[",
                b"{" * 2000,
                b"1e999",
                b"NaN",
                b",,,",
                b"\n\n",
                b"\xff\xfe",
                b"a." * 3000,
            )
            changed[place:place] = draw.choice(piece)
    return bytes(changed)


def change_file(draw: random.Random, path: Path, victim: Path) -> str:
    """One change to a file of a run; what kind."""
    kind = draw.choice(("value", "value", "value", "bytes", "bytes", "node", "tensors"))
    if kind == "value" and path.suffix in (".json", ".jsonl", ".toml"):
        try:
            change_record(draw, path)
        except (ValueError, TypeError, OSError, RecursionError, OverflowError, SafetensorError):
            path.write_bytes(change_bytes(draw, path.read_bytes()))
    elif kind == "tensors" and path.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError):  # of a file that was changed before
            change_tensors(draw, path)
    elif kind == "node":
        path.unlink()
        what = draw.randrange(6)
        if what == 0:
            path.symlink_to(victim / "precious.txt")
        elif what == 1:
            os.mkfifo(path)
        elif what == 2:
            path.mkdir()
        elif what == 3:
            path.symlink_to("/dev/zero")
        elif what == 4 and path.parent.name in ("checkpoints", "figures"):
            shutil.rmtree(path.parent)
            path.parent.symlink_to(victim)
    else:
        path.write_bytes(change_bytes(draw, path.read_bytes()))
        kind = "bytes"
    return kind


def change_record(draw: random.Random, path: Path) -> None:
    import tomllib

    import tomli_w

    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change_value(draw, draw.choice(rows))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    value = tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())
    change_value(draw, value)
    path.write_text(tomli_w.dumps(value) if path.suffix == ".toml" else json.dumps(value))
    if path.name == "config.json" and draw.random() < 0.7:  # one who means it puts the digest right
        retie(path.parent / "weights.safetensors", value)


def retie(weights: Path, config: Any) -> None:
    if weights.is_file() and not weights.is_symlink():
        with safe_open(weights, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        metadata[CONFIG_DIGEST_KEY] = _config_digest(config)
        tensors = load_file(weights)
        weights.unlink()
        save_file(tensors, weights, metadata=metadata)


def change_tensors(draw: random.Random, path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = draw.choice(sorted(tensors))
    kind = draw.randrange(6)
    if kind == 0:
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    elif kind == 1:
        tensors[f"{name}.x"] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = torch.zeros((*tensors[name].shape, 2))
    elif kind == 3:
        tensors.pop(name)
    elif kind == 4:
        tensors[name] = tensors[name].to(draw.choice((torch.float16, torch.int64, torch.bool, torch.float64)))
    else:
        tensors[draw.choice(("99.exp_avg", "-1.step", "x", "0.extra", "0"))] = torch.zeros(1)
    path.unlink()
    save_file(tensors, path, metadata=metadata)


def put_right(run: Path) -> None:
    """Manifests that list what is there."""
    for manifest in run.glob("checkpoints/step_*/manifest.json"):
        if manifest.is_symlink() or not manifest.is_file():
            continue
        with contextlib.suppress(ValueError, AttributeError, OSError, RecursionError):
            listed = json.loads(manifest.read_text())
            for name in listed:
                file = manifest.parent / name
                if file.is_file() and not file.is_symlink():
                    listed[name] = {"size": file.stat().st_size, "sha256": sha256(file)}
            manifest.write_text(json.dumps(listed))


def mutate(draw: random.Random, run: Path, victim: Path) -> list[str]:
    """One to three changes; what was changed."""
    changed = []
    for _ in range(draw.randint(1, 3)):
        known = [path for path in files_of(run) if path.name not in ("report.html", ".lock")]
        named = [path for path in known if path.suffix in (".json", ".jsonl", ".toml", ".csv")]
        path = draw.choice(named if named and draw.random() < 0.7 else known)
        changed.append(f"{change_file(draw, path, victim)} {path.relative_to(run)}")
    if draw.random() < 0.1:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        changed.append("no checkpoints")
    if draw.random() < 0.7:
        put_right(run)
    return changed


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path) if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


class _Enough(Exception):  # noqa: N818
    """A resumed training went on far enough."""


def stopping(step: Callable[..., Any]) -> Callable[..., Any]:
    left = [RESUME_STEPS]

    def counted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise _Enough
        return step(*arguments, **options)

    return counted


def try_commands(run: Path, picture: Path, with_export: bool) -> dict[str, Any]:
    """Every command's outcome: `ok`, `refused`, or the traceback of what should not have happened."""
    named = str(run)
    commands: dict[str, Callable[[], Any]] = {
        "runs": lambda: show_runs(list_runs(run.parent), QUIET),
        "ui": lambda: (json.dumps(describe_run(run), allow_nan=False), figures_of(run)),
        "card": lambda: _card(named, mixlab_open(named), "not stated", None).encode("utf-8", "replace"),
        "predict": lambda: json.dumps(load(run).predict([picture]), allow_nan=False),
        "evaluate": lambda: evaluate(run, threads=1, screen=QUIET),
        "resume": lambda: mixlab.resume(run, screen=QUIET, with_pictures=False, figures=False),
    }
    if with_export:
        pixels = [np.zeros((8, 8, 3), dtype=np.uint8)]
        place = run.parent / "exported.pt2"
        commands["export"] = lambda: export(mixlab_open(named), place, to="torch-export", examples=pixels)
    found: dict[str, Any] = {}
    real, seconds = fit.train_step, {}
    for name, command in commands.items():
        fit.train_step = stopping(real)
        began = (
            time.process_time()
        )  # of a machine that others use too, the clock says little; hangs end by SIGALRM
        try:
            command()
            found[name] = "ok"
        except (MixlabError, _Enough) as error:
            found[name] = "ok" if isinstance(error, _Enough) else "refused"
        except Exception:  # the finding that this program is for
            found[name] = traceback.format_exc(limit=-6)[-1500:]
        finally:
            fit.train_step = real
        seconds[name] = time.process_time() - began
    slow = {name: f"took {took:.1f} s" for name, took in seconds.items() if took > MAX_SECONDS}
    return found | slow


def mixlab_open(name: str) -> Any:
    from mixlab.checkpoint.open import open_weights

    return open_weights(name)


def try_one(seed: int, number: int, base: Path, place: Path) -> dict[str, Any]:
    """Case `number`, which depends on (seed, number) alone: what was changed, each outcome, and findings."""
    draw = random.Random(f"{seed} {number}")
    shutil.rmtree(place, ignore_errors=True)
    run, victim = place / "runs" / "run", place / "victim"
    shutil.copytree(base / "run", run)
    victim.mkdir()
    (victim / "precious.txt").write_text("precious\n")
    (victim / ".a.1.tmp").write_text("precious\n")
    (victim / "step_00000001").mkdir()
    (victim / "step_00000001" / "precious.txt").write_text("precious\n")
    if draw.random() < 0.5:  # a run that has not ended
        log = run / "metrics.jsonl"
        rows = log.read_text().splitlines(keepends=True)
        log.write_text("".join(row for row in rows if '"end"' not in row))
        if draw.random() < 0.5:
            shutil.rmtree(run / "checkpoints" / "step_00000008")
    changed = mutate(draw, run, victim)
    before, had = snapshot(victim), {path.name for path in files_of(run)}
    weights = sha256(run / "weights.safetensors") if (run / "weights.safetensors").is_file() else None
    has_checkpoint = any(run.glob("checkpoints/step_*/manifest.json"))
    forget_peak()
    held = peak_bytes()  # a test's process may have much from before
    outcomes = try_commands(run, base / "data" / "a" / "0.png", number % 50 == 0)
    findings = {name: text for name, text in outcomes.items() if text not in ("ok", "refused")}
    if (peak := peak_bytes()) - held > MAX_BYTES / 2:
        findings["memory"] = f"{peak / 1e6:.0f} MB"
    if snapshot(victim) != before:
        findings["outside"] = "files outside the run changed"
    if {path.name for path in place.iterdir()} - {"runs", "victim"}:
        findings["outside"] = "files were written beside"
    gone = had - {path.name for path in files_of(run)}
    if gone - {".a.1.tmp"}:
        findings["lost"] = f"{sorted(gone)} are gone"
    may_change = has_checkpoint and outcomes["resume"] != "refused"
    if weights and not may_change and sha256(run / "weights.safetensors") != weights:
        findings["lost"] = "the weights were written over by a resume that was refused, or had no checkpoint"
    return {"case": number, "changed": changed, "outcomes": outcomes, "findings": findings, "peak": peak}


def forget_peak() -> None:
    """The peak of this process's memory counts from now on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def work(task: tuple[int, int, int, Path]) -> dict[str, Any]:
    """A process's share: `count` cases from `first` on."""
    seed, first, count, base = task
    faulthandler.enable()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    total: Counter[tuple[str, str]] = Counter()
    findings, peak = [], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for number in range(first, first + count):
            signal.alarm(60)
            result = try_one(seed, number, base, Path(folder) / "case")
            signal.alarm(0)
            peak = max(peak, result["peak"])
            for name, text in result["outcomes"].items():
                total[name, text if text in ("ok", "refused") else "wrong"] += 1
            if result["findings"]:
                findings.append(result)
    return {"found": dict(total), "findings": findings, "peak": peak}


def _late(*_: Any) -> None:
    raise TimeoutError("a case took more than 60 s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began, total, findings, peak = time.perf_counter(), Counter(), [], 0
    share = 100
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_run(base)
        last = options.first + options.cases
        tasks = [
            (options.seed, first, min(share, last - first), base)
            for first in range(options.first, last, share)
        ]
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            for result in pool.map(work, tasks):
                total.update(result["found"])
                findings += result["findings"]
                peak = max(peak, result["peak"])
                done = total["runs", "ok"] + total["runs", "refused"] + total["runs", "wrong"]
                took = time.perf_counter() - began
                print(
                    f"{done} cases, {len(findings)} findings, peak {peak / 1e6:.0f} MB, {took:.0f} s",
                    flush=True,
                )
                for finding in result["findings"]:
                    print(json.dumps(finding)[:3000], flush=True)
    names = sorted({name for name, _ in total})
    print("\n| command | ok | refused | wrong |\n|---|---|---|---|")
    for name in names:
        print(f"| {name} | {total[name, 'ok']} | {total[name, 'refused']} | {total[name, 'wrong']} |")
    print(
        f"\npeak memory of a process {peak / 1e6:.0f} MB ({'within' if peak <= MAX_BYTES else 'ABOVE'} 1.5 GB)"
    )
    if options.json:
        rows = [{"command": n, "outcome": o, "cases": c} for (n, o), c in sorted(total.items())]
        options.json.write_text(json.dumps({"rows": rows, "findings": findings, "peak": peak}, indent=2))


if __name__ == "__main__":
    main()

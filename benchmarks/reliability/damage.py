"""Damaged checkpoints: is every flipped bit, truncation and swapped file noticed, and the one before taken?

    python -m benchmarks.reliability.damage [--flips 5000] [--cuts 5000] [--swaps 500] [--seed 0] [--json FILE]

A folder holds two checkpoints of a small training state. Each trial damages one file of the newer: one bit flipped at
a random place; cut at a random length; or replaced by another file of this or of the older checkpoint (its manifest
too). A right loader takes the older checkpoint and names the newer one; then the file is put back.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from benchmarks.reliability.faults import example
from mixlab.checkpoint.checkpoints import load_newest_checkpoint, save_checkpoint


def damage(newer: Path, older: Path, kind: str, draw: random.Random) -> tuple[Path, bytes] | None:
    """Damage one file; the file and what was in it, or None if the two files swapped are the same."""
    file = draw.choice(sorted(newer.iterdir()))
    content = file.read_bytes()
    if kind == "flips":
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cuts":
        changed = bytearray(content[: draw.randrange(len(content))])
    else:
        others = [path for path in (*newer.iterdir(), *older.iterdir()) if path != file]
        changed = bytearray(draw.choice(sorted(others)).read_bytes())
    if changed == content:
        return None
    file.write_bytes(changed)
    return file, content


def run(folder: Path, kind: str, trials: int, seed: int) -> dict[str, object]:
    """How many of `trials` damages were noticed."""
    draw = random.Random(f"{seed} {kind}")
    old = save_checkpoint(folder, example(1))
    new = save_checkpoint(folder, example(2))
    done = noticed = 0
    missed = []
    while done < trials:
        damaged = damage(new, old, kind, draw)
        if damaged is None:
            continue
        file, content = damaged
        done += 1
        found, rejected = load_newest_checkpoint(folder)
        if found.step == 1 and len(rejected) == 1 and rejected[0].startswith(new.name):
            noticed += 1
        else:
            missed.append(file.name)
        file.write_bytes(content)
    assert load_newest_checkpoint(folder)[0].step == 2
    return {"kind": kind, "trials": done, "noticed": noticed, "missed": missed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=5000)
    parser.add_argument("--cuts", type=int, default=5000)
    parser.add_argument("--swaps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    rows = []
    for kind in ("flips", "cuts", "swaps"):
        with tempfile.TemporaryDirectory() as name:
            rows.append(run(Path(name), kind, getattr(options, kind), options.seed))
        print({key: value for key, value in rows[-1].items() if key != "missed"}, flush=True)
        if rows[-1]["missed"]:
            print("MISSED in", sorted(set(map(str, rows[-1]["missed"]))))  # type: ignore[call-overload]
    print(f"{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

"""Power loss, simulated: what was not fsynced is lost, cut, or out of order. Does a checkpoint still load?

    python -m benchmarks.reliability.power [--images 300] [--seed 0] [--json FILE]

Six saves are recorded call by call: files written, folders made, renames, removals, fsyncs. The disk is modelled as
pessimistically as POSIX allows: a file's content is safe after an fsync of the file, a name (made, renamed, removed)
after an fsync of its folder, and nothing else. An image is the disk after a power cut at a random call: of the
changes of names that were not yet safe a random subset is there; content that was not yet safe is missing, cut,
zeroed or whole. Once the first save has returned, every image must hold a checkpoint that loads, with its own
numbers, and not older than the last save that returned.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.faults import example
from mixlab.checkpoint import store
from mixlab.checkpoint.checkpoints import load_newest_checkpoint, save_checkpoint
from mixlab.errors import WeightsError

SAVES = 6
Operation = tuple[Any, ...]


@contextmanager
def recorded(operations: list[Operation]) -> Iterator[None]:
    """Note every call that changes the disk: (what, path, content or new path)."""
    opened: dict[int, str] = {}

    def watch(owner: Any, name: str, note: Callable[..., None]) -> Any:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            note(result, *arguments)
            return result

        return patch.object(owner, name, call)

    def wrote(_: Any, path: Any, *__: Any) -> None:
        operations.append(("write", str(path), Path(path).read_bytes()))

    with ExitStack() as stack:
        for context in (
            watch(Path, "mkdir", lambda _, path, *__: operations.append(("mkdir", str(path)))),
            watch(Path, "write_text", wrote),
            watch(Path, "write_bytes", wrote),
            watch(store, "save_file", lambda _, tensors, path: wrote(_, path)),
            watch(os, "open", lambda number, path, *_: opened.__setitem__(number, str(path))),
            watch(os, "fsync", lambda _, number: operations.append(("fsync", opened.get(number)))),
            watch(os, "replace", lambda _, a, b: operations.append(("replace", str(a), str(b)))),
            watch(shutil, "rmtree", lambda _, path, *__: operations.append(("remove", str(path)))),
        ):
            stack.enter_context(context)
        yield


@dataclass(eq=False)
class File:
    content: bytes
    safe: bytes | None = None

    def after_cut(self, draw: random.Random) -> bytes | None:
        if self.safe == self.content:
            return self.content
        cut = self.content[: draw.randrange(len(self.content) + 1)]
        return draw.choice([None, self.safe, b"", cut, bytes(len(self.content)), self.content])


@dataclass(eq=False)
class Folder:
    """entries: as the program sees them. safe: as they survive. pending: changes between the two, name -> node."""

    entries: dict[str, Any] = field(default_factory=dict)
    safe: dict[str, Any] = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)

    def change(self, change: dict[str, Any]) -> None:
        """Names to nodes, None for a name that goes; all of it or nothing of it survives."""
        self.pending.append(change)
        apply(self.entries, change)

    def fsync(self) -> None:
        self.safe, self.pending = dict(self.entries), []

    def after_cut(self, draw: random.Random) -> dict[str, Any]:
        found = dict(self.safe)
        for change in self.pending:
            if draw.random() < 0.5:
                apply(found, change)
        return found


def apply(entries: dict[str, Any], change: dict[str, Any]) -> None:
    for name, node in change.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class Disk:
    """The folder of a run and what is in it, as the operations leave it."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Folder()

    def find(self, path: str) -> tuple[Folder, str]:
        folder = self.top
        *parts, name = Path(path).relative_to(self.root).parts
        for part in parts:
            folder = folder.entries[part]
        return folder, name

    def do(self, operation: Operation) -> None:
        what, path, *rest = operation
        if Path(path) == self.root:
            if what == "fsync":
                self.top.fsync()
            return
        if not Path(path).is_relative_to(self.root):
            return
        folder, name = self.find(path)
        node = folder.entries.get(name)
        if what == "mkdir" and node is None:
            folder.change({name: Folder()})
        elif what == "write" and node is None:
            folder.change({name: File(rest[0])})
        elif what == "write":
            node.content = rest[0]
        elif what == "fsync" and isinstance(node, File):
            node.safe = node.content
        elif what == "fsync" and node is not None:
            node.fsync()
        elif what == "replace":
            folder.change({name: None, self.find(rest[0])[1]: node})
        elif what == "remove":
            for inner in list(node.entries):
                node.change({inner: None})
            folder.change({name: None})

    def write_image(self, target: Path, draw: random.Random) -> None:
        """The disk after a power cut now."""

        def write(folder: Folder, path: Path) -> None:
            path.mkdir()
            for name, node in folder.after_cut(draw).items():
                if isinstance(node, Folder):
                    write(node, path / name)
                elif (content := node.after_cut(draw)) is not None:
                    (path / name).write_bytes(content)

        write(self.top, target)


def record(folder: Path) -> list[Operation]:
    """The operations of SAVES saves into `folder`, with ("saved", step) where each returned."""
    operations: list[Operation] = []
    for step in range(1, SAVES + 1):
        with recorded(operations):
            save_checkpoint(folder, example(step))
        operations.append(("saved", step))
    return operations


def cut(operations: list[Operation], root: Path, target: Path, draw: random.Random) -> str:
    """Cut the power at a random operation; `ok`, or what is wrong with what is left."""
    first = operations.index(("saved", 1))
    end = draw.randrange(first + 1, len(operations) + 1)
    disk, saved = Disk(root), 0
    for operation in operations[:end]:
        if operation[0] == "saved":
            saved = operation[1]
        else:
            disk.do(operation)
    disk.write_image(target, draw)
    try:
        found, _ = load_newest_checkpoint(target / "checkpoints")
    except WeightsError:
        return "no checkpoint loads"
    values = {float(v) for group in found.tensors.values() for t in group.values() for v in t.flatten()}
    if values != {float(found.step)}:
        return f"step {found.step} loads with {values}"
    return "ok" if found.step >= saved else f"step {found.step} loads after {saved} was saved"


def run(images: int, seed: int) -> dict[str, int]:
    """How many of `images` power cuts came to what."""
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "run"
        root.mkdir()
        operations = record(root / "checkpoints")
        for number in range(images):
            target = Path(name) / f"image{number}"
            result = cut(operations, root, target, random.Random(f"{seed} {number}"))
            shutil.rmtree(target)
            counts[result] = counts.get(result, 0) + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    counts = run(options.images, options.seed)
    print(f"{options.images} power cuts, seed {options.seed}: {counts}, {time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()

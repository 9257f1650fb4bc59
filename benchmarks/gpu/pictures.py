"""Images for a machine without a network: half of CIFAR-10 in a few files, and drawn ones."""

import csv
import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mixlab.data.images.decode import decode
from mixlab.data.sources import open_source
from mixlab.errors import UsageError


def pack(source: str, out: Path, half: int) -> str:
    """Every second training image of each class as lossless WebP, CLASS/NUMBER.webp; a sentence on the result.

    source: whatever `mixlab train` takes. out: a folder, or a .zip file. half: 1 begins with the first image of
    each class, 2 with the second.
    """
    if out.exists():
        raise UsageError("this is there already", where=str(out), hint="give another name")
    opened = open_source(source)
    split = opened.splits.get("train") or opened.splits["all"]
    chosen = [
        (name, index)
        for number, name in enumerate(opened.class_names)
        for index in np.flatnonzero(split.labels == number)[half - 1 :: 2].tolist()
    ]

    def encoded(item: tuple[str, int]) -> tuple[str, bytes]:
        name, index = item
        pixels = split.arrays[index] if split.arrays is not None else decode(split.read(index))
        file = io.BytesIO()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.save(file, "WEBP", lossless=True)  # more effort takes 25 times as long and saves nothing
        return f"{name}/{index:05d}.webp", file.getvalue()

    with ThreadPoolExecutor() as pool:
        files = pool.map(encoded, chosen)
        num_bytes = _write_zip(files, out) if out.suffix == ".zip" else _write_folder(files, out)
    return f"{out}: {len(chosen):,} images, {num_bytes / 2**20:.1f} MiB"


def _write_zip(files: Iterator[tuple[str, bytes]], out: Path) -> int:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return out.stat().st_size


def _write_folder(files: Iterator[tuple[str, bytes]], out: Path) -> int:
    num_bytes = 0
    for name, content in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        num_bytes += (out / name).write_bytes(content)
    return num_bytes


def list_pictures(packed: list[Path], work: Path) -> Path:
    """A CSV file of all images in these folders and zips (unpacked in `work`); classes are folder names."""
    table = work / "pictures.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for number, place in enumerate(packed):
            folder = place
            if place.suffix == ".zip":
                folder = work / f"pictures-{number}"
                with zipfile.ZipFile(place) as archive:
                    archive.extractall(folder)
            found = sorted(path for path in folder.glob("*/*") if path.is_file())
            if not found:
                raise UsageError("there are no images in folders by class", where=str(place))
            writer.writerows((str(path), path.parent.name) for path in found)
    return table


def draw_pictures(folder: Path, *, count: int, side: int) -> Path:
    """PNG files of noise in two classes, `train` and `test`: for what only has to be computed."""
    random = np.random.default_rng(0)
    for number in range(count):
        split = "test" if number % 10 == 0 else "train"
        path = folder / split / ("one", "two")[number // 10 % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return folder

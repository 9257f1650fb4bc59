"""A set of sounds made by formula, so that the first minute and the tests need no data. It is no speech."""

from dataclasses import dataclass

import numpy as np

from mixlab.data.audio.decode import as_int16, as_wav
from mixlab.data.dataset import Source, Split
from mixlab.data.modality import Modality
from mixlab.data.random import Purpose, uniform
from mixlab.data.splits import stratified_split

RATE = 8_000
CLASS_NAMES = ("beeps", "chord", "falling", "noise", "rising", "steady", "warble", "whistle")
PER_CLASS = 75
_DRAWS = 8


@dataclass(frozen=True)
class Tones:
    """The files of the set, made when they are read. rate: samples a second."""

    rate: int = RATE
    window: int = 0
    is_checked: bool = False

    def read(self, row: int) -> bytes:
        return as_wav(tone(row, self.rate), self.rate)


def tone(row: int, rate: int) -> np.ndarray:
    """int16 (n,): clip number `row`, of class row % 8, of 0.3 to 0.6 seconds, with a little noise."""
    draws = uniform(0, 0, np.array([row]), Purpose.SPLIT, _DRAWS)[0]
    time = np.arange(round((0.3 + 0.3 * draws[0]) * rate)) / rate
    share = time / time[-1]
    low = 300 * 2 ** (1.5 * draws[1])  # 300 to 850 Hz
    far = low * 2 ** (0.6 + draws[2])
    pace = 5 + 5 * draws[3]  # times a second
    kind = CLASS_NAMES[row % len(CLASS_NAMES)]
    draw = np.random.Generator(np.random.Philox([row, 0]))
    hiss = draw.standard_normal(len(time))
    hertz = {
        "falling": far + (low - far) * share,
        "rising": low + (far - low) * share,
        "warble": low * (1 + 0.15 * np.sin(2 * np.pi * pace * time)),
        "whistle": np.full(len(time), 4 * low),
    }.get(kind, np.full(len(time), low))
    sound = np.sin(2 * np.pi * np.cumsum(hertz) / rate)
    if kind == "chord":
        sound = (sound + np.sin(2 * np.pi * low * 1.25 * time) + np.sin(2 * np.pi * low * 1.5 * time)) / 3
    elif kind == "beeps":
        sound = sound * (np.sin(2 * np.pi * pace * time) > 0)
    elif kind == "noise":
        sound = hiss / 3
    edge = np.minimum(1, np.minimum(share, 1 - share) * 20)  # no click at either end
    return as_int16(edge * (0.1 + 0.5 * draws[4]) * sound + (0.003 + 0.03 * draws[5]) * hiss)


def open_tones(modality: Modality) -> Source:
    """600 clips of eight classes, split once and for all 60/20/20."""
    count = PER_CLASS * len(CLASS_NAMES)
    labels = np.arange(count) % len(CLASS_NAMES)
    everything = Split(
        names=tuple(f"tone {i}" for i in range(count)),
        labels=labels.astype(np.int64),
        encoded=Tones(),
        rows=np.arange(count),
    )
    parts = stratified_split(everything.labels, (0.6, 0.2, 0.2), seed=0)
    splits = {name: everything.take(part) for name, part in zip(("train", "val", "test"), parts, strict=True)}
    return Source(name="tones", class_names=CLASS_NAMES, splits=splits, modality=modality)

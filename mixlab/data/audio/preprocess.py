"""From a decoded clip to the model's input: the one place where the log-mel picture is computed.

A frame is a Hann window of samples; its power spectrum is summed by triangles that are even on the mel scale, and
the logarithm of that, shifted and scaled by fixed numbers, is what a model takes. All of it is in `to_json`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlab.data.audio.config import MOST_FRAMES, MOST_SECONDS, RATES
from mixlab.data.audio.decode import FULL
from mixlab.data.modality import MOST_TOGETHER, Preprocess, View
from mixlab.errors import WeightsError
from mixlab.records import take

MOST_STRETCHES = 16  # of time, that are hidden one after another
LOWEST = 20.0  # Hz, below which there is no band
# A sine of full loudness has a power of 1; the offset is 80 dB below it, so that silence is log(1e-8) = -18.4.
LOG_OFFSET, MEAN, STD = 1e-8, -10.0, 4.0


@dataclass(frozen=True, kw_only=True)
class SoundPreprocess(Preprocess):
    """How any sound becomes the model's input. Saved with the weights; predict and export use that one.

    rate: samples a second. window, hop, fft: samples of a frame, from one frame to the next, and of its transform.
    bands: of the mel scale (HTK's), from LOWEST to half the rate. frames: of the model's input.
    tokens: `frames` gives (B, bands, 1, frames), `patches` (B, 1, bands, frames).
    max_samples: of a clip that are kept. log_offset, mean, std: (log(power + log_offset) - mean) / std.

    Kept: int16 (max_samples,), a clip from its beginning, then zeros. Zeros at the end are what is not there: a
    model sees them as silence, and no mask tells it of them.
    """

    rate: int
    window: int
    hop: int
    fft: int
    bands: int
    frames: int
    max_samples: int
    tokens: Literal["frames", "patches"] = "frames"
    log_offset: float = LOG_OFFSET
    mean: float = MEAN
    std: float = STD

    modality_name: ClassVar[str] = "sounds"
    kept_dtype: ClassVar[Any] = np.int16
    graph_input: ClassVar[str] = "waveform"

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.bands if self.tokens == "frames" else 1

    @property
    def input_size(self) -> tuple[int, int]:
        return (1 if self.tokens == "frames" else self.bands, self.frames)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        return (self.max_samples,)

    @property
    def length(self) -> int:
        """Samples of the model's input."""
        return self.window + (self.frames - 1) * self.hop

    def keep(self, example: np.ndarray) -> np.ndarray:
        """int16 (n,) at the model's rate -> int16 (max_samples,)."""
        kept = np.zeros(self.max_samples, dtype=np.int16)
        part = example[: self.max_samples]
        kept[: len(part)] = part
        return kept

    def to_input(self, kept: Tensor) -> Tensor:
        """int16 (B, n) -> float32 (B, channels, *input_size): of clips not of the model's length the middle part."""
        if kept.shape[1] != self.length:
            kept = cut(kept, (clip_lengths(kept) - self.length).div(2, rounding_mode="floor"), self.length)
        hann, mel = _kernels(self, kept.device)
        framed = (kept.float() / FULL).unfold(1, self.window, self.hop) * hann
        spectrum = torch.fft.rfft(framed, n=self.fft)
        return self.scaled(spectrum.real.square() + spectrum.imag.square(), mel)

    def windows(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """Clips longer than the model's input in windows that overlap by half, the rest in its middle."""
        parts, owner = self._windows(kept)
        # A few at a time: the frames of a second of sound take fifty times its memory.
        return torch.cat([self.to_input(some) for some in parts.split(MOST_TOGETHER)]), owner

    def _windows(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        starts, owner = self._starts(kept)
        return cut(kept if owner is None else kept[owner], starts, self.length), owner

    def _starts(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """The first sample of each window, below 0 where a clip is shorter; and the windows' owners."""
        lengths, own = clip_lengths(kept), self.length
        spare = (lengths - own).clamp(min=0)
        counts = 1 + (spare + own // 2 - 1).div(max(own // 2, 1), rounding_mode="floor")
        if int(counts.max()) == 1:
            return (lengths - own).div(2, rounding_mode="floor"), None
        owner = torch.arange(len(kept), device=kept.device).repeat_interleave(counts)
        number = torch.arange(len(owner), device=kept.device) - (counts.cumsum(0) - counts)[owner]
        starts = (number * spare[owner]).div((counts[owner] - 1).clamp(min=1), rounding_mode="floor")
        starts = torch.where(counts[owner] == 1, (lengths - own).div(2, rounding_mode="floor")[owner], starts)
        return starts, owner

    def facts(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "seconds": self.length / self.rate,
            "max_seconds": self.max_samples / self.rate,
            "bands": self.bands,
            "frames": self.frames,
        }

    def view(self, kept: Tensor) -> View:
        """The log-mel picture of all that is heard: a shorter clip with the silence round it, a longer one whole."""
        frames, begin = self._span(kept)
        whole = replace(self, frames=frames)
        span = cut(kept[None], torch.tensor([begin]), whole.length)
        picture = self.render_input(whole.to_input(span))[0]
        return View(picture, (1, min(MOST_STRETCHES, self.frames)), whole.length / self.rate)

    def hidden(self, kept: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Stretches of frames at 0, as training blanks them (SpecAugment), in every window that has some of one."""
        frames, begin = self._span(kept)
        starts, _ = self._starts(kept[None])
        inputs, _ = self.windows(kept[None])
        firsts = (starts - begin).div(self.hop, rounding_mode="floor").tolist()
        edges = np.linspace(0, frames, min(MOST_STRETCHES, self.frames) + 1).round().astype(int)
        found = inputs.repeat(len(parts), 1, 1, 1)
        for number, part in enumerate(parts):
            for window, first in enumerate(firsts):
                low, high = (min(max(edge - first, 0), self.frames) for edge in edges[part : part + 2])
                found[number * len(inputs) + window, ..., low:high] = 0.0
        return found, torch.arange(len(parts), device=kept.device).repeat_interleave(len(inputs))

    def _span(self, kept: Tensor) -> tuple[int, int]:
        """Frames of the picture of a clip, and the sample with which the first begins."""
        spare = int(clip_lengths(kept[None])) - self.length
        more = -(-max(spare, 0) // self.hop)
        return self.frames + more, min(spare, 0) // 2

    def to_graph(self, kept: np.ndarray) -> np.ndarray:
        """(n, max_samples) -> all windows of them, int16 (m, length)."""
        return self._windows(torch.from_numpy(np.ascontiguousarray(kept)))[0].numpy()

    def in_graph(self) -> "LogMel":
        return LogMel(self)

    def scaled(self, power: Tensor, mel: Tensor) -> Tensor:
        """(B, frames, fft // 2 + 1) -> the input."""
        # log(power + offset), so written that no exporter takes a sum with 1e-8 for one with nothing.
        loudness = (power @ mel / self.log_offset + 1).log() + math.log(self.log_offset)
        picture = (loudness - self.mean) / self.std
        return picture.transpose(1, 2).unsqueeze(2 if self.tokens == "frames" else 1).contiguous()

    def render_input(self, inputs: Tensor) -> list[np.ndarray]:
        """Log-mel pictures, uint8 (bands, frames, 1): time to the right, high tones above, loud is bright."""
        rows = inputs.flatten(1, 2).flip(1).float()
        silence = (np.log(self.log_offset) - self.mean) / self.std
        loudest = -self.mean / self.std  # of a sine
        grey = 255 * (rows - silence) / (loudest - silence)
        return list(grey.round().clamp(0, 255).to(torch.uint8)[..., None].cpu().numpy())

    def to_json(self) -> dict[str, Any]:
        return {"modality": self.modality_name} | asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str = "config.json") -> "SoundPreprocess":
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names))
            raise WeightsError(
                f"the stored preprocess has missing or unknown keys: {wrong[:200]}", where=where
            )
        rate = take(values, "rate", int, where, low=RATES[0], high=RATES[1])
        window = take(values, "window", int, where, low=2, high=rate)
        tokens = take(values, "tokens", str, where)
        if tokens not in ("frames", "patches"):
            raise WeightsError(f"the stored preprocess has unknown tokens: {tokens[:60]!r}", where=where)
        found = cls(
            rate=rate,
            window=window,
            hop=take(values, "hop", int, where, low=1, high=rate),
            fft=take(values, "fft", int, where, low=window, high=2**17),
            bands=take(values, "bands", int, where, low=1, high=512),
            frames=take(values, "frames", int, where, low=1, high=MOST_FRAMES),
            max_samples=take(values, "max_samples", int, where, low=1, high=int(MOST_SECONDS * RATES[1])),
            tokens=tokens,
            log_offset=take(values, "log_offset", float, where, low=1e-30, high=1e6),
            mean=take(values, "mean", float, where, low=-1e6, high=1e6),
            std=take(values, "std", float, where, low=1e-6, high=1e6),
        )
        if found.length > found.max_samples:
            raise WeightsError(
                f"the input takes {found.length} samples and only {found.max_samples} are kept", where=where
            )
        return found


class LogMel(nn.Module):
    """int16 (B, length) -> the model's input, with the transform as a convolution with cosines and sines."""

    waves: Tensor
    mel: Tensor

    def __init__(self, preprocess: SoundPreprocess) -> None:
        super().__init__()
        self.preprocess = preprocess
        hann, mel = _kernels(preprocess, torch.device("cpu"))
        fft = preprocess.fft
        angles = torch.arange(fft // 2 + 1)[:, None] * torch.arange(preprocess.window) % fft
        angles = 2 * torch.pi / fft * angles.double()
        self.register_buffer("waves", (torch.cat([angles.cos(), angles.sin()]) * hann).float()[:, None])
        self.register_buffer("mel", mel)

    def forward(self, waveform: Tensor) -> Tensor:
        parts = F.conv1d(waveform.float()[:, None] / FULL, self.waves, stride=self.preprocess.hop)
        real, imag = parts.chunk(2, dim=1)
        return self.preprocess.scaled((real * real + imag * imag).transpose(1, 2), self.mel)


def clip_lengths(kept: Tensor) -> Tensor:
    """int64 (B,): samples up to the last that is not zero, at least 1."""
    sounds = kept != 0
    last = kept.shape[1] - sounds.flip(1).to(torch.uint8).argmax(1)
    return torch.where(sounds.any(1), last, 1)


def cut(kept: Tensor, starts: Tensor, length: int) -> Tensor:
    """(B, n) -> (B, length): each row from its start, which may be below 0; outside there are zeros."""
    places = starts[:, None] + torch.arange(length, device=kept.device)
    inside = (places >= 0) & (places < kept.shape[1])
    return kept.gather(1, places.clamp(0, kept.shape[1] - 1)) * inside


def _kernels(own: SoundPreprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    hann, mel = _made(own.rate, own.window, own.fft, own.bands)
    return hann.to(device), mel.to(device)


@lru_cache(maxsize=8)
def _made(rate: int, window: int, fft: int, bands: int) -> tuple[Tensor, Tensor]:
    """The window, so scaled that a sine of full loudness has a power of 1; the triangles (fft // 2 + 1, bands)."""
    places = np.arange(window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * places / window)
    edges = _hertz(np.linspace(_mel(LOWEST), _mel(rate / 2), bands + 2))
    tones = np.arange(fft // 2 + 1)[:, None] * rate / fft
    rising = (tones - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - tones) / (edges[2:] - edges[1:-1])
    mel = np.minimum(rising, falling).clip(min=0)
    return torch.from_numpy(2 * hann / hann.sum()).float(), torch.from_numpy(mel).float()


def is_band_empty(rate: int, window: int, fft: int, bands: int) -> bool:
    """Whether a band has no tone of the transform in it, so that it would always be silent."""
    return bool((_made(rate, window, fft, bands)[1].sum(0) == 0).any())


def _mel(hertz: float) -> float:
    return 2595 * np.log10(1 + hertz / 700)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)

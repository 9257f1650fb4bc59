"""Training-time changes to whole batches of sounds; every draw is keyed by (seed, epoch, index, purpose).

Shapes: kept int16 (B, n), clips and the zeros after them; epoch one integer; index int64 (B,), the clips' numbers.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.data.audio.config import AudioConfig
from mixlab.data.audio.decode import SOUND_SUFFIXES, decode, resample
from mixlab.data.audio.preprocess import clip_lengths
from mixlab.data.modality import read_example_file
from mixlab.data.random import Purpose, uniform
from mixlab.errors import ExampleError, UsageError

QUIET, LOUD = 30.0, 5.0  # dB that noise is below the clip
DRAWN_SAMPLES = 2**18  # of each colour of noise
MOST_NOISE = 2**25  # samples of a folder that are kept


def augment(
    kept: Tensor, config: AudioConfig, length: int, rate: int, *, seed: int, epoch: int, index: np.ndarray
) -> Tensor:
    """int16 (B, n) -> int16 (B, length): the clips cut or moved, faster or slower, and with noise."""
    sound = moved(kept, uniform(seed, epoch, index, Purpose.CROP, 2), config, length)
    if config.noise:
        draws = uniform(seed, epoch, index, Purpose.POLICY, 3)
        sound = with_noise(sound, draws, config.noise, noise_bank(config.noise_folder, rate))
    return sound.round().clamp(-32768, 32767).to(torch.int16)


def moved(kept: Tensor, draws: np.ndarray, config: AudioConfig, length: int) -> Tensor:
    """float32 (B, length): a part of each clip. draws: (B, 2), for its place and its speed.

    A clip longer than the model is cut at random; a shorter one lies in the middle, moved by up to `shift`.
    Between samples it is a straight line, which takes something off the highest tones.
    """
    place, pace = (torch.from_numpy(column) for column in draws.T)
    speed = 1 + (2 * pace - 1) * config.speed
    spare = clip_lengths(kept) / speed - length  # in samples of the result, as all below
    starts = torch.where(spare > 0, place * spare, spare / 2 + (2 * place - 1) * config.shift * length)
    if not config.speed:
        starts = starts.floor()  # whole samples: nothing is lost
    # In float64: late in a long clip a place takes the digits that its share needs.
    places = (starts[:, None] + torch.arange(length)) * speed[:, None]
    before = places.floor()
    share = (places - before).float()
    padded = F.pad(kept, (1, 2))  # so that what is outside is zero
    at = (before.long() + 1).clamp(0, kept.shape[1] + 1)
    left = padded.gather(1, at).float()
    if not config.speed:
        return left
    return torch.lerp(left, padded.gather(1, at + 1).float(), share)


def with_noise(sound: Tensor, draws: np.ndarray, probability: float, bank: Tensor) -> Tensor:
    """float32 (B, length) with noise in some. draws: (B, 3), for whether, how loud, and which part of the bank."""
    chosen = torch.from_numpy(np.flatnonzero(draws[:, 0] < probability))
    if not len(chosen):
        return sound
    below, where = (torch.from_numpy(draws[:, column])[chosen] for column in (1, 2))
    clips = sound[chosen]
    # Of the clip alone, whatever silence is round it.
    loudness = clips.square().sum(1) / (clips != 0).sum(1).clamp(min=1)
    level = loudness.sqrt() * 10 ** (-(LOUD + below * (QUIET - LOUD)) / 20)
    starts = (where * len(bank)).long()
    noise = bank[(starts[:, None] + torch.arange(sound.shape[1])) % len(bank)]
    return sound.index_copy(0, chosen, clips + level.float()[:, None] * noise)


@lru_cache(maxsize=2)
def noise_bank(folder: str | None, rate: int) -> Tensor:
    """float32 (n,) of loudness 1: the sounds in a folder one after the other, or white, pink and brown noise."""
    if folder is None:
        draw = np.random.Generator(np.random.Philox(0))
        spectrum = np.fft.rfft(draw.standard_normal(DRAWN_SAMPLES))
        slope = np.maximum(np.arange(len(spectrum)), 20.0)
        parts = [np.fft.irfft(spectrum / slope**power) for power in (0.0, 0.5, 1.0)]
    else:
        parts = []
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix.lower() in SOUND_SUFFIXES and sum(map(len, parts)) < MOST_NOISE:
                try:
                    clip = decode(read_example_file(path))
                except ExampleError as error:
                    raise UsageError(error.message, where=f"audio.noise_folder, {path}") from None
                sound = resample(clip.samples, clip.rate, rate).astype(np.float64)
                if sound.any():  # not where all of it is above what this rate holds
                    parts.append(sound)
        if not parts:
            raise UsageError("there are no sounds in this folder", where=f"audio.noise_folder {folder}")
    return torch.from_numpy(np.concatenate([part / np.sqrt(np.mean(part**2)) for part in parts])).float()


def masked(inputs: Tensor, draws: np.ndarray, config: AudioConfig) -> Tensor:
    """Inputs (B, bands, 1, frames) or (B, 1, bands, frames) with stretches at 0, the middle of what inputs are.

    draws: (B, 2 * (time_masks + band_masks)), for the width and the place of each.
    """
    picture = inputs.flatten(1, 2)
    draws = draws.reshape(len(draws), -1, 2)
    times, bands = draws[:, : config.time_masks], draws[:, config.time_masks :]
    blank = _stretches(times, picture.shape[2], config.time_mask)[:, None, :]
    blank = blank | _stretches(bands, picture.shape[1], config.band_mask)[:, :, None]
    return picture.masked_fill(blank, 0.0).view_as(inputs)


def _stretches(draws: np.ndarray, size: int, share: float) -> Tensor:
    """bool (B, size): where one of the stretches lies. draws: (B, m, 2)."""
    widths = np.floor(draws[..., 0] * (round(share * size) + 1))
    starts = np.floor(draws[..., 1] * (size - widths + 1))
    places = np.arange(size)
    inside = (places >= starts[..., None]) & (places < (starts + widths)[..., None])
    return torch.from_numpy(inside.any(axis=1))

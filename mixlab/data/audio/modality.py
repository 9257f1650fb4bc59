"""Sounds as a modality: any sound file to samples at the model's rate, to its input, and back to look at."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mixlab.data.audio.augment import augment, masked, noise_bank
from mixlab.data.audio.config import MOST_SECONDS, AudioConfig, frame_samples, num_frames, num_samples
from mixlab.data.audio.decode import (
    FOREIGN_SUFFIXES,
    SOUND_SUFFIXES,
    Clip,
    as_wav,
    decode,
    resample,
    sound_format,
)
from mixlab.data.audio.preprocess import SoundPreprocess, is_band_empty
from mixlab.data.audio.tones import open_tones, tone
from mixlab.data.dataset import Source
from mixlab.data.modality import Look, Modality, Needs, Preprocess, Program, array_digest
from mixlab.data.random import Purpose, uniform
from mixlab.errors import ExampleError, UsageError

HIGHEST_RATE = 16_000  # of those that follow from the data: what speech needs
LONGEST_SECONDS = 4.0  # of a model's input that follows from the data
LONGEST_KEPT = 20.0
LONGEST_PLAYED = 5.0  # in a report, which holds its sounds itself
SAMPLE_SIZE = 256  # clips looked at to learn rate and length


class Sounds(Modality):
    """Decoded: int16 (n,), one channel at the model's rate. Kept: int16 (max_samples,), zeros after the clip."""

    name, one, many = "sounds", "sound", "sounds"
    suffixes = SOUND_SUFFIXES
    foreign_suffixes = FOREIGN_SUFFIXES
    part = "audio"
    column, column_names = "Audio", ("audio", "sound", "speech", "wav", "flac")
    recipes = ("small_sounds", "small_sounds")
    # As Speech Commands has them.
    split_lists: ClassVar[Mapping[str, str]] = {"validation_list.txt": "val", "testing_list.txt": "test"}
    beside = frozenset(("_background_noise_",))
    program = Program("standalone_sound.py", ("numpy", "onnxruntime"), "clip.wav")
    repair = "does the file play? Save it again as WAV or FLAC, and send that"
    preprocess_type = SoundPreprocess

    def claims(self, start: bytes) -> bool:
        return sound_format(start) is not None

    def decode(self, content: bytes, preprocess: Any = None) -> np.ndarray:
        """int16 (n,) at the rate of `preprocess`, else at the file's own."""
        return _at_rate(decode(content), preprocess)

    def look(self, content: bytes, preprocess: Any = None) -> Look:
        """The digest is of the file's own samples, whatever the rate. fact: its seconds, if not all is kept."""
        clip = decode(content)
        samples = _at_rate(clip, preprocess)
        is_cut = preprocess is not None and len(samples) > preprocess.max_samples
        return Look(samples, array_digest(clip.samples), clip.seconds if is_cut else None)

    def suffix_of(self, content: bytes) -> str:
        return (sound_format(content[:16]) or "wav").lower()

    def resolve(self, data: Any, settings: Any, train: Any, needs: Needs) -> tuple[Any, Any]:
        _check_keys(data)
        if settings.noise_folder is not None:
            settings = replace(
                settings, noise_folder=os.path.abspath(os.path.expanduser(settings.noise_folder))
            )
        if None in (settings.rate, settings.seconds, settings.max_seconds):
            settings = _as_heard(settings, _look_at(train))
        size = _size(settings)
        if data.image_size not in (None, size):
            raise UsageError(
                f"it is {data.image_size[0]}x{data.image_size[1]}, and follows from audio.seconds, audio.bands and "
                f"audio.tokens: {size[0]}x{size[1]}",
                where="data.image_size",
                hint="leave it out",
            )
        channels = settings.bands if settings.tokens == "frames" else 1
        if data.channels not in (None, channels):
            raise UsageError(
                f"they follow from audio.bands and audio.tokens: {channels}, not {data.channels}",
                where="data.channels",
                hint="leave it out",
            )
        if settings.noise:
            noise_bank(settings.noise_folder, settings.rate)  # what is wrong with it is said before training
        return replace(data, image_size=size, channels=channels), settings

    def preprocess(self, data: Any, settings: Any) -> SoundPreprocess:
        window, hop = frame_samples(settings.rate)
        frames = num_frames(settings.seconds, settings.rate)
        fft = 1 << (window - 1).bit_length()
        if is_band_empty(settings.rate, window, fft, settings.bands):
            fft *= 2
        if is_band_empty(settings.rate, window, fft, settings.bands):
            raise UsageError(
                f"some of {settings.bands} bands would be narrower than what can be told apart at "
                f"{settings.rate} samples a second",
                where="audio.bands",
                hint="take fewer",
            )
        length = num_samples(frames, settings.rate)
        return SoundPreprocess(
            rate=settings.rate,
            window=window,
            hop=hop,
            fft=fft,
            bands=settings.bands,
            frames=frames,
            max_samples=max(round(settings.max_seconds * settings.rate), length),
            tokens=settings.tokens,
        )

    def learn(self, data: Any, facts: Sequence[Any]) -> tuple[Any, str | None]:
        if not facts:
            return data, None
        return data, (
            f"{len(facts):,} sounds are longer than what is heard of one, the longest {max(facts):,.1f} s "
            "(--audio.max-seconds)"
        )

    def start_from(self, data: Any, settings: Any, preprocess: Preprocess) -> tuple[Any, Any]:
        """Rate, bands and tokens are the weights'; another length is a model of another grid."""
        if not isinstance(preprocess, SoundPreprocess):
            return super().start_from(data, settings, preprocess)
        for key in ("rate", "bands", "tokens"):
            given, usual = getattr(settings, key), getattr(AudioConfig(), key)
            if given not in (usual, getattr(preprocess, key)):
                raise UsageError(
                    f"the weights have {getattr(preprocess, key)}, not {given}",
                    where=f"audio.{key}",
                    hint="leave it out",
                )
        settings = replace(
            settings,
            rate=preprocess.rate,
            bands=preprocess.bands,
            tokens=preprocess.tokens,
            seconds=settings.seconds or preprocess.length / preprocess.rate,
            max_seconds=settings.max_seconds
            or max(preprocess.max_samples / preprocess.rate, settings.seconds or 0.0),
        )
        return replace(data, image_size=_size(settings), channels=preprocess.channels), settings

    def augment(self, kept: Tensor, settings: Any, *, seed: int, epoch: int, index: np.ndarray) -> Tensor:
        length = num_samples(num_frames(settings.seconds, settings.rate), settings.rate)
        return augment(kept, settings, length, settings.rate, seed=seed, epoch=epoch, index=index)

    def augment_input(
        self, inputs: Tensor, settings: Any, *, seed: int, epoch: int, index: np.ndarray
    ) -> Tensor:
        num_masks = settings.time_masks + settings.band_masks
        if not num_masks:
            return inputs
        return masked(inputs, uniform(seed, epoch, index, Purpose.ERASE, 2 * num_masks), settings)

    def describe(self, content: bytes | None, look: Look) -> dict[str, Any]:
        assert content is not None, "no source has sounds in memory"
        clip = decode(content)
        return {"seconds": clip.seconds, "rate": clip.rate, "channels": clip.channels, "format": clip.format}

    def summarize(self, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """seconds: min, median and max; rates, channels, formats: how many sounds have each."""
        if not facts:
            return {}
        seconds = [fact["seconds"] for fact in facts]
        return {
            "seconds": {"min": min(seconds), "median": float(np.median(seconds)), "max": max(seconds)},
            **{
                name: dict(Counter(str(fact[key]) for fact in facts).most_common())
                for name, key in (("rates", "rate"), ("channels", "channels"), ("formats", "format"))
            },
        }

    def playable(self, example: np.ndarray, preprocess: Any) -> tuple[str, bytes] | None:
        """The first LONGEST_PLAYED seconds."""
        return "audio/wav", as_wav(example[: round(LONGEST_PLAYED * preprocess.rate)], preprocess.rate)

    def probe(self, preprocess: Any) -> bytes:
        return as_wav(np.array([1, -1], dtype=np.int16), preprocess.rate)

    def samples(self, count: int, preprocess: Any) -> list[np.ndarray]:
        """Synthetic tones."""
        return [tone(row, preprocess.rate) for row in range(count)]


SOUNDS = Sounds()
EMBEDDED: dict[str, Callable[[], Source]] = {"tones": lambda: open_tones(SOUNDS)}


def _at_rate(clip: Clip, preprocess: Any) -> np.ndarray:
    if preprocess is None:
        return clip.samples
    samples = resample(clip.samples, clip.rate, preprocess.rate)
    if samples.min() == samples.max():
        raise ExampleError(f"silent at {preprocess.rate:,} samples a second: all of it is in higher tones")
    return samples


def _check_keys(data: Any) -> None:
    """UsageError for keys that say how an image is brought to a model."""
    usual = type(data)()
    for key in ("fit", "crop_fraction", "interpolation", "mean", "std", "grey_max", "permutation"):
        if getattr(data, key) != getattr(usual, key):
            raise UsageError(
                "this is for images, and the data has sounds", where=f"data.{key}", hint="leave it out"
            )


def _look_at(train: Any) -> list[Clip]:
    """Some of the clips, evenly from the split; of a stream, whose middle is far away, the first."""
    is_stream = train.encoded is not None and train.encoded.window > 0
    step = 1 if is_stream else max(len(train) // SAMPLE_SIZE, 1)
    clips = []
    for index in range(0, len(train), step)[:SAMPLE_SIZE]:
        try:
            clips.append(decode(train.read(index)))
        except ExampleError:
            continue
    return clips


def _as_heard(settings: AudioConfig, clips: list[Clip]) -> AudioConfig:
    """The settings with rate and lengths that suit these clips: nearly all of them fit into the model whole."""
    rates = Counter(clip.rate for clip in clips).most_common(1)
    rate = settings.rate or min(rates[0][0] if rates else HIGHEST_RATE, HIGHEST_RATE)
    lengths = [clip.seconds for clip in clips] or [1.0]
    wanted = settings.seconds or min(float(np.quantile(lengths, 0.95)), LONGEST_SECONDS)
    seconds = num_samples(num_frames(wanted, rate), rate) / rate
    at_most = settings.max_seconds
    if at_most is not None and at_most >= wanted:
        at_most = max(at_most, seconds)  # whole frames may be somewhat longer than what was wanted
    longest = min(max(max(lengths), 2 * seconds), LONGEST_KEPT)
    return replace(
        settings,
        rate=rate,
        seconds=round(seconds, 6),
        max_seconds=at_most or round(min(max(longest, seconds), MOST_SECONDS), 6),
    )


def _size(settings: AudioConfig) -> tuple[int, int]:
    assert settings.seconds is not None
    assert settings.rate is not None
    frames = num_frames(settings.seconds, settings.rate)
    return (1 if settings.tokens == "frames" else settings.bands, frames)

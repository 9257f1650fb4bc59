"""From the bytes of a sound file to one channel of 16-bit samples, and to another sampling rate."""

import io
import wave
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from mixlab.errors import ExampleError, UsageError
from mixlab.words import install_hint

SOUND_SUFFIXES = frozenset(
    (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")
)
# By name; no library here reads them.
FOREIGN_SUFFIXES = frozenset((".m4a", ".aac", ".wma", ".amr", ".3gp", ".caf"))
MOST_VALUES = (
    2**25
)  # samples of all channels in a file: some ten minutes of music, which decoded take 128 MiB
RATES = (1_000, 768_000)  # samples a second that a file may have
LOUDEST = 8.0  # of samples that are fractions of 1: mixes go somewhat above 1, other scales far above
FULL = 32768.0  # what a sample of 1.0 is in 16 bits
_UNKNOWN_SIZE = 0x7FFF0000  # programs that write a stream name a size from here on
_FEWEST = 0.95  # of the samples that a header states; of some MP3 files that is an estimate


@dataclass(frozen=True)
class Clip:
    """Decoded: samples int16 (n,), one channel at the file's own rate. channels, format: as the file had them."""

    samples: np.ndarray
    rate: int
    channels: int
    format: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def sound_format(start: bytes) -> str | None:
    """What sound file begins with these bytes (16 are enough); None for anything else."""
    if start[:4] in (b"RIFF", b"RIFX", b"RF64") and start[8:12] == b"WAVE":
        return "WAV"
    if start[:4] == b"FORM" and start[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    for signature, name in ((b"fLaC", "FLAC"), (b"OggS", "OGG"), (b"ID3", "MP3"), (b".snd", "AU")):
        if start.startswith(signature):
            return name
    # A frame of MPEG audio: eleven bits set, then a version and a layer that exist. Layer I, which no program writes,
    # would begin as text in UTF-16 does.
    is_mpeg = len(start) > 2 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0
    if is_mpeg and start[1] & 0x18 != 0x08 and start[1] & 0x06 in (2, 4) and start[2] & 0xF0 != 0xF0:
        return "MP3"
    return None


def decode(content: bytes) -> Clip:
    """A sound file's bytes as a `Clip`. ExampleError if they are none, are cut off, or hold nothing to be heard.

    Plain 16-bit WAV is read without any library; the rest needs soundfile (UsageError where it is missing).
    """
    if not content:
        raise ExampleError("empty: the file has no bytes")
    size = _stated_size(content)
    if size > len(content) + 1:
        raise ExampleError(f"cut off: {len(content):,} bytes of {size:,}")
    clip = _plain_wav(content) or _by_library(content)
    if not RATES[0] <= clip.rate <= RATES[1]:
        raise ExampleError(f"damaged: {clip.rate:,} samples a second, not {RATES[0]:,} to {RATES[1]:,}")
    if not len(clip.samples):
        raise ExampleError("empty: there is no sample in it")
    if clip.samples.min() == clip.samples.max():
        raise ExampleError("silent: all samples are the same")
    return clip


def _stated_size(content: bytes) -> int:
    """Bytes that the file should have by its own header; 0 where it does not say."""
    start = content[:4]
    if start == b".snd":
        before, size = (int.from_bytes(content[at : at + 4], "big") for at in (4, 8))
    elif start in (b"RIFF", b"RIFX", b"FORM"):
        before, size = 8, int.from_bytes(content[4:8], "little" if start == b"RIFF" else "big")
    else:
        return 0
    return before + size if 0 < size < _UNKNOWN_SIZE else 0


def _plain_wav(content: bytes) -> Clip | None:
    """A WAV file of 16 bits without compression; None for any other file."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            channels, rate = file.getnchannels(), file.getframerate()
            if file.getsampwidth() != 2 or not channels or not rate:
                return None
            _check_size(min(file.getnframes() * channels, len(content) // 2))  # of a stream there are fewer
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return None
    values = np.frombuffer(raw[: len(raw) // (2 * channels) * 2 * channels], dtype="<i2").reshape(
        -1, channels
    )
    mono = values[:, 0] if channels == 1 else np.rint(values.mean(axis=1))
    return Clip(mono.astype(np.int16), rate, channels, "WAV")


def _by_library(content: bytes) -> Clip:
    name = sound_format(content[:16])
    soundfile = _soundfile(name)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_size(file.frames * file.channels)
            values = file.read(dtype="float32", always_2d=True)
            rate, channels, name, stated = file.samplerate, file.channels, file.format, file.frames
    except (soundfile.LibsndfileError, RuntimeError, ValueError, MemoryError) as error:
        said = str(error).rpartition(": ")[2].strip() or type(error).__name__
        raise ExampleError(f"damaged: {name} that cannot be read ({said[:120]})") from None
    if len(values) < _FEWEST * stated:
        raise ExampleError(f"cut off: {len(values):,} samples of {stated:,}")
    if not np.isfinite(values).all():
        raise ExampleError("damaged: some samples are no numbers")
    peak = float(np.abs(values).max(initial=0))
    if peak > LOUDEST:
        raise ExampleError(
            f"samples of up to {peak:,.0f}, where 1 is the loudest: divide them, or save it with 16 bits"
        )
    return Clip(as_int16(values.mean(axis=1)), rate, channels, name)


def _soundfile(format: str | None) -> Any:
    if format is None:
        raise ExampleError("no sound file of a known kind (WAV, FLAC, OGG, MP3, AIFF, AU)")
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without its C library
        raise UsageError(
            f"reading {format} files needs the package soundfile", hint=install_hint("audio")
        ) from None
    return soundfile


def _check_size(num_values: int) -> None:
    if num_values > MOST_VALUES:
        raise ExampleError(f"too long: {num_values:,} samples, more than {MOST_VALUES:,}; cut it into parts")


def as_int16(values: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as 16 bits, what is louder clipped."""
    return np.rint(values * FULL).clip(-32768, 32767).astype(np.int16)


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """int16 (n,) at another rate, by SciPy's polyphase filter: (ceil(n * wanted / rate),)."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly  # half a second to import, and seldom needed

    shared = gcd(rate, wanted)
    return as_int16(resample_poly(samples.astype(np.float64) / FULL, wanted // shared, rate // shared))


def as_wav(samples: np.ndarray, rate: int) -> bytes:
    """int16 (n,) as a WAV file of one channel."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()

"""The part of a recipe for sounds: what a model hears of a clip, and how training changes it."""

import math
from dataclasses import dataclass
from typing import Literal

from mixlab.errors import UsageError
from mixlab.settings import setting

WINDOW_SECONDS, HOP_SECONDS = 0.030, 0.010  # of a frame, and from one to the next
RATES = (4_000, 48_000)
MOST_SECONDS = 120.0
MOST_FRAMES = 4096
MOST_HEARD = MOST_FRAMES * HOP_SECONDS + WINDOW_SECONDS  # at once
UNIT = 8  # frames come in multiples of it, so that square patches fit


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """What a model hears, and what training does to its sounds. None follows from the data.

    rate: samples a second; files of other rates are resampled. seconds: length of the model's input, rounded to
        whole frames. max_seconds: of a longer clip no more than that is heard; what is between the two is cut at
        random in training, and covered by windows in prediction.
    bands: of the mel scale. tokens: a frame with all its bands is one token, or square patches of the picture are.
    shift: move a clip by up to this share of the input. speed: play it by up to this share faster or slower.
    noise: probability of background noise, 5 to 30 dB below the clip, from the files in noise_folder, else drawn.
    time_masks, band_masks: how many stretches of frames and of bands are blanked, each of up to time_mask and
        band_mask of all (Park et al. 2019, SpecAugment).
    """

    rate: int | None = setting(
        None, "Samples a second that a model hears; auto is the files' own, at most 16,000."
    )
    seconds: float | None = setting(
        None, "Length of sound that a model hears at once; auto follows from the data.", "common"
    )
    max_seconds: float | None = setting(
        None, "Of longer sounds only so much is heard; auto follows from the data."
    )
    bands: int = setting(40, "Bands of the mel scale.")
    tokens: Literal["frames", "patches"] = setting(
        "frames", "What is a token: a frame of sound, or a square patch of its log-mel picture."
    )
    shift: float = setting(0.0, "Move sounds in time by up to this share of the model's length.", "common")
    speed: float = setting(0.0, "Play sounds faster or slower by up to this share.", "common")
    noise: float = setting(0.0, "Probability of background noise.", "common")
    noise_folder: str | None = setting(
        None, "Take the noise from the files in this folder instead of drawing it."
    )
    time_masks: int = setting(0, "How many stretches of time are blanked.")
    time_mask: float = setting(0.25, "Longest of them, as a share of the model's length.")
    band_masks: int = setting(0, "How many stretches of bands are blanked.")
    band_mask: float = setting(0.175, "Widest of them, as a share of the bands.")

    def __post_init__(self) -> None:
        if self.rate is not None and not RATES[0] <= self.rate <= RATES[1]:
            raise UsageError(f"rate must be {RATES[0]} to {RATES[1]}, got {self.rate}", where="audio.rate")
        for key, most in (("seconds", MOST_HEARD), ("max_seconds", MOST_SECONDS)):
            value = getattr(self, key)
            if value is not None and not 2 * WINDOW_SECONDS <= value <= most:
                raise UsageError(
                    f"{key} must be {2 * WINDOW_SECONDS:g} to {most:g}, got {value:g}",
                    where=f"audio.{key}",
                )
        if (
            self.seconds is not None
            and self.max_seconds is not None
            and self.max_seconds < self.seconds - 0.05
        ):
            raise UsageError(
                f"max_seconds is {self.max_seconds:g}, less than the {self.seconds:g} that a model hears at once",
                where="audio.max_seconds",
            )
        if not 8 <= self.bands <= 128:
            raise UsageError(f"bands must be 8 to 128, got {self.bands}", where="audio.bands")
        for key, most in (
            ("shift", 1.0),
            ("speed", 0.5),
            ("noise", 1.0),
            ("time_mask", 1.0),
            ("band_mask", 1.0),
        ):
            if not 0.0 <= getattr(self, key) <= most:
                raise UsageError(
                    f"{key} must be 0 to {most:g}, got {getattr(self, key)}", where=f"audio.{key}"
                )
        for key in ("time_masks", "band_masks"):
            if not 0 <= getattr(self, key) <= 64:
                raise UsageError(f"{key} must be 0 to 64, got {getattr(self, key)}", where=f"audio.{key}")


def frame_samples(rate: int) -> tuple[int, int]:
    """Samples of a frame's window, and from one frame to the next."""
    return round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)


def num_frames(seconds: float, rate: int) -> int:
    """Frames that cover `seconds`: a multiple of UNIT, at most MOST_FRAMES."""
    window, hop = frame_samples(rate)
    wanted = 1 + max(seconds * rate - window, 0) / hop
    return min(max(math.ceil((wanted - 0.5) / UNIT), 1) * UNIT, MOST_FRAMES)  # half a frame is let go


def num_samples(frames: int, rate: int) -> int:
    """Samples that so many frames take."""
    window, hop = frame_samples(rate)
    return window + (frames - 1) * hop

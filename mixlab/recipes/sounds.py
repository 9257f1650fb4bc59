"""Recipes for short sounds such as spoken words, from scratch, on a CPU."""

from dataclasses import replace

from mixlab.data.audio.config import AudioConfig
from mixlab.models.catalog import ModelConfig
from mixlab.training.losses import LossConfig
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.recipe import DataConfig, Recipe
from mixlab.training.schedule import ScheduleConfig


def small_sounds() -> Recipe:
    """Hundreds to thousands of sounds of a second or two, by a Mixer whose tokens are frames.

    Of the size of KW-MLP (Morshed et al. 2022, arXiv 2110.07749), which has gated MLPs and gives 97.56 % on the 35
    words of Speech Commands: with 96 frames 0.42 million parameters. Spoken digits of six speakers, who are in
    training too: 99.40 +- 0.37 % (n=5), machine C of docs/results.md, commit b25eac1.
    """
    return Recipe(
        name="small_sounds",
        audio=AudioConfig(shift=0.1, speed=0.15, noise=0.5, time_masks=2, time_mask=0.15, band_masks=2),
        model=ModelConfig(name="mixer_sound1", stochastic_depth=0.1, branch_init_scale=0.1),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_fraction=0.1),
        loss=LossConfig(label_smoothing=0.1),
        ema_decay=0.99,
        epochs=60,
        batch_size=64,
    )


def tones() -> Recipe:
    """The set of tones: 99.44 +- 0.48 % (n=3), machine C of docs/results.md, commit 6beaf2e.

    What differs from small_sounds is for the first minute: a smaller model, more and smaller steps, and no stretches
    blanked, since a tone that rises differs from one that falls by what is at its ends.
    """
    small = small_sounds()
    return replace(
        small,
        name="tones",
        data=DataConfig(source="tones"),
        audio=replace(small.audio, time_masks=0, band_masks=0),
        model=replace(small.model, name="mixer_pico1"),
        batch_size=32,
    )


def speech_commands() -> Recipe:
    """Speech Commands (Warden 2018, arXiv 1804.03209), by the recipe of KWT and KW-MLP on a plain Mixer.

    KW-MLP gives 97.56 % on the 35 words. Augmentation and optimisation are theirs: shifts of a tenth of a second,
    speed, noise, SpecAugment of two stretches each, AdamW at 1e-3 with weight decay 0.1, 140 epochs in batches
    of 512.
    """
    small = small_sounds()
    return replace(
        small,
        name="speech_commands",
        audio=replace(small.audio, rate=16_000, seconds=1.0, max_seconds=1.1, noise=0.8, time_mask=0.25),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        ema_decay=0.0,
        epochs=140,
        batch_size=512,
    )

"""Recipes for images of at most some 64 pixels, from scratch, on a CPU."""

from dataclasses import replace

from mixlab.data.images.augment import AugmentConfig
from mixlab.models.catalog import ModelConfig
from mixlab.training.losses import LossConfig
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.recipe import DataConfig, Recipe
from mixlab.training.schedule import ScheduleConfig


def digits() -> Recipe:
    """scikit-learn's 8 x 8 digits: 98.38 +- 0.6 % (n=5), machine A of docs/results.md, commit 7489b51."""
    return Recipe(
        name="digits",
        data=DataConfig(source="digits"),
        augment=AugmentConfig(crop="pad", crop_padding=1, cutmix_alpha=0.5),
        model=ModelConfig(name="mixer_pico2"),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1),
        loss=LossConfig(label_smoothing=0.1),
        ema_decay=0.99,
        epochs=150,
        batch_size=64,
    )


def small_images() -> Recipe:
    """Tens of thousands of small images, by a pyramid of the size that a budget has time for, else Mini.

    CIFAR-10 in ten minutes: 84.49 +- 0.22 % (n=3), machine A of docs/results.md, commit d4fb3bb.
    """
    flat = small_images_flat()
    return replace(
        flat,
        name="small_images",
        augment=replace(flat.augment, crop_padding=2),
        model=ModelConfig(name="mixer_pyramid", branch_init_scale=0.1, gelu="erf"),
        optimizer=OptimizerConfig(name="muon", lr=3e-3, muon_lr=0.03, weight_decay=0.05),
    )


def small_images_flat() -> Recipe:
    """Tens of thousands of small images, by a flat Mixer.

    CIFAR-10 in ten minutes: 79.84 +- 0.20 % (n=3), machine A of docs/results.md, commit b973f10.
    """
    return Recipe(
        name="small_images_flat",
        augment=AugmentConfig(crop="pad", crop_padding=4, flip=True, flip_alternates=True, policy="auto"),
        model=ModelConfig(branch_init_scale=0.1, gelu="erf"),
        optimizer=OptimizerConfig(name="muon", lr=0.01, muon_lr=0.02, weight_decay=0.05),
        schedule=ScheduleConfig(decay="linear", warmup_fraction=0.05),
        loss=LossConfig(label_smoothing=0.1),
        epochs=30,
        batch_size=128,
        precision="auto",
        whiten_stem=True,
    )


def small_data() -> Recipe:
    """A few hundred images a class, your own folder, by a pyramid.

    2,000 images of CIFAR-10: 64.69 +- 0.67 % (n=3), machine A of docs/results.md, commit 67e9e6c.
    """
    many = small_images()
    return replace(
        many,
        name="small_data",
        augment=replace(many.augment, cutmix_alpha=1.0),
        epochs=60,
        batch_size=64,
    )

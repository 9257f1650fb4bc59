"""Recipes for pictures of at most some 64 pixels, from scratch, on a CPU."""

from dataclasses import replace

from mixlab.data.augment import AugmentConfig
from mixlab.models.catalog import ModelConfig
from mixlab.training.losses import LossConfig
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.recipe import DataConfig, Recipe
from mixlab.training.schedule import ScheduleConfig


def digits() -> Recipe:
    """scikit-learn's 8 x 8 digits: 98.4 +- 0.6 % (n=5), 2 cores EPYC, 43 s, commit 7489b51."""
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
    """Tens of thousands of small pictures, by a pyramid of the size that a budget has time for, else Mini.

    CIFAR-10 from scratch with `--budget 10m --val-fraction 0`: 84.49 +- 0.22 % (n=3; 5.3 epochs), Mini by the
    budget's choice in fp32, 2 cores EPYC (Zen 3), commit d4fb3bb; 87.8 % (n=1; 14.2 epochs), Mini in bf16, 2 cores
    EPYC (Zen 5), commit 5788e59. With `--budget 30m`, Nano by the budget's choice in bf16: 90.10 +- 0.52 % (n=2;
    31.3 epochs), Zen 5, commit 5788e59; 89.00 +- 0.34 % (n=2; 18.9 epochs), Zen 4, commit 2de512f. Before the
    whitened stem, flips in turns and linear decay, Mini in bf16, Zen 4: in 10 minutes 85.60 +- 0.04 % (n=3; 8.8
    epochs), commits 6585962 and f5d641e; in 30 minutes 89.12 +- 0.09 % (n=2; 26.6 epochs), commits f5d641e and
    48d062c.
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
    """Tens of thousands of small pictures, by a flat Mixer.

    CIFAR-10 from scratch with `--budget 10m --val-fraction 0`: 79.84 +- 0.20 % (n=3; 6.2 epochs), Micro/4 in fp32, 2
    cores EPYC (Zen 3) when slow, commit b973f10. Before the stem was whitened, flips took turns, the rate fell
    linearly and was 0.01 outside the MLPs: 76.6 % (n=3; 6.6 epochs), the same, commit 5218644; 79.2 % (n=2; 10.5
    epochs) on that machine when faster, commit 7489b51; 81.8 % (n=3; 17.6 epochs) in bf16, 2 cores EPYC (Zen 4),
    commit bc9c39b. With `--budget 30m --model mixer_mini`: 86.70 +- 0.16 % (n=2; 45 epochs) in bf16, there, commits
    13c1f15 and 2de512f; before those four 85.8 % (n=2; 40 epochs), commit 48d062c.
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
    """A few hundred pictures a class, your own folder, by a pyramid.

    From scratch on 2,000 pictures of CIFAR-10, 200 a class: 64.7 +- 0.7 % (n=3), Mini, commit 67e9e6c, 12 to 22 min
    of one core EPYC (Zen 3) with tests beside; the recipe before it (flat Micro/4, AdamW, moving average) 48.7 %
    (n=2).
    """
    many = small_images()
    return replace(
        many,
        name="small_data",
        augment=replace(many.augment, cutmix_alpha=1.0),
        epochs=60,
        batch_size=64,
    )

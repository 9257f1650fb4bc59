"""What studies that train have in common to begin with: presets, their models and their data."""

from dataclasses import dataclass, replace
from typing import Any

from mixlab.data.sources import open_source
from mixlab.errors import UsageError
from mixlab.models.catalog import parse_mixer_name
from mixlab.recipes import compose
from mixlab.studies.harness import Options
from mixlab.training.recipe import Recipe
from mixlab.training.setup import open_data, resolve
from mixlab.training.splits import split_source

# Models of about as many multiplications, for 32 x 32 pixels: 12.9, 12.6, 12.7 and 11.3 million.
CPU_MODELS = {
    "Mixer": {"model.name": "mixer_micro"},
    "ResNet": {"model.name": "timm/baseline_resnet_micro"},
    "ViT": {"model.name": "timm/baseline_vit_micro"},
    "pyramid": {"model.name": "mixer_pyramid_micro"},
}
# For 40 bands and 96 frames: 35.6, 36.9 and 37.7 million. What is in frames for one is a picture for the others.
SOUND_MODELS = {
    "Mixer": {"model.name": "mixer_sound1"},
    "ResNet": {"model.name": "timm/baseline_resnet_sound", "audio.tokens": "patches"},
    "ViT": {"model.name": "timm/baseline_vit_sound", "audio.tokens": "patches"},
}
PAPER_MODELS = {  # BiT's ResNet50x1, as the paper has it
    "Mixer": {"model.name": "mixer_b16"},
    "ResNet": {"model.name": "timm/resnetv2_50x1_bit"},
    "ViT": {"model.name": "timm/vit_base_patch16_224"},
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a study trains. models: name -> keys of the recipe. seeds: how many each has. recipe: the one by name, and
    the keys that all share. minutes: of a training, None for the length of the recipe. scale, likeness: what these
    trainings are, and in what their models are alike, as reports say it. examples: the kind that it is for."""

    models: dict[str, dict[str, Any]]
    seeds: dict[str, int]
    recipe: str
    shared: dict[str, Any]
    minutes: float | None
    scale: str
    likeness: str
    examples: str = "images"

    def seeds_of(self, model: str, options: Options) -> int:
        return options.seeds or (1 if options.smoke else self.seeds[model])

    def minutes_of(self, options: Options) -> float | None:
        return None if options.smoke else options.minutes or self.minutes

    def resolved(self, options: Options) -> Recipe:
        """The Mixer's recipe with all that follows from the data. UsageError for data of another kind."""
        overrides = self.shared | self.models["Mixer"]
        recipe = compose(data_of(options), recipe=self.recipe, overrides=overrides)
        recipe = replace(recipe, threads=options.threads)
        source = open_data(recipe)
        if source.modality.name != self.examples:
            raise UsageError(
                f"this study is for {self.examples}, and the data has {source.modality.many}",
                where=recipe.data.source,
                hint="`mixlab study compare` takes both",
            )
        return resolve(recipe, split_source(source, recipe)["train"], source.modality)

    def changes_of(self, model: str, resolved: Recipe) -> dict[str, Any]:
        """Keys that a model has for itself, fitted to the data: all see images of one size, and patches of one.

        Of sounds all have the same rate and length, which follow from the data.
        """
        if self.examples != "images":
            return self.models[model]
        assert resolved.data.image_size is not None
        height, width = resolved.data.image_size
        changes = self.models[model] | {"data.image_size": f"{height}x{width}"}
        is_vit = "vit" in changes["model.name"]
        return changes | ({"model.patch_size": patch_side(resolved)} if is_vit else {})


def examples_of(options: Options) -> str:
    """The kind of examples that a study trains on: a modality's name."""
    return open_source(data_of(options)).modality.name


def data_of(options: Options) -> str:
    """The data set that a study trains on; `--smoke` has digits for want of one. UsageError if there is none."""
    if options.subject is None and not options.smoke:
        raise UsageError(
            "this study trains on a data set",
            where="DATA",
            hint="a folder or a set's name, as for `mixlab train`; --smoke tries it on digits",
        )
    return options.subject or "digits"


PLAIN = {"optimizer.name": "adamw", "lr": 2e-3, "keep_weights": "last", "precision": "fp32", "gelu": "tanh"}
PLAIN |= {"policy": "none", "flip_alternates": False, "decay": "cosine", "whiten_stem": False}  # AdamW only


def presets(seeds: dict[str, int], *, paper_seeds: int) -> dict[str, Preset]:
    """`cpu` with so many seeds of each model; `paper` by the authors' recipe, on ImageNet-1k for want of JFT-300M."""
    return {
        "cpu": Preset(
            models=CPU_MODELS,
            seeds=seeds,
            recipe="small_images_flat",
            shared=PLAIN,
            minutes=6.0,
            scale="Small models, one set of small images and minutes of training",
            likeness="Models of about equal multiplications, where the paper's have equal width and depth",
        ),
        "paper": Preset(
            models=PAPER_MODELS,
            seeds=dict.fromkeys(PAPER_MODELS, paper_seeds),
            recipe="pretrain_imagenet1k",
            shared={},
            minutes=None,
            scale="Models of the paper's size, trained on another set than the paper's largest",
            likeness="Models of the paper's width and depth",
        ),
    }


SOUNDS = Preset(
    models=SOUND_MODELS,
    seeds=dict.fromkeys(SOUND_MODELS, 2),
    recipe="small_sounds",
    shared={"keep_weights": "last", "precision": "fp32"},
    minutes=6.0,
    scale="Small models, one set of sounds and minutes of training; the paper has images only",
    likeness="Models of about equal multiplications, where the paper's have equal width and depth",
    examples="sounds",
)


def patch_side(resolved: Recipe) -> int:
    """Side of the Mixer's patches."""
    assert resolved.model.name is not None
    return resolved.model.patch_size or parse_mixer_name(resolved.model.name)[1]


def describe_preset(preset: Preset) -> str:
    """The shared recipe in a line."""
    keys = ", ".join(f"{key} {value}" for key, value in preset.shared.items())
    length = "its whole length" if preset.minutes is None else f"{preset.minutes:g} minutes planned"
    return f"{preset.recipe}{' with ' if keys else ''}{keys}; {length}; the same for all models"

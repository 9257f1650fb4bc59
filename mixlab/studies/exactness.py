"""What can be proved of permuted images, exactly: of trained weights, and of a training."""

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mixlab.checkpoint.permute import permute_weights
from mixlab.checkpoint.store import load_weights
from mixlab.data.images.permutation import PixelPermutation
from mixlab.data.loader import TrainingDataset, training_batches
from mixlab.data.random import torch_seed
from mixlab.device import set_threads
from mixlab.files import write_atomically
from mixlab.models.catalog import create_model
from mixlab.models.permutation import absorb
from mixlab.records import read_json
from mixlab.report.screen import Screen
from mixlab.studies.harness import Options
from mixlab.studies.presets import patch_side
from mixlab.studies.trainings import Cell
from mixlab.training.clock import Clock
from mixlab.training.from_labels import labels_of
from mixlab.training.prepared import prepare
from mixlab.training.recipe import Recipe
from mixlab.training.setup import model_settings, open_data
from mixlab.training.splits import split_source
from mixlab.training.step import TrainState, train_step

ORIGINAL, SHARED, GLOBAL = "original", "patch + pixel", "global"
SETTINGS = {ORIGINAL: "none", SHARED: "patches_and_pixels", GLOBAL: "global"}
COUPLED_STEPS, COUPLED_TOLERANCE, PROOF_TOLERANCE = 20, 1e-10, 1e-12
PROOF_NAME = "proof.json"


def permutation_of(setting: str, resolved: Recipe) -> PixelPermutation | None:
    if setting == ORIGINAL:
        return None
    kind: Any = SETTINGS[setting]
    return PixelPermutation(kind=kind, patch_size=patch_side(resolved), seed=0)


def prove_exactly(options: Options, resolved: Recipe) -> dict[str, Any]:
    """Two exact statements: of trained weights, and of a training; kept in the folder once they are made."""
    path = options.out / PROOF_NAME
    if path.exists():
        return read_json(path)
    trained = {}
    for model in ("Mixer", "ViT"):  # a ViT with learnt position embeddings has the property too
        run = options.out / "runs" / Cell(model=model, setting=ORIGINAL, seed=0, changes={}).folder_name
        trained[model] = permute_weights(load_weights(run), seed=0)[1]
    proof = {"absorbed": trained, "coupled": couple(resolved, COUPLED_STEPS)}
    write_atomically(path, (json.dumps(proof, indent=2) + "\n").encode())
    return proof


def couple(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Trainings in float64 of one initial Mixer: on images as they are, and on permuted ones.

    The second begins with the same weights, the permutation absorbed; the control without that. Returns the losses of
    each, and the largest difference of the second's, and of the control's, from the first's.
    """
    recipe = replace(recipe, fast=False)
    source = open_data(recipe)
    train = split_source(source, recipe)["train"]
    few = np.linspace(0, len(train) - 1, min(len(train), steps * recipe.batch_size)).astype(np.int64)
    prepared = prepare(recipe, source, {"train": train.take(few)}, Screen(quiet=True))
    permutation, size = permutation_of(SHARED, recipe), prepared.preprocess.input_size
    assert permutation is not None
    set_threads(recipe.threads)
    torch.manual_seed(torch_seed(recipe.seed, 0, 2**31))
    first = create_model(**model_settings(recipe, len(source.class_names))).double()
    models = {
        ORIGINAL: first,
        "absorbed": absorb(first, permutation.patch_order(size), permutation.pixel_order()),
        "control": copy.deepcopy(first),
    }
    objective = labels_of(recipe.loss, prepared)
    states = {
        name: TrainState(model, recipe, objective, torch.device("cpu")) for name, model in models.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in states}
    dataset = TrainingDataset(
        examples=prepared.train, augment=recipe.augment, batch_size=recipe.batch_size, seed=recipe.seed
    )
    batches = training_batches(
        dataset, first_step=0, num_steps=steps, num_workers=0, on_bad=lambda file: None
    )
    for step, batch in enumerate(batches):
        clock, image = Clock(steps, step=step), batch.inputs.double()
        for name, state in states.items():
            seen = image if name == ORIGINAL else permutation.apply(image)
            losses[name].append(train_step(state, replace(batch, inputs=seen), clock).loss)
    differences = {
        name: max(abs(a - b) for a, b in zip(losses[ORIGINAL], losses[name], strict=True))
        for name in ("absorbed", "control")
    }
    return {"steps": steps, "losses": losses, "differences": differences}

"""`mixlab study shuffle`: who loses what by a permutation, from planted results; and the exact statements."""

import json

import numpy as np
import pytest
import torch

import mixlab
from mixlab.checkpoint.open import open_weights
from mixlab.data.images.modality import IMAGES
from mixlab.data.images.permutation import PixelPermutation
from mixlab.data.loader import TrainingDataset, training_batches
from mixlab.errors import UsageError
from mixlab.recipes import compose
from mixlab.report.screen import Screen
from mixlab.studies.exactness import GLOBAL, ORIGINAL, SHARED, couple
from mixlab.studies.harness import Options, conduct
from mixlab.studies.questions import shuffle
from mixlab.studies.questions.shuffle import PRESETS, paired_difference, relative_drop
from mixlab.training.evaluate import evaluate
from mixlab.training.prepared import prepare
from mixlab.training.setup import open_data, resolve
from mixlab.training.splits import split_source

QUIET = Screen(quiet=True)


def row(model, setting, seed, top1):
    return {"model": model, "setting": setting, "seed": str(seed), "top1": repr(top1)}


def table(shared=0.0, seeds=3):
    rows = []
    for seed in range(seeds):
        wobble = 0.004 * (seed - 1)
        for model, original, after, everywhere in (
            ("Mixer", 0.70, 0.70 - shared, 0.50),
            ("ResNet", 0.80, 0.60, 0.44),
        ):
            rows += [
                row(model, ORIGINAL, seed, original + wobble),
                row(model, SHARED, seed, after - wobble),
                row(model, GLOBAL, seed, everywhere + wobble),
            ]
    return rows


PROOF = {
    "absorbed": {"Mixer": {"max_difference": 1e-15, "control": 0.5}},
    "coupled": {"steps": 20, "differences": {"absorbed": 1e-14, "control": 0.1}},
}


def verdicts(rows, proof=PROOF):
    drops = {
        (model, setting): drop
        for model in ("Mixer", "ResNet")
        for setting in (SHARED, GLOBAL)
        if (drop := relative_drop(rows, model, setting)) is not None
    }
    return [finding.verdict for finding in shuffle._findings(rows, drops, proof, "Small")]


def test_drops_are_shares_of_the_original_accuracy_seed_by_seed():
    rows = table()
    drop = relative_drop(rows, "ResNet", GLOBAL)
    expected = [1 - (0.44 + w) / (0.80 + w) for w in (-0.004, 0, 0.004)]
    assert (drop.mean, drop.n) == (pytest.approx(np.mean(expected)), 3)
    difference = paired_difference(rows, "Mixer", SHARED)
    assert difference.mean == pytest.approx(0)
    assert difference.deviation == pytest.approx(0.008)
    assert relative_drop(rows, "ViT", GLOBAL) is None


def test_verdicts_follow_from_the_intervals():
    assert verdicts(table()) == ["holds", "holds", "holds"]
    assert verdicts(table(shared=0.1))[0] == "does not hold"
    assert verdicts(table(seeds=1)) == ["open", "open", "open"]
    assert verdicts(table(shared=-0.1))[0] == "holds"  # better than before
    inexact = json.loads(json.dumps(PROOF))
    inexact["coupled"]["differences"]["absorbed"] = 1e-6
    assert verdicts(table(), inexact)[0] == "does not hold"
    assert verdicts(table(seeds=1), inexact)[0] == "does not hold"


def resolved():
    preset = PRESETS["cpu"]
    recipe = compose("digits", recipe=preset.recipe, overrides=preset.shared | preset.models["Mixer"])
    return resolve(recipe, split_source(open_data(recipe), recipe)["train"], IMAGES)


@pytest.mark.slow
def test_a_training_from_absorbed_weights_has_the_same_losses():
    found = couple(resolved(), 12)
    assert len(found["losses"][ORIGINAL]) == 12
    assert found["differences"]["absorbed"] <= 1e-10
    assert found["differences"]["control"] > 1e-4
    assert found["losses"][ORIGINAL][-1] < found["losses"][ORIGINAL][0]


def test_pictures_are_permuted_after_augmentation():
    recipe = resolved()
    source = open_data(recipe)
    seen = {}
    for kind in ("none", "global", "patches_and_pixels"):
        overrides = {"data.permutation": kind, "augment.policy": "none"}
        changed = compose("digits", recipe="small_images_flat", overrides=overrides)
        changed = resolve(changed, split_source(source, changed)["train"], IMAGES)
        prepared = prepare(changed, source, split_source(source, changed), QUIET)
        dataset = TrainingDataset(examples=prepared.train, augment=changed.augment, batch_size=8, seed=0)
        batches = training_batches(
            dataset, first_step=0, num_steps=1, num_workers=0, on_bad=lambda file: None
        )
        seen[kind] = next(iter(batches)).inputs
    for kind in ("global", "patches_and_pixels"):
        permutation = PixelPermutation(kind=kind, patch_size=2 if kind != "global" else 1, seed=0)
        assert torch.equal(seen[kind], permutation.apply(seen["none"]))
        assert not torch.equal(seen[kind], seen["none"])


def test_weights_of_a_permuted_training_permute_whatever_they_are_given(tmp_path):
    recipe = compose("digits", recipe="digits", overrides={"data.permutation": "global", "steps": 60,
                                                            "augment.cutmix_alpha": 0.0})  # fmt: skip
    result = mixlab.train(recipe=recipe, run=tmp_path / "run", screen=QUIET, figures=False)
    weights = open_weights(tmp_path / "run")
    assert weights.preprocess.permutation == PixelPermutation(kind="global", patch_size=1, seed=0)
    again, _ = evaluate(tmp_path / "run", split="test", screen=QUIET)
    assert again.num_correct == result["test"]["num_correct"]
    assert result["test"]["top1"] > 0.3


def test_what_cannot_be_permuted_is_said():
    with pytest.raises(UsageError, match="CutMix would paste"):
        compose("digits", recipe="digits", overrides={"data.permutation": "global"})
    recipe = compose("digits", recipe="small_images_flat", overrides={
        "data.permutation": "patches_and_pixels", "model.name": "timm/baseline_resnet_micro",
    })  # fmt: skip
    with pytest.raises(UsageError, match="whose patches shall be permuted"):
        resolve(recipe, split_source(open_data(recipe), recipe)["train"], IMAGES)
    recipe = compose("digits", recipe="small_images_flat", overrides={
        "data.permutation": "per_patch", "data.permutation_patch_size": 3,
    })  # fmt: skip
    with pytest.raises(UsageError, match="no whole patches of 3 pixels"):
        resolve(recipe, split_source(open_data(recipe), recipe)["train"], IMAGES)


@pytest.mark.slow  # twelve small trainings
def test_the_whole_study_on_digits(tmp_path):
    result = conduct(shuffle.STUDY, Options(out=tmp_path, smoke=True, threads=1, screen=QUIET))
    assert [row["model"] for row in result["tables"][0]["rows"]] == ["Mixer", "ResNet", "ViT", "pyramid"]
    assert [row["permutation"] for row in result["tables"][1]["rows"]] == [SHARED, GLOBAL] * 4
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert all(found["max_difference"] <= 1e-12 < found["control"] for found in proof["absorbed"].values())
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "accuracy.png",
        "drops.png",
        "curves.png",
    }
    page = (tmp_path / "report.html").read_text()
    assert "its numbers mean nothing" in page
    assert "About 45 % against about 75 %" in page

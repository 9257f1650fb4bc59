"""The sentences of a report, on predictions whose meaning is known."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mixlab.data.images.augment import AugmentConfig
from mixlab.data.images.modality import IMAGES
from mixlab.evaluation.metrics import Predictions, merged_bins, summarize
from mixlab.recipes.small import digits
from mixlab.report.tables import describe_coverage
from mixlab.training.conclusions import (
    best_coverage,
    changed_keys,
    coverage_sentence,
    improvements,
    next_commands,
    temperature_sentence,
    top_confusions,
    training_below_validation,
)
from mixlab.training.recipe import Recipe

ROW = {"target": 0.95, "min_confidence": 0.81, "coverage": 0.72}


def evaluation(label, predicted, confidence=None, thresholds=()):
    label, predicted = np.array(label), np.array(predicted)
    confidence = np.full(len(label), 0.9) if confidence is None else np.array(confidence)
    found = Predictions(
        index=np.arange(len(label)),
        label=label,
        predicted=predicted,
        confidence=confidence,
        loss=np.ones(len(label)),
        top5=predicted[:, None],
    )
    return summarize(found, ("cat", "dog", "owl"), thresholds)


def test_confusions_are_counted_by_class_most_frequent_first():
    result = evaluation([0] * 200 + [1] * 10 + [2] * 5, [1] * 17 + [0] * 183 + [2] + [1] * 9 + [2] * 5)
    assert top_confusions(result, "images") == [
        "17 of the 200 test images of “cat” were predicted as “dog”",
        "1 of the 10 test images of “dog” was predicted as “owl”",
    ]
    assert top_confusions(evaluation([0, 1], [0, 1]), "images") == ["No test images were predicted wrongly"]


def test_coverage_is_said_with_what_the_test_split_shows():
    result = evaluation([0] * 4, [0, 0, 1, 1], [0.9, 0.85, 0.81, 0.2], [ROW])
    assert coverage_sentence(result, "images", has_validation=True) == (
        "If 95 % should be right, 3 of the 4 images need no second look (confidence 0.81 or more); of those 66.7 % "
        "were right. This confidence was chosen on the validation split; the numbers are of the test split."
    )
    assert "Nothing was held out" in coverage_sentence(result, "images", has_validation=False)
    assert "too few images" in coverage_sentence(evaluation([0], [0]), "images", has_validation=True)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (0.0, "none of the 2 images needs a second look; of these 50.0 % were right."),
        (0.95, "none of the 2 images is sure enough (confidence 0.95 or more)."),
    ],
)
def test_coverage_of_all_and_of_none_have_words_of_their_own(limit, said):
    result = evaluation([0, 0], [0, 1], thresholds=[ROW | {"min_confidence": limit}])
    assert describe_coverage(result.coverage[0], 2) == f"If 95 % should be right, {said}"


def test_of_several_thresholds_the_one_for_95_in_100_is_said_if_it_excludes_any():
    everything = {"target": 0.9, "min_confidence": 0.0, "coverage": 1.0}
    strict = {"target": 0.99, "min_confidence": 0.95, "coverage": 0.4}
    for thresholds, target in (
        ([everything, ROW, strict], 0.95),
        ([everything, strict], 0.99),
        ([everything], 0.9),
        ([everything | {"min_confidence": 0.3}], 0.9),
    ):
        assert best_coverage(evaluation([0], [0], thresholds=thresholds))["target"] == target
    assert best_coverage(evaluation([0], [0])) is None


def plan(recipe, **settings):
    return SimpleNamespace(recipe=recipe, augment=recipe.augment, modality=IMAGES, model_settings=settings)


def log(training, validation):
    """Two epochs of ten steps; training was far worse in the first."""
    trained = [(5, 0.1), (15, training), (20, training)]
    rows = [{"event": "train", "step": step, "accuracy": accuracy} for step, accuracy in trained]
    return rows + [{"event": "validation", "step": step, "top1": validation} for step in (10, 20)]


def test_training_accuracy_below_validation_is_explained_by_what_was_on():
    sentence = training_below_validation(plan(digits(), stochastic_depth=0.1), log(0.6, 0.8))
    for part in ("60.0 %", "80.0 %", "augmented", "moving average", "drops blocks"):
        assert part in sentence
    plain = replace(digits(), augment=AugmentConfig(), ema_decay=0.0)
    sentence = training_below_validation(plan(plain), log(0.6, 0.8))
    assert sentence.endswith("That is no error: training is measured while the weights still change.")
    assert training_below_validation(plan(digits()), log(0.9, 0.8)) is None
    assert training_below_validation(plan(digits()), []) is None


def test_keys_that_differ_from_their_defaults_are_named_with_both_values():
    changed = {name: (value, default) for name, value, default in changed_keys(digits())}
    assert changed["batch_size"] == ("64", "128")
    assert changed["optimizer.lr"][0] == "0.003"
    assert "augment.flip" not in changed
    assert changed_keys(Recipe()) == []


def test_the_next_commands_name_the_run_and_the_confidence(tmp_path):
    commands = dict(next_commands(tmp_path / "my run", evaluation([0], [0], thresholds=[ROW])))
    assert commands["Use it"] == "mixlab predict 'my run' FILE"
    assert commands["Mark what needs a second look"].endswith("--min-confidence 0.81")
    assert not any(str(tmp_path) in command for command in commands.values())


def test_small_bins_go_to_their_neighbours_and_lose_no_image():
    counts = [0, 3, 4, 20, 0, 2, 30, 1]
    bins = [
        {
            "lower": i / 8,
            "upper": (i + 1) / 8,
            "num_images": count,
            "accuracy": i / 10 if count else None,
            "confidence": i / 8 if count else None,
        }
        for i, count in enumerate(counts)
    ]
    merged, few = merged_bins(bins, 10)
    assert [(one["lower"], one["upper"], one["num_images"]) for one in merged] == [
        (1 / 8, 4 / 8, 27),
        (5 / 8, 1.0, 33),
    ]
    assert few == 4
    assert merged[0]["accuracy"] == pytest.approx((3 * 0.1 + 4 * 0.2 + 20 * 0.3) / 27)
    assert merged_bins([], 10) == ([], 0)
    assert merged_bins(bins[:4], 100)[0][0]["num_images"] == 27


def trained_plan(counts=(100, 100, 100), num_val=1000, side=8, **recipe):
    """A plan of three classes with so many training images, as far as `improvements` looks at it."""
    split = SimpleNamespace(labels=np.repeat(np.arange(3), counts))
    return SimpleNamespace(
        recipe=replace(digits(), **recipe),
        modality=IMAGES,
        class_names=("cat", "dog", "owl"),
        preprocess=SimpleNamespace(input_size=(side, side)),
        data=SimpleNamespace(train=SimpleNamespace(split=split), val=range(num_val)),
    )


def epochs(training, top1):
    """A log with one row of training and one validation an epoch."""
    rows = []
    for step, validation in enumerate(top1, start=1):
        rows += [
            {"event": "train", "step": step, "accuracy": training},
            {"event": "validation", "step": step, "top1": validation},
        ]
    return rows


FLAT, RISING = [0.8] * 10, [0.1 * i for i in range(10)]


def test_a_training_that_still_rose_is_given_twice_the_time():
    [(why, command)] = improvements(trained_plan(), None, epochs(0.9, RISING), seconds=150)
    assert "by 20.0 points" in why
    assert command == "mixlab train DATA --budget 6m"
    [(_, command)] = improvements(trained_plan(init_from="x"), None, epochs(0.9, RISING), seconds=5)
    assert command == "mixlab finetune DATA --weights WEIGHTS --budget 2m"


def test_a_rise_of_one_image_is_no_reason():
    top1 = [0.80] * 8 + [0.81] * 2
    assert "no weak point" in improvements(trained_plan(num_val=100), None, epochs(0.8, top1), 60)[0][0]
    assert "still rose" in improvements(trained_plan(num_val=1000), None, epochs(0.8, top1), 60)[0][0]


@pytest.mark.parametrize(
    ("side", "weights"), [(32, "mixer_pyramid_cifar:cifar10"), (224, "mixer_b16:imagenet1k")]
)
def test_against_learning_by_heart_weights_of_images_like_these_are_named(side, weights):
    [(why, command)] = improvements(trained_plan(side=side), None, epochs(1.0, FLAT), seconds=60)
    assert "far above" in why
    assert command == f"mixlab finetune DATA --weights {weights}"
    [(why, command)] = improvements(trained_plan(side=side, init_from="x"), None, epochs(1.0, FLAT), 60)
    assert ("far above" in why, command) == (True, "")


def test_a_class_of_few_images_is_named_before_one_that_is_found_least():
    label = [0] * 100 + [1] * 100 + [2] * 100
    result = evaluation(label, [0] * 100 + [1] * 100 + [2] * 40 + [0] * 60)
    [(why, _)] = improvements(trained_plan((100, 4, 100)), result, epochs(0.8, FLAT), 60)
    assert "“dog” has only 4" in why
    [(why, _)] = improvements(trained_plan(), result, epochs(0.8, FLAT), 60)
    assert "“owl” is found least often (recall 40 %)" in why
    by_chance = evaluation(label, [0] * 100 + [1] * 100 + [2] * 98 + [0] * 2)
    assert "no weak point" in improvements(trained_plan(), by_chance, epochs(0.8, FLAT), 60)[0][0]


def test_a_model_that_guesses_is_given_more_time_and_nothing_else():
    label = [0] * 40 + [1] * 30 + [2] * 30
    [(why, command)] = improvements(trained_plan(), evaluation(label, [0] * 100), epochs(0.3, FLAT), 4)
    assert "always naming “cat” is right for 40.0 %" in why
    assert command == "mixlab train DATA --budget 10m"
    found = improvements(trained_plan(), evaluation(label, [0] * 70 + [2] * 30), epochs(0.8, FLAT), 4)
    assert not any("guessing" in why for why, _ in found)
    one_class = evaluation([0] * 9, [0] * 9)
    assert "no weak point" in improvements(trained_plan(), one_class, epochs(0.8, FLAT), 4)[0][0]


def test_a_temperature_names_its_split_and_is_uncertain_below_200_examples():
    assert "fitted on the 200 images of the validation split." in temperature_sentence(1.5, None, 200)
    assert "uncertain" not in temperature_sentence(1.5, None, 200)
    assert "so few clips that temperature is uncertain" in temperature_sentence(1.5, None, 199, "clips")
    assert "not calibrated" in temperature_sentence(1.0, None, 0)

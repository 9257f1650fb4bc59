"""The size that a budget has time for: from a table of runs, and the machine's speed."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixlab.checkpoint.store import load_weights
from mixlab.errors import UsageError
from mixlab.models.catalog import display_name
from mixlab.planning import budget, model_size
from mixlab.planning.draft import Request
from mixlab.planning.make_plan import DECISIONS, make_plan
from mixlab.planning.model_size import SIZE_CURVES, is_size_open
from mixlab.recipes import compose, find_recipe
from mixlab.training.keys import from_toml, override
from mixlab.training.recipe import Recipe
from mixlab.training.session import Session
from tests.training.seams import QUIET, Listening, steps_of, train, with_decisions

NAMES = ("mixer_pyramid_micro4", "mixer_pyramid_micro2", "mixer_pyramid_mini2", "mixer_pyramid_nano2")


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 150, (32, 32, 3))
            pixels[..., number] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{i:02}.png")
    return tmp_path / "data"


def planned(images: Path, decisions=DECISIONS, budget_seconds: float | None = None, **overrides) -> Recipe:
    """The recipe of a training of `small_images` when all is decided."""
    overrides = {"threads": 1} | {key.replace("__", "."): value for key, value in overrides.items()}
    has_budget = budget_seconds is not None
    recipe = compose(str(images), recipe="small_images", overrides=overrides, has_budget=has_budget)
    return make_plan(
        Request(recipe=recipe, budget_seconds=budget_seconds), Session(screen=QUIET), decisions
    ).recipe


def choose(images: Path, seconds_per_image: float, **options) -> tuple[str | None, list[str]]:
    """The name of the model that is to be trained, and those whose speed was measured.

    seconds_per_image: of the first curve; each further one takes twice as long.
    """
    measured = []

    def measure(plan, state, seconds, end):
        measured.append(plan.recipe.model.name)
        assert state.model.config.patch_size == int(measured[-1][-1])
        larger = [size in measured[-1] for size in ("micro", "mini", "nano")].index(True)
        curve = 0 if measured[-1].endswith("micro4") else larger + 1
        return plan.recipe.batch_size * seconds_per_image * 2**curve

    decide = partial(model_size.decide_model_size, measure=measure)
    decisions = with_decisions(decide_model_size=decide, decide_steps=steps_of(2))
    return planned(images, decisions, batch_size=8, **options).model.name, measured


@pytest.mark.parametrize("epochs", [0.2, 3.0, 1000.0])
def test_the_rung_with_the_least_error_is_trained(epochs, images):
    seconds = 600 * model_size.USABLE_SHARE / (epochs * model_size.IMAGES)
    errors = [curve.error(epochs * model_size.IMAGES / 2**n) for n, curve in enumerate(SIZE_CURVES)]
    name, measured = choose(images, seconds, budget_seconds=600.0)
    best = int(np.argmin(errors))
    assert name == NAMES[best]
    hopeless = [
        n for n in range(len(SIZE_CURVES)) if errors[n] > model_size.MUCH_WORSE * min(errors[: n + 1])
    ]
    assert measured == list(NAMES[: min(hopeless, default=len(NAMES)) + 1])


def test_a_short_budget_takes_the_smallest_and_a_long_one_the_largest():
    for epochs, best in ((0.2, 0), (1000.0, len(SIZE_CURVES) - 1)):
        errors = [curve.error(epochs * model_size.IMAGES / 2**n) for n, curve in enumerate(SIZE_CURVES)]
        assert int(np.argmin(errors)) == best


def test_without_a_budget_or_with_a_size_of_ones_own_nothing_is_chosen(images):
    assert choose(images, 1.0, steps=2) == ("mixer_pyramid_mini2", [])
    for given in ({"model.patch_size": 4}, {"model.hidden_dim": 8}, {"model.name": "mixer_pyramid_nano"}):
        assert not is_size_open(override(find_recipe("small_images"), given))
    assert is_size_open(compose("cifar10", recipe="small_images", has_budget=True))


def saying(draft):
    """`decide_steps`, but for two steps and without a deadline."""
    return replace(budget.decide_steps(draft), num_steps=2, deadline=None)


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_speed_is_measured_on_steps_of_the_real_thing(threads, images, tmp_path):
    screen, run = Listening(), tmp_path / "run"
    doubles = {"decisions": with_decisions(decide_steps=saying)}
    options = {"batch_size": 32, "threads": threads, "budget": "2m"}
    train(images, "small_images", run, screen=screen, doubles=doubles, **options)
    name = from_toml(run / "recipe.toml")["model.name"]
    assert load_weights(run).model_settings["name"] == name
    assert name in NAMES  # which one depends on the machine
    assert any(text.startswith(f"{display_name(name)} suits this budget") for text in screen.said)


def test_a_budget_that_is_over_before_the_first_step_is_said(images, tmp_path):
    with pytest.raises(UsageError, match="leaves no time to train"):
        train(images, "small_images", tmp_path / "run", budget="0.1s", threads=1)
    assert not (tmp_path / "run").exists()


def test_patches_that_do_not_divide_the_pictures_are_left_out(images):
    # 12 pixels: patches of 1 leave 12, 6 and 3 tokens a side; of 2 would leave 6, 3 and one and a half.
    name, measured = choose(images, 1e-9, budget_seconds=600.0, data__image_size=(12, 12))
    assert measured[0] == "mixer_pyramid_micro1"
    assert name == "mixer_pyramid_nano1"


@pytest.mark.parametrize(("epochs", "policy", "padding"), [(14, "none", 2), (15, "randaugment", 4)])
def test_how_often_pictures_are_seen_decides_what_is_done_to_them(epochs, policy, padding, images):
    augment = planned(images, epochs=epochs, batch_size=60, data__val_fraction=0).augment
    assert (augment.policy, augment.crop_padding) == (policy, padding)


def test_an_augmentation_of_ones_own_stays(images):
    assert planned(images, epochs=15, batch_size=24, augment__policy="none").augment.policy == "none"

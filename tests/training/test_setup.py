"""What a training takes of its data: fractions, what is held out, and what is written down of it."""

import numpy as np
import pytest

import mixlab
from mixlab.data.csv_files import read_split_csv
from mixlab.data.dataset import Source, Split
from mixlab.data.images.modality import IMAGES
from mixlab.errors import UsageError
from mixlab.report.screen import Screen
from mixlab.training.keys import override
from mixlab.training.recipe import Recipe
from mixlab.training.splits import split_source


def uneven(*parts: str) -> Source:
    """Four classes in each part, of 100, 100, 40 and 3 images, mixed."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (100, 100, 40, 3)))
    splits = {
        part: Split(
            names=tuple(f"{part} index {i}" for i in range(len(labels))),
            labels=labels,
            arrays=np.zeros((len(labels), 8, 8, 1), dtype=np.uint8),
        )
        for part in parts
    }
    return Source(name="pixels", class_names=("a", "b", "c", "d"), splits=splits, modality=IMAGES)


def drawn(source: Source, **keys) -> dict[str, Split]:
    return split_source(source, override(Recipe(), {f"data.{key}": value for key, value in keys.items()}))


def test_a_fraction_of_the_training_images_is_taken_by_class_and_the_rest_is_left_alone():
    source = uneven("train", "test")
    tenth = drawn(source, train_fraction=0.1, val_fraction=0.0)
    assert np.bincount(tenth["train"].labels).tolist() == [10, 10, 4, 1]
    assert tenth["test"].names == source.splits["test"].names
    assert drawn(source, train_fraction=0.1, val_fraction=0.0)["train"].names == tenth["train"].names
    other = drawn(source, train_fraction=0.1, val_fraction=0.0, split_seed=1)
    assert other["train"].names != tenth["train"].names
    assert drawn(source, val_fraction=0.0)["train"].names == source.splits["train"].names
    with pytest.raises(UsageError, match="train_fraction must be in"):
        drawn(source, train_fraction=0.0)


def test_what_is_held_out_comes_from_the_fraction_too():
    source = uneven("train", "test")
    whole = drawn(source, train_fraction=0.5, val_fraction=0.0)["train"]
    parts = drawn(source, train_fraction=0.5, val_fraction=0.2)
    assert len(parts["val"]) == round(0.2 * len(whole))
    assert sorted(parts["train"].names + parts["val"].names) == sorted(whole.names)
    own = drawn(uneven("train", "val", "test"), train_fraction=0.5)
    assert len(own["val"]) == 243  # a validation split of its own stays whole
    assert own["train"].names == whole.names
    joined = drawn(uneven("train", "val", "test"), train_fraction=0.5, val_fraction=0.0)
    assert len(joined["train"]) == len({*joined["train"].names}) == 243  # half of both together
    assert {name.split()[0] for name in joined["train"].names} == {"train", "val"}
    everything = drawn(uneven("all"), train_fraction=0.5)
    assert everything["test"].names == drawn(uneven("all"))["test"].names
    assert set(everything["train"].names) < set(drawn(uneven("all"))["train"].names)


def test_the_fraction_that_a_run_was_trained_on_is_written_down(tmp_path):
    options = {"steps": 2, "threads": 1, "screen": Screen(quiet=True)}
    result = mixlab.train(
        "digits", "digits", run=tmp_path / "run", data__train_fraction=0.1, figures=False, **options
    )
    listed = read_split_csv(tmp_path / "run" / "split.csv")
    assert {name: len(names) for name, names in listed.items()} == {"train": 109, "val": 362, "test": 357}
    assert result["epochs"] == pytest.approx(2 * 64 / 109)
    assert "train_fraction = 0.1" in (tmp_path / "run" / "recipe.toml").read_text()

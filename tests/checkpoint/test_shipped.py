"""The weights that come with the package: there, small, right, and described."""

import json
import re

import numpy as np
import pytest
import torch

import mixlab
from mixlab.checkpoint.download import fetch_published, list_published
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.published import PUBLISHED, SHIPPED
from mixlab.models.catalog import create_model
from tests.forked import mixlab as command

ENTRIES = [entry for entry in PUBLISHED.values() if entry.is_shipped]


def test_every_folder_is_an_entry_and_every_entry_a_folder():
    assert {entry.name for entry in ENTRIES} == {"mixer_cifar:cifar10", "mixer_pyramid_cifar:cifar10"}
    assert {fetch_published(entry) for entry in ENTRIES} == set(SHIPPED.iterdir())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_it_is_small_and_is_what_its_entry_says(entry):
    folder = fetch_published(entry)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 2 * 2**20
    assert entry.size_mib == pytest.approx((folder / "weights.safetensors").stat().st_size / 2**20, abs=0.01)
    weights = open_weights(entry.name)
    assert weights.model_settings["name"] == entry.model
    assert len(weights.class_names) == entry.num_classes == 10
    assert weights.preprocess.image_size == (32, 32)
    assert (weights.preprocess.mean, weights.preprocess.std) == (entry.mean, entry.std)
    assert weights.model.config.gelu == entry.gelu
    assert weights.provenance["source"] == entry.name
    same = create_model(**weights.model_settings)
    same.load_state_dict(weights.model.state_dict())
    row = next(row for row in list_published() if row["name"] == entry.name)
    assert row["cached"]
    assert (row["data"], row["top1"]) == ("CIFAR-10", entry.top1)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_its_card_says_how_good_it_is(entry):
    card = (fetch_published(entry) / "README.md").read_text()
    assert f"{entry.top1:.2f} %" in card
    assert re.search(r"commit [0-9a-f]{7,}", card, re.IGNORECASE)
    assert "float16" in card
    assert "license: apache-2.0" in card


def test_it_needs_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXLAB_OFFLINE", "1")
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "empty"))
    model = mixlab.create_model("mixer_pyramid_cifar", pretrained="cifar10")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    other = mixlab.create_model("mixer_cifar", pretrained="cifar10", num_classes=3)
    assert torch.equal(other(torch.randn(2, 3, 32, 32)), torch.zeros(2, 3))
    assert not (tmp_path / "empty").exists()


def test_it_is_predicted_with_by_name(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    done = command("predict", "mixer_pyramid_cifar:cifar10", "noise.png", "--json", cwd=tmp_path)
    guesses = json.loads(done.stdout)["images"][0]["predictions"]
    assert len(guesses) == 5
    assert {guess["label"] for guess in guesses} <= set(open_weights("mixer_cifar:cifar10").class_names)

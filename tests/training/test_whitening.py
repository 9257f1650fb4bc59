"""A whitened stem, against scikit-learn's whitening of the same patches."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import mixlab
from mixlab.data.dataset import Split
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.reading import load_examples
from mixlab.models.catalog import create_model
from mixlab.report.screen import Screen
from mixlab.training.whitening import whiten_stem

PREPROCESS = ImagePreprocess(image_size=(16, 16), channels=3, mean=(0.4,) * 3, std=(0.2,) * 3)
QUIET = Screen(quiet=True)


@pytest.fixture
def images():
    """Images whose neighbours are alike, as those of photos are."""
    noise = np.random.default_rng(0).normal(size=(300, 19, 19, 3))
    smooth = sum(noise[:, i : i + 16, j : j + 16] for i in range(4) for j in range(4))
    pixels = np.clip(110 + 12 * smooth, 0, 255).astype(np.uint8)
    split = Split(names=tuple(map(str, range(300))), labels=np.zeros(300, np.int64), arrays=pixels)
    return load_examples(split, PREPROCESS)


@pytest.mark.parametrize("name", ["mixer_pico4", "mixer_pyramid_micro2"])
def test_distances_of_patches_are_those_of_whitened_ones(images, name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=2, image_size=(16, 16)).eval()
    drawn = model.stem.weight.detach().flatten(1).double()
    whiten_stem(model, images)
    image = PREPROCESS.to_input(images.kept)
    side = model.config.patch_size
    patches = torch.nn.functional.unfold(image, side, stride=side).transpose(1, 2).flatten(0, 1).numpy()
    with torch.no_grad():
        tokens = model.stem(image).flatten(2).transpose(1, 2).flatten(0, 1).double()
    assert tokens.mean(dim=0).abs().max() < 1e-3
    # The stem's own map, undone: what is left are white patches, up to a rotation and the floor of the variances.
    white = tokens @ torch.linalg.pinv(drawn).T
    expected = PCA(whiten=True).fit_transform(patches)
    lengths = white.norm(dim=1).numpy() / np.linalg.norm(expected, axis=1)
    if drawn.shape[0] >= drawn.shape[1]:  # else a part of each patch is out of sight
        np.testing.assert_allclose(lengths, 1.0, atol=0.05)
    np.testing.assert_allclose(
        torch.cov(tokens.T), drawn @ drawn.T, atol=0.05 * float((drawn @ drawn.T).max())
    )


def test_a_run_begins_with_it_in_the_same_way_each_time(tmp_path):
    options = {"whiten_stem": True, "threads": 1, "epochs": None, "batch_size": 64}
    whole = mixlab.train(
        "digits", "digits", run=tmp_path / "whole", screen=QUIET, figures=False, steps=6, **options
    )
    again = mixlab.train(
        "digits", "digits", run=tmp_path / "again", screen=QUIET, figures=False, steps=6, **options
    )
    plain = mixlab.train(
        "digits",
        "digits",
        run=tmp_path / "plain",
        screen=QUIET,
        figures=False,
        steps=6,
        **options | {"whiten_stem": False},
    )
    kernels = [mixlab.load(run["run"]).model.stem.weight for run in (whole, again, plain)]
    assert torch.equal(kernels[0], kernels[1])
    assert not torch.equal(kernels[0], kernels[2])


def test_one_picture_without_any_variance_leaves_finite_weights(images):
    model = create_model("mixer_pico4", num_classes=2, image_size=(16, 16))
    one = np.zeros((1, 16, 16, 3), np.uint8)
    split = Split(names=("0",), labels=np.zeros(1, np.int64), arrays=one)
    whiten_stem(model, load_examples(split, PREPROCESS))
    assert torch.isfinite(model.stem.weight).all()
    assert torch.isfinite(model.stem.bias).all()


def test_only_a_mixer_drawn_at_first_is_whitened(tmp_path):
    options = {
        "recipe": "digits",
        "data": "digits",
        "screen": QUIET,
        "steps": 1,
        "epochs": None,
        "batch_size": 8,
    }
    options |= {"threads": 1, "lr": 1e-9, "warmup_fraction": 0.0, "ema_decay": 0.0}
    vit = {"model__name": "timm/baseline_vit_micro", "model__patch_size": 2, "cutmix_alpha": 0.0}
    stems = [
        mixlab.load(
            mixlab.train(run=tmp_path / str(on), whiten_stem=on, figures=False, **options | vit)["run"]
        ).model.patch_embed
        for on in (True, False)
    ]
    assert torch.equal(stems[0].proj.weight, stems[1].proj.weight)
    first = mixlab.train(run=tmp_path / "first", whiten_stem=True, figures=False, **options)["run"]
    then = mixlab.train(
        run=tmp_path / "then", whiten_stem=True, init_from=str(first), figures=False, **options
    )["run"]
    kernels = [mixlab.load(run).model.stem.weight for run in (first, then)]
    assert torch.allclose(*kernels, atol=1e-6)

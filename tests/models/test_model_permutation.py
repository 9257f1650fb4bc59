"""Permutations absorbed into weights: the same logits, exactly, and the same training; what cannot be absorbed."""

import copy

import numpy as np
import pytest
import timm
import torch

from mixlab.data.images.permutation import PixelPermutation
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model
from mixlab.models.permutation import absorb, prove

SIZE = (16, 24)
PERMUTATION = PixelPermutation(kind="patches_and_pixels", patch_size=4, seed=1)
ORDERS = PERMUTATION.patch_order(SIZE), PERMUTATION.pixel_order()


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def mixer(**settings):
    return randomised(create_model("mixer_nano4", num_classes=5, image_size=SIZE, num_blocks=3, **settings))


def vit(**settings):
    name = "vit_tiny_patch16_224"
    return randomised(
        timm.create_model(name, img_size=SIZE, patch_size=4, depth=3, num_classes=5, **settings)
    )


MODELS = {
    "mixer": mixer,
    "mixer with erf": lambda: mixer(gelu="erf"),
    "vit with a class token": vit,
    "vit with mean pooling": lambda: vit(class_token=False, global_pool="avg"),
    "vit with registers": lambda: vit(reg_tokens=3),
    "vit without position for the class": lambda: vit(no_embed_class=True),
}


def images(count=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, *SIZE, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_absorbed_weights_give_the_same_logits_on_permuted_images(make):
    model = make()
    proof = prove(model, absorb(model, *ORDERS), images(), PERMUTATION.apply)
    assert proof["max_difference"] <= 1e-12
    assert proof["control"] > 1e-3
    assert proof["largest_logit"] > 0.1
    assert proof["same_top1"] == proof["num_images"] == 4


def test_every_block_of_a_mixer_sees_the_same_tokens_in_the_new_order():
    # The second token-mixing bias never reaches the logits: only here is it seen.
    model = mixer()
    before, after = (
        model.intermediates(images()),
        absorb(model, *ORDERS).intermediates(PERMUTATION.apply(images())),
    )
    for one, two in zip(before, after, strict=True):
        assert (two - one[:, torch.from_numpy(ORDERS[0])]).abs().max() <= 1e-12


def test_the_original_weights_are_left_alone():
    model = mixer()
    state = copy.deepcopy(model.state_dict())
    absorb(model, *ORDERS)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "make", [pytest.param(mixer, id="mixer"), pytest.param(vit, id="vit", marks=pytest.mark.slow)]
)
def test_training_from_absorbed_weights_follows_the_same_losses(make):
    model = make()
    twin = absorb(model, *ORDERS)
    label = torch.arange(8) % 5
    losses = []
    for one, image in ((model, images(8)), (twin, PERMUTATION.apply(images(8)))):
        optimizer = torch.optim.AdamW(one.train().parameters(), lr=1e-3, weight_decay=0.05)
        seen = []
        for _ in range(20):
            loss = torch.nn.functional.cross_entropy(one(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(seen)
    assert np.abs(np.subtract(*losses)).max() <= 1e-10
    assert losses[0][-1] < 0.8 * losses[0][0]


@pytest.mark.parametrize("kind", ["per_patch", "global"])
def test_other_permutations_cannot_be_absorbed(kind):
    # Not by these orders, and not by any stem: patches that were equal are different patches afterwards, so no
    # function of the patch alone can give them the same token again.
    other = PixelPermutation(kind=kind, patch_size=4, seed=1)
    model = mixer()
    orders = other.patch_order(SIZE), other.pixel_order()
    assert prove(model, absorb(model, *orders), images(), other.apply)["max_difference"] > 1e-3
    one_patch = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    tokens = model.embed(one_patch.tile(1, 1, 4, 6))
    assert (tokens - tokens[:, :1]).abs().max() < 1e-12
    permuted = model.embed(other.apply(one_patch.tile(1, 1, 4, 6)))
    assert (permuted - permuted[:, :1]).abs().amax(dim=2).gt(1e-3).sum() >= 20
    same = model.embed(PERMUTATION.apply(one_patch.tile(1, 1, 4, 6)))
    assert (same - same[:, :1]).abs().max() < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda: create_model("timm/resnet10t", num_classes=5, image_size=SIZE),
        lambda: create_model("mixer_nano4", image_size=SIZE, token_mixing="blocks", token_groups=2),
        lambda: vit(pos_embed="none"),
    ],
    ids=["resnet", "variant", "vit without positions"],
)
def test_models_that_cannot_absorb_say_so(make):
    with pytest.raises(UsageError, match="cannot absorb"):
        absorb(make(), *ORDERS)


@pytest.mark.parametrize("orders", [(ORDERS[0][:-1], ORDERS[1]), (ORDERS[0], ORDERS[1] * 0)])
def test_what_is_no_permutation_is_refused(orders):
    with pytest.raises(UsageError, match="no permutation"):
        absorb(mixer(), *orders)

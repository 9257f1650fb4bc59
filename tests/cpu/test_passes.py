"""The passes for training give the model's own logits and gradients, whatever is switched on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixlab.cpu.cores import Cores
from mixlab.cpu.passes import Passes, is_plain
from mixlab.models.catalog import create_model
from mixlab.models.mixer import Mixer

CASES = {
    "tanh": ("mixer_micro4", (32, 32), {}),
    "erf, one channel, oblong": ("mixer_pico2", (8, 12), {"gelu": "erf", "in_channels": 1, "layer_norm_eps": 1e-5}),
    "stochastic depth": ("mixer_pico2", (12, 8), {"stochastic_depth": 0.6}),
    "pyramid": ("mixer_pyramid_micro2", (8, 12), {"stage_blocks": (1, 2), "hidden_dim": 12}),
    "pyramid with erf and dropped branches": (
        "mixer_pyramid_micro2", (12, 8), {"stage_blocks": (1, 1), "gelu": "erf", "stochastic_depth": 0.6},
    ),
    "pyramid with full token mixing": (
        "mixer_pyramid_micro2", (8, 8), {"stage_blocks": (1, 1), "stage_mixing": "full", "local": "none"},
    ),
    "blocks computed again": ("mixer_pico2", (8, 8), {"stochastic_depth": 0.6, "checkpoint": True}),
}  # fmt: skip


def drawn(name: str, size: tuple[int, int], **options) -> Mixer:
    """A model whose every parameter is drawn, so that nothing that is left out goes unseen."""
    torch.manual_seed(1)
    again = options.pop("checkpoint", False)
    model = create_model(name, num_classes=7, image_size=size, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    model.checkpoint_blocks = again
    return model


def batch(model: Mixer, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(num_images, model.config.in_channels, *model.config.image_size)
    return image, F.one_hot(torch.arange(num_images) % 7, 7).float()


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets.to(logits.dtype) * logits.log_softmax(1)).sum() / len(logits)


def exact_gradients(model: Mixer, image: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    """In float64, by torch's own operations, with the same draws."""
    twin = copy.deepcopy(model).double()
    keep = Passes(model).draw(len(image))
    for block, *kept in zip(twin.blocks, keep[::2], keep[1::2], strict=True):
        given = iter(kept * 2)  # once more where the block is computed again
        block.drop.forward = lambda branch, given=given: (
            branch if (mask := next(given)) is None else branch * mask
        )
    mean_loss(twin(image.double()), target).backward()
    return [p.grad for p in twin.parameters()]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_models(case, threads):
    name, size, options = CASES[case]
    model = drawn(name, size, **options)
    image, target = batch(model, 37)
    torch.manual_seed(3)
    expected = exact_gradients(model, image, target)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cores = Cores(model)
        cores._at_once = 5
        torch.manual_seed(3)
        loss, correct = cores.backward(image, target, mean_loss)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert 0 <= int(correct) <= 37
    assert float(loss) > 0
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        difference = float((parameter.grad - gradient).abs().max())
        assert difference <= 2e-5 * max(float(gradient.abs().max()), 5e-3 * largest), (
            name
        )  # some are zero by nature


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_nearer_than_torchs_own(case):
    """The error of all gradients against float64, beside that of torch's autocast, whose head is bfloat16 too."""
    name, size, options = CASES[case]
    model = drawn(name, size, **{**options, "stochastic_depth": 0.0})
    image, target = batch(model, 37)
    expected = torch.cat([gradient.flatten() for gradient in exact_gradients(model, image, target)])
    Cores(model, torch.bfloat16).backward(image, target, mean_loss)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image)
    mean_loss(logits.float(), target).backward()
    torchs = torch.cat([p.grad.flatten() for p in model.parameters()])
    mine, other = ((found - expected).norm() / expected.norm() for found in (ours, torchs))
    assert 1e-4 < mine < min(other, 0.01)


def test_logits_are_the_models_and_another_size_is_refused():
    model = drawn("mixer_nano4", (28, 20))
    image, _ = batch(model, 3)
    with torch.no_grad():
        assert (Passes(model)(image) - model(image)).abs().max() < 1e-4
        with pytest.raises(Exception, match="takes images of 28x20"):
            Passes(model)(image.transpose(2, 3))


def test_frozen_layers_get_no_gradient_and_gradients_add_up():
    model = drawn("mixer_pico2", (8, 8))
    for parameter in [*model.stem.parameters(), *model.blocks[0].parameters()]:
        parameter.requires_grad_(False)
    image, target = batch(model, 9)
    cores = Cores(model)
    cores.backward(image, target, mean_loss)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    cores.backward(image, target, mean_loss)
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert model.blocks[0].token_mixing.fc1.weight.grad is None
    assert len(once) == sum(p.requires_grad for p in model.parameters())
    for one, two in zip(once, twice, strict=True):
        assert (one * 2 - two).abs().max() <= 1e-5 * two.abs().max().clamp(min=1e-3)


def test_the_same_draws_as_the_model_itself():
    model = drawn("mixer_pico2", (8, 8), stochastic_depth=0.7)
    image, _ = batch(model, 16)
    found = []
    for forward in (model, Passes(model)):
        torch.manual_seed(5)
        found.append(forward(image))
    assert (found[0] - found[1]).abs().max() < 1e-4
    assert (found[0] - model(image)).abs().max() > 1e-2


def test_only_a_plain_mixer_in_float32_is_taken():
    assert is_plain(create_model("mixer_pico2", num_classes=3, image_size=(8, 8)))
    assert not is_plain(create_model("mixer_pico2", num_classes=3, image_size=(8, 8), token_mixing="untied"))
    assert not is_plain(create_model("mixer_pico2", num_classes=3, image_size=(8, 8)).double())
    assert not is_plain(nn.Linear(2, 2))

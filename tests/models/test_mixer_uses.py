"""What people expect of a model: block outputs, features, a new head, less memory, export, low precision."""

import pytest
import torch

from mixlab.models.catalog import create_model, mixer_config, settings_of
from mixlab.models.mixer import Mixer


def random_mixer(dtype=torch.float32, **settings) -> Mixer:
    torch.manual_seed(0)
    model = create_model("mixer_nano4", num_classes=7, image_size=(16, 12), num_blocks=3, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def test_intermediates_are_the_stem_and_every_block_and_lead_to_the_features():
    model = random_mixer()
    image = torch.randn(2, 3, 16, 12)
    outputs = model.intermediates(image)
    assert [tuple(x.shape) for x in outputs] == [(2, 12, 128)] * 4
    assert torch.equal(outputs[0], model.stem(image).flatten(2).transpose(1, 2))
    assert torch.equal(outputs[2], model.blocks[1](outputs[1]))
    assert torch.equal(model.pre_head_norm(outputs[-1]).mean(dim=1), model.features(image))
    assert torch.equal(model.head(model.features(image)), model(image))


def test_blocks_computed_again_in_the_backward_pass_give_the_same_gradients():
    image = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    gradients = []
    for again in (False, True):
        model = random_mixer(torch.float64, stochastic_depth=0.5).train()
        model.checkpoint_blocks = again
        torch.manual_seed(3)  # the second computation must drop the same branches
        model(image).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_blocks_computed_again_keep_less_for_the_backward_pass():
    def kept(again: bool) -> int:
        model = random_mixer().train()
        model.checkpoint_blocks = again
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(torch.randn(8, 3, 16, 12))
        return sum(sizes)

    assert kept(True) < kept(False) / 3


def test_a_new_head_starts_at_zero_and_leaves_the_rest():
    model = random_mixer(head_bias=-2.0)
    image = torch.randn(2, 3, 16, 12)
    features = model.features(image)
    model.reset_head(4)
    assert torch.equal(model(image), torch.full((2, 4), -2.0))
    assert torch.equal(model.features(image), features)
    assert model.config.num_classes == 4


def test_the_same_seed_gives_the_same_model():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(create_model("mixer_pico2", num_classes=3).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["stem.weight"], models[2]["stem.weight"])


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_a_mixer_can_be_exported_with_a_free_batch_size(gelu):
    model = random_mixer(gelu=gelu)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.randn(2, 3, 16, 12),), dynamic_shapes=({0: batch},))
    image = torch.randn(5, 3, 16, 12)
    assert (exported.module()(image) - model(image)).abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_low_precision_stays_near(dtype, bound):
    model = random_mixer()
    image = torch.randn(16, 3, 16, 12)
    exact = model(image)
    with torch.autocast("cpu", dtype):
        low = model(image).float()
    relative = ((low - exact).norm() / exact.norm()).item()
    assert 0 < relative < bound


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mixer_b16", {}),
        ("mixer_h14", {"gelu": "erf"}),
        ("mixer_custom4", {"hidden_dim": 12, "num_blocks": 2, "token_mlp_dim": 5, "channel_mlp_dim": 7}),
    ],
)
def test_dimensions_and_settings_say_the_same(name, overrides):
    from mixlab.models.catalog import ModelConfig

    config = mixer_config(ModelConfig(name=name, **overrides), num_classes=3)
    settings = settings_of(config)
    assert settings["name"] == name
    with torch.device("meta"):
        assert create_model(**settings).config == config


def test_erf_and_tanh_differ_as_published():
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    from mixlab.models.layers import ACTIVATIONS

    erf, tanh = (ACTIVATIONS[name].function(x) for name in ("erf", "tanh"))
    assert (erf - tanh).abs().max().item() == pytest.approx(4.7e-4, rel=0.02)

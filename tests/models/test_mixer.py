"""The Mixer: the paper's counts, its defining properties, and the authors' own numbers."""

import math

import pytest
import torch
from torch import nn

from mixlab.cpu.cost import measure_cost
from mixlab.errors import UsageError
from mixlab.models.catalog import MODELS, create_model, display_name, mixer_config
from mixlab.models.layers import StochasticDepth, gelu_tanh
from mixlab.models.mixer import Mixer, MixerConfig

# name: parameters without head, with a head of 1000 classes, multiply-accumulates with it.
# The paper's sizes: facts from Table 1, computed from its dimensions and equal to the constants in the
# authors' tests for B/16, B/32 and L/16; MACs to three digits. Ours: by the same formula, below.
COUNTS = {
    "mixer_s32": (18_591_624, 19_104_624, 1.00e9),
    "mixer_s16": (18_015_264, 18_528_264, 3.78e9),
    "mixer_s8": (20_133_504, 20_646_504, 14.87e9),
    "mixer_b32": (59_524_428, 60_293_428, 3.24e9),
    "mixer_b16": (59_111_472, 59_880_472, 12.60e9),
    "mixer_l32": (205_914_264, 206_939_264, 11.25e9),
    "mixer_l16": (207_171_168, 208_196_168, 44.55e9),
    "mixer_h14": (431_069_952, 432_350_952, 120.99e9),
    "mixer_nano4": (1_130_880, 1_259_880, 0.0762e9),
    "mixer_mini4": (305_536, 434_536, 0.0215e9),
    "mixer_micro4": (188_320, 285_320, 0.0130e9),
    "mixer_pico2": (72_576, 137_576, 0.0014e9),
}


@pytest.fixture
def tiny() -> Mixer:
    torch.manual_seed(0)
    model = Mixer(
        MixerConfig(
            image_size=(8, 12),
            patch_size=4,
            hidden_dim=10,
            token_mlp_dim=7,
            channel_mlp_dim=16,
            num_blocks=2,
            num_classes=5,
        )
    )
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def test_every_named_model_has_its_counts():
    assert set(COUNTS) == {name for name in MODELS if "pyramid" not in name}  # test_pyramid.py has those


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_macs_are_exactly_the_papers(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=1000)
    without_head, with_head, macs = COUNTS[name]
    cost = measure_cost(model, model.config.image_size)
    assert cost.num_parameters == with_head
    assert with_head - (model.config.hidden_dim + 1) * 1000 == without_head
    assert cost.macs == pytest.approx(macs, rel=0.005 if macs > 1e7 else 0.05)
    assert cost.flops == 2 * cost.macs
    assert cost.macs == macs_by_formula(model.config)


def macs_by_formula(config: MixerConfig) -> int:
    s, c = config.num_patches, config.hidden_dim
    stem = s * config.patch_size**2 * config.in_channels * c
    token, channel = 2 * s * c * config.token_mlp_dim, 2 * s * c * config.channel_mlp_dim
    return stem + config.num_blocks * (token + channel) + c * config.num_classes


def test_any_patch_size_image_shape_and_channel_count_can_be_named():
    model = create_model("mixer_nano8", image_size=(24, 40), num_classes=3, in_channels=1)
    assert model(torch.zeros(2, 1, 24, 40)).shape == (2, 3)
    assert model.config.num_patches == 15


def silence(mlp):
    for parameter in mlp.fc2.parameters():
        torch.nn.init.zeros_(parameter)


def test_channel_mixing_sees_one_patch_at_a_time(tiny):
    block = tiny.blocks[0]
    silence(block.token_mixing)
    x_BSC = torch.randn(3, 6, 10)
    order = torch.randperm(6)
    assert torch.allclose(block(x_BSC[:, order]), block(x_BSC)[:, order], atol=1e-6)


def test_token_mixing_sees_one_channel_at_a_time(tiny):
    block = tiny.blocks[0]
    silence(block.channel_mixing)
    block.token_norm = torch.nn.Identity()  # the norm is over channels
    x_BSC = torch.randn(3, 6, 10)
    changed = x_BSC.clone()
    changed[:, :, 4] += 1
    difference = (block(changed) - block(x_BSC)).abs().amax(dim=(0, 1))
    assert difference[4] > 0.1
    assert difference[torch.arange(10) != 4].max() == 0


def test_features_are_the_mean_over_tokens_of_the_last_norm(tiny):
    image = torch.randn(2, 3, 8, 12)
    tokens = []
    tiny.pre_head_norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    features = tiny.features(image)
    assert torch.equal(features, tokens[0].mean(dim=1))
    assert torch.equal(tiny(image), tiny.head(features))


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = create_model("mixer_b16", num_blocks=6, num_classes=10, head_bias=-6.9)
    assert model.head.weight.abs().max() == 0
    assert torch.all(model.head.bias == -6.9)
    kernels = {"stem": model.stem.weight, "fc1": model.blocks[3].token_mixing.fc1.weight}
    kernels["fc2"] = model.blocks[5].channel_mixing.fc2.weight
    for weight in kernels.values():
        fan_in = weight[0].numel()
        assert weight.std().item() == pytest.approx(math.sqrt(1 / fan_in), rel=0.01)
        assert weight.abs().max().item() <= 2 * math.sqrt(1 / fan_in) / 0.8796256610342398 + 1e-6
    biases = [
        p for name, p in model.named_parameters() if name.endswith("bias") and not name.startswith("head")
    ]
    assert all(bias.abs().max() == 0 for bias in biases)


def test_gelu_in_training_is_torchs_tanh_gelu_in_value_and_gradient():
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64, requires_grad=True)
    ours, theirs = gelu_tanh(x), torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    weight = torch.linspace(-1, 2, 4001, dtype=torch.float64)
    (our_gradient,) = torch.autograd.grad((ours * weight).sum(), x)
    (their_gradient,) = torch.autograd.grad((theirs * weight).sum(), x)
    assert torch.allclose(our_gradient, their_gradient, rtol=0, atol=1e-13)
    single = x.detach().float().requires_grad_()
    assert torch.allclose(gelu_tanh(single), torch.nn.functional.gelu(single, approximate="tanh"), atol=5e-6)
    assert (gelu_tanh(x) - torch.nn.functional.gelu(x)).abs().max() > 1e-4  # the erf form is another function


def test_norms_have_the_authors_epsilon(tiny):
    norms = [module for module in tiny.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 5
    assert {norm.eps for norm in norms} == {1e-6}


def test_stochastic_depth_grows_linearly_over_blocks():
    with torch.device("meta"):
        model = create_model("mixer_b16", stochastic_depth=0.1)
    assert [block.drop.drop_prob for block in model.blocks] == pytest.approx(
        [0.1 * i / 11 for i in range(12)]
    )


def test_stochastic_depth_drops_whole_images_without_rescaling():
    torch.manual_seed(0)
    drop = StochasticDepth(0.3)
    branch_BSC = torch.ones(4000, 2, 3)
    kept = drop(branch_BSC)
    per_image = kept.flatten(1)
    assert torch.all((per_image == 0).all(dim=1) | (per_image == 1).all(dim=1))
    assert per_image[:, 0].mean().item() == pytest.approx(0.7, abs=0.03)
    assert torch.equal(drop.eval()(branch_BSC), branch_BSC)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mixer_s16", "image_size": 225}, "not a multiple"),
        ({"name": "mixer_s16", "image_size": 8}, "smaller than one patch"),
        ({"name": "mixer_s_16"}, "mixer_s16"),
        ({"name": "resnet18"}, "no model called 'resnet18' (model); did you mean 'timm/resnet18'?"),
        ({"name": "timm/resnet81"}, "resnet18"),
        ({"name": "mixer_s16", "hidden_dims": 3}, "hidden_dim"),
        ({"name": "mixer_s16", "stochastic_depth": 1.0}, "stochastic_depth"),
    ],
)
def test_wrong_settings_are_named_with_the_remedy(settings, message):
    with pytest.raises(UsageError) as error:
        create_model(**settings)
    assert message in str(error.value)


def test_a_wrong_image_shape_is_an_error_with_both_shapes(tiny):
    with pytest.raises(UsageError, match="8x12") as error:
        tiny(torch.zeros(1, 3, 12, 8))
    assert "12x8" in str(error.value)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_timm_models_come_through_the_same_door(name):
    model = create_model(name, num_classes=7, image_size=(32, 32)).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_display_names_are_the_papers(name):
    config = mixer_config_of(name)
    assert display_name(name).lower().replace("-", "_").replace("/", "") == name
    assert display_name(name).endswith(f"/{config.patch_size}")


def mixer_config_of(name):
    from mixlab.models.catalog import ModelConfig

    return mixer_config(ModelConfig(name=name), num_classes=10)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_tokens_that_a_mask_leaves_out_change_nothing_and_a_mask_of_all_is_none(checkpoint):
    torch.manual_seed(0)
    model = create_model("mixer_pico2", num_classes=4, image_size=(8, 8))
    nn.init.normal_(model.head.weight)
    model.checkpoint_blocks = checkpoint
    x_BSC = torch.randn(3, 16, 64)
    mask_BS = torch.arange(16) < torch.tensor([[16], [9], [1]])
    other_BSC = torch.where(mask_BS[..., None], x_BSC, torch.randn(3, 16, 64))

    def logits(x_BSC, mask_BS=None):
        return model.head(model.pool(model.trunk(x_BSC, mask_BS), mask_BS))

    masked = logits(x_BSC, mask_BS)
    assert torch.equal(masked, logits(other_BSC, mask_BS))
    assert not torch.allclose(logits(x_BSC)[1:], masked[1:], atol=1e-3)
    assert torch.allclose(logits(x_BSC), logits(x_BSC, torch.ones(3, 16, dtype=torch.bool)), atol=1e-6)
    masked.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.blocks.parameters())

"""Token-mixing variants: their counts, what they equal in their simplest case, and that they learn."""

import pytest
import torch

from mixlab.cpu.cost import measure_cost
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model, settings_of
from mixlab.models.mixer import Mixer
from mixlab.models.variants import VariantMixer

S, C, D, H, L, P, K = (
    24,
    12,
    7,
    20,
    4,
    4,
    5,
)  # tokens, channels, token and channel widths, blocks, patch, classes
DIMENSIONS = {
    "num_classes": K,
    "image_size": (16, 24),
    "hidden_dim": C,
    "token_mlp_dim": D,
    "channel_mlp_dim": H,
    "num_blocks": L,
}
VARIANTS = [("untied", 1), ("grouped", 3), ("projected", 3), ("shrinking", 2), ("blocks", 2)]


def make(token_mixing: str, groups: int, **settings) -> Mixer:
    torch.manual_seed(0)
    return create_model(
        "mixer_custom4", token_mixing=token_mixing, token_groups=groups, **(DIMENSIONS | settings)
    )


def randomised(model: Mixer) -> Mixer:
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def token_mlp(width: int, hidden: int) -> int:
    return width * hidden * 2 + hidden + width


# By hand: parameters of the token mixing of all blocks, and its multiply-accumulates for one image.
COUNTS = {
    "untied": (L * C * token_mlp(S, D), L * 2 * C * S * D),
    "grouped": (L * token_mlp(3 * S, D), L * 2 * (C // 3) * 3 * S * D),
    "projected": (L * (token_mlp(3 * S, D) + C * C + C), L * (2 * (C // 3) * 3 * S * D + S * C * C)),
    # two blocks on 24 tokens, one from 24 to 6, one on 6
    "shrinking": (
        2 * token_mlp(S, D) + (S * D + D + D * 6 + 6) + token_mlp(6, D),
        2 * 2 * C * S * D + C * (S * D + D * 6) + 2 * C * 6 * D,
    ),
    "blocks": (L * 4 * token_mlp(S // 4, D), L * 2 * C * S * D),
}


@pytest.mark.parametrize(("token_mixing", "groups"), VARIANTS)
def test_parameters_and_macs_are_those_of_the_formula(token_mixing, groups):
    model = make(token_mixing, groups)
    cost = measure_cost(model, (16, 24))
    tokens = [S, S, 6, 6] if token_mixing == "shrinking" else [S] * L
    others = L * (2 * C * H + H + C + 4 * C) + (P * P * 3 * C + C) + 2 * C + (C * K + K)
    assert cost.num_parameters == COUNTS[token_mixing][0] + others
    channel = sum(2 * s * C * H for s in tokens)
    assert cost.macs == COUNTS[token_mixing][1] + channel + S * P * P * 3 * C + C * K


@pytest.mark.parametrize(("token_mixing", "groups"), VARIANTS)
def test_a_few_steps_lower_the_loss(token_mixing, groups):
    model = make(token_mixing, groups, stochastic_depth=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    image, label = torch.randn(8, 3, 16, 24), torch.arange(8) % K
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(float(K)).log().item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("token_mixing", "groups"), VARIANTS)
def test_settings_and_state_make_the_same_model_again(token_mixing, groups):
    model = randomised(make(token_mixing, groups, gelu="erf"))
    with torch.device("meta"):
        again = create_model(**settings_of(model.config))
    assert isinstance(again, VariantMixer)
    again.load_state_dict(model.state_dict(), assign=True)
    image = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    assert torch.equal(again.eval()(image), model(image))
    assert [x.shape[1] for x in model.intermediates(image)][-1] == (6 if token_mixing == "shrinking" else S)


@pytest.mark.parametrize("token_mixing", ["grouped", "projected", "shrinking", "blocks", "untied"])
def test_the_simplest_case_is_the_plain_mixer(token_mixing):
    plain = randomised(create_model("mixer_custom4", **DIMENSIONS))
    variant = make(token_mixing, 1).double().eval()
    state = dict(plain.state_dict())
    for block in range(L):
        start = f"blocks.{block}.token_mixing."
        for layer in ("fc1", "fc2"):
            for part in ("weight", "bias"):
                value = plain.state_dict()[f"{start}{layer}.{part}"]
                if token_mixing in ("blocks", "untied"):  # one copy, or the same one for every channel
                    del state[f"{start}{layer}.{part}"]
                    copies = 1 if token_mixing == "blocks" else C
                    state[f"{start}{layer}_{part}"] = value.expand(copies, *value.shape).clone()
                elif token_mixing in ("grouped", "projected"):
                    del state[f"{start}{layer}.{part}"]
                    state[f"{start}mlp.{layer}.{part}"] = value
        if token_mixing == "projected":
            state[f"{start}projection.weight"] = torch.eye(C, dtype=torch.float64)
            state[f"{start}projection.bias"] = torch.zeros(C, dtype=torch.float64)
    variant.load_state_dict(state)
    image = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    assert (variant(image) - plain(image)).abs().max() < 1e-12


def test_untied_channels_do_not_share_and_groups_mix_only_neighbours():
    model = randomised(make("untied", 1))
    mixing = model.blocks[0].token_mixing
    x = torch.randn(1, C, S, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    assert (mixing(changed) - mixing(x)).abs().amax(dim=(0, 2)).gt(0).nonzero().flatten().tolist() == [4]
    mixing = randomised(make("grouped", 3)).blocks[0].token_mixing
    assert (mixing(changed) - mixing(x)).abs().amax(dim=(0, 2)).gt(0).nonzero().flatten().tolist() == [
        3,
        4,
        5,
    ]


@pytest.mark.parametrize(("token_mixing", "groups"), VARIANTS)
def test_mlps_side_by_side_start_as_each_alone_would(token_mixing, groups):
    torch.manual_seed(0)
    model = create_model(
        "mixer_custom4",
        token_mixing=token_mixing,
        token_groups=groups,
        **(DIMENSIONS | {"token_mlp_dim": 64, "branch_init_scale": 0.5}),
    )
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.0.token_mixing") and name.endswith("weight"):
            second = "fc2" in name
            expected = (0.5 if second else 1.0) * parameter.shape[-1] ** -0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        elif name.startswith("blocks.0.token_mixing"):
            assert not parameter.any()


@pytest.mark.parametrize(
    ("token_mixing", "groups", "message"),
    [
        ("grouped", 5, "hidden_dim"),
        ("blocks", 3, "grid"),
        ("shrinking", 4, "grid"),
        ("shrinking", 9, "grid"),
        ("grouped", 0, "at least 1"),
        ("shared", 2, "only a variant of token mixing has token_groups"),
    ],
)
def test_groups_that_do_not_fit_are_refused(token_mixing, groups, message):
    with pytest.raises(UsageError, match=message):
        make(token_mixing, groups)

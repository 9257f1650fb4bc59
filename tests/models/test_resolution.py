"""Other resolutions: the paper's Appendix C exactly, and resampling with the properties it promises."""

import pytest
import torch
import torch.nn.functional as F

from mixlab.cpu.cost import measure_cost
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model
from mixlab.models.grids import resize_matrix
from mixlab.models.mixer import Mixer
from mixlab.models.resolution import densify, extend, resample


def random_mixer(image_size=(8, 12), **settings) -> Mixer:
    torch.manual_seed(0)
    settings = {"hidden_dim": 12, "token_mlp_dim": 9, "channel_mlp_dim": 20, "num_blocks": 3} | settings
    model = create_model("mixer_custom4", num_classes=5, image_size=image_size, **settings).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_bigger_image_gives_the_mean_over_its_sub_images(factor, sparse):
    model = random_mixer()
    big = image(8 * factor, 12 * factor)
    parts = [
        model(big[:, :, 8 * i : 8 * i + 8, 12 * j : 12 * j + 12])
        for i in range(factor)
        for j in range(factor)
    ]
    expected = torch.stack(parts).mean(dim=0)
    found = extend(model, factor, sparse=sparse)(big)
    assert (found - expected).abs().max() <= 1e-10
    assert expected.abs().max() > 0.1


def test_the_same_matrix_in_raster_order_fails():
    model = random_mixer()
    big = image(16, 24)
    right = extend(model, 2, sparse=False)
    wrong = random_mixer((16, 24), token_mlp_dim=36)
    state = dict(model.state_dict())
    for name, tensor in model.state_dict().items():
        if ".token_mixing." in name:
            four = [tensor] * 4
            state[name] = torch.block_diag(*four) if tensor.ndim == 2 else torch.cat(four)
    wrong.load_state_dict(state)
    assert (wrong(big) - right(big)).abs().max() > 0.01


def test_the_blocks_and_the_matrix_are_one_function_at_different_costs():
    model = random_mixer()
    sparse, dense = extend(model, 2, sparse=True), extend(model, 2, sparse=False)
    for parameter in sparse.parameters():  # also when the copies have learnt apart
        torch.nn.init.normal_(parameter, std=0.3)
    assert (densify(sparse)(image(16, 24)) - sparse(image(16, 24))).abs().max() < 1e-12
    tokens, c, d, blocks = 24, 12, 9, 3
    one, two = (measure_cost(m.float(), (16, 24)).macs for m in (sparse, dense))
    assert two - one == blocks * 2 * c * (tokens * 4 * d - tokens * d)
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_the_papers_l16_at_448_costs_what_it_should():
    with torch.device("meta"):
        dense = create_model("mixer_l16", image_size=448, token_mlp_dim=4 * 512)
        sparse = create_model("mixer_l16", image_size=448, token_mixing="blocks", token_groups=2)
        small = create_model("mixer_l16")
    costs = [measure_cost(model, (448, 448)) for model in (dense, sparse)]
    before = measure_cost(small, (224, 224)).macs
    assert costs[0].macs == pytest.approx(237e9, rel=0.005)
    assert costs[0].macs / before == pytest.approx(5.3, abs=0.05)
    assert costs[0].num_parameters - 1025 * 1000 == pytest.approx(279.5e6, rel=0.001)
    assert costs[1].macs / before == pytest.approx(4.0, abs=0.01)


def test_the_same_grid_and_patch_give_the_same_bits():
    model = random_mixer()
    again = resample(model, (8, 12))
    assert again.config == model.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("sizes", [(7, 7), (5, 9), (9, 5), (14, 28), (28, 14), (1, 4), (4, 1), (18, 14)])
def test_what_is_constant_stays_constant(sizes):
    rows = resize_matrix(*sizes).sum(dim=1)
    assert resize_matrix(*sizes).shape == sizes
    assert (rows - 1).abs().max() < 1e-12


@pytest.mark.parametrize(("size_out", "size_in"), [(4, 8), (2, 8), (3, 9)])
def test_shrinking_by_a_whole_factor_is_average_pooling_and_growing_is_torchs_bicubic(size_out, size_in):
    signal = torch.randn(1, 1, size_in, dtype=torch.float64)
    pooled = F.avg_pool1d(signal, size_in // size_out)
    assert (resize_matrix(size_out, size_in) @ signal[0, 0] - pooled[0, 0]).abs().max() < 1e-12
    tall = signal[0, 0, :size_out].expand(1, 1, 1, -1)
    grown = F.interpolate(tall, size=(1, size_in), mode="bicubic")[0, 0, 0]
    assert (resize_matrix(size_in, size_out) @ tall[0, 0, 0] - grown).abs().max() < 1e-12


@pytest.mark.parametrize("factor", [2, 3])
def test_larger_patches_are_the_old_model_on_the_averaged_picture(factor):
    model = random_mixer()
    large = resample(model, (8 * factor, 12 * factor), patch_size=4 * factor)
    picture = image(8 * factor, 12 * factor)
    assert large.config.grid == model.config.grid
    assert (large(picture) - model(F.avg_pool2d(picture, factor))).abs().max() < 1e-10


def test_smaller_patches_are_the_old_model_on_patches_that_were_enlarged():
    model = random_mixer()
    small = resample(model, (4, 6), patch_size=2)
    picture = image(4, 6)
    patches = picture.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, rows, columns, 2, 2)
    enlarged = F.interpolate(patches.reshape(-1, 1, 2, 2), size=(4, 4), mode="bicubic")
    whole = enlarged.reshape(2, 3, 2, 3, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 8, 12)
    assert (small(picture) - model(whole)).abs().max() < 1e-10


def test_a_finer_grid_reads_repeated_tokens_as_the_old_grid_read_them():
    model = random_mixer()
    fine = resample(model, (16, 36))
    assert (fine.config.grid, fine.config.token_mlp_dim) == ((4, 9), 9)
    tokens = torch.randn(2, 12, 2, 3, dtype=torch.float64)
    repeated = tokens.repeat_interleave(2, dim=2).repeat_interleave(3, dim=3)
    for old, new in zip(model.blocks, fine.blocks, strict=True):
        hidden = old.token_mixing.fc1(tokens.flatten(2))
        assert (new.token_mixing.fc1(repeated.flatten(2)) - hidden).abs().max() < 1e-12
        # and what it writes, seen at the old resolution, is near what the old one wrote
        written = new.token_mixing(repeated.flatten(2)).view(2, 12, 4, 9)
        assert written.shape == (2, 12, 4, 9)


def test_up_and_down_again_is_close_to_identity():
    model = random_mixer((56, 56), token_mlp_dim=16)
    grid = torch.linspace(0, 1, 14, dtype=torch.float64)
    smooth = torch.stack(
        [torch.cos(3.14 * (a * grid[:, None] + b * grid)) for a in range(4) for b in range(4)]
    )
    for kind, bound in (("smooth", 0.03), ("noise", 0.3)):
        with torch.no_grad():
            for block in model.blocks:
                if kind == "smooth":
                    block.token_mixing.fc1.weight.copy_(smooth.flatten(1))
                    block.token_mixing.fc2.weight.copy_(smooth.flatten(1).T)
                else:
                    torch.nn.init.normal_(block.token_mixing.fc1.weight)
        again = resample(resample(model, (112, 112)), (56, 56))
        old, new = model.blocks[0].token_mixing.fc1.weight, again.blocks[0].token_mixing.fc1.weight
        error = ((new - old).norm() / old.norm()).item()
        assert 0 < error < bound


@pytest.mark.parametrize("image_size", [(288, 448), (224, 320), (96, 96)])
def test_any_shape_works(image_size):
    with torch.device("meta"):
        model = create_model("mixer_s32", num_classes=3)
    small = create_model("mixer_custom32", num_classes=3, image_size=224, num_blocks=1, hidden_dim=8,
                         token_mlp_dim=4, channel_mlp_dim=8).eval()  # fmt: skip
    again = resample(small, image_size)
    assert again(torch.zeros(1, 3, *image_size)).shape == (1, 3)
    assert again.config.num_patches == image_size[0] // 32 * (image_size[1] // 32)
    assert model.config.grid == (7, 7)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m: resample(m, (9, 12)), "multiple"),
        (lambda m: resample(m, (8, 12), patch_size=5), "multiple"),
        (lambda m: resample(extend(m, 2, sparse=True), (8, 12)), "plain Mixer"),
        (lambda m: extend(m, 0, sparse=False), "at least 1"),
        (lambda m: extend(extend(m, 2, sparse=True), 2, sparse=True), "plain Mixer"),
    ],
)
def test_what_cannot_be_done_is_said(action, message):
    with pytest.raises(UsageError, match=message):
        action(random_mixer())

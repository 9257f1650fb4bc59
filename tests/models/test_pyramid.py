"""The pyramid: its corner is the Mixer, its parts are what they say, and its symmetries are these and no others."""

import itertools

import numpy as np
import pytest
import torch

from mixlab.cpu.cost import measure_cost
from mixlab.cpu.passes import is_plain
from mixlab.data.images.permutation import PixelPermutation
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model, display_name, settings_of
from mixlab.models.permutation import absorb
from mixlab.models.pyramid import PyramidMixer, shift
from mixlab.models.resolution import resample

SIZE = (16, 16)


def pyramid(image_size=SIZE, stages=(1, 2), **settings) -> PyramidMixer:
    torch.manual_seed(0)
    settings = {"hidden_dim": 10, "channel_mlp_dim": 23, "token_mlp_dim": 9} | settings
    model = create_model(
        "mixer_pyramid_micro2", num_classes=5, image_size=image_size, stage_blocks=stages, **settings
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    assert isinstance(model, PyramidMixer)
    return model.double().eval()


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(3, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_with_everything_switched_off_it_is_the_mixer():
    flat = create_model("mixer_micro4", num_classes=5, branch_init_scale=1.0)
    corner = create_model(
        "mixer_pyramid_custom4", num_classes=5, stage_blocks=(4,), stage_mixing="full", local="none",
        hidden_dim=96, token_mlp_dim=64, channel_mlp_dim=192,
    )  # fmt: skip
    torch.nn.init.normal_(flat.head.weight)
    corner.load_state_dict(flat.state_dict())
    assert torch.equal(corner(torch.ones(2, 3, 32, 32)), flat(torch.ones(2, 3, 32, 32)))


def test_a_shift_takes_from_each_neighbour_and_zeros_from_outside():
    x = torch.arange(2 * 3 * 4 * 7, dtype=torch.float32).reshape(
        2, 3, 4, 7
    )  # seven channels: one each way, three stay
    moved = shift(x)
    for row, column, channel in itertools.product(range(3), range(4), range(7)):
        away = [(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0), (0, 0)][channel]
        source = (row + away[0], column + away[1])
        inside = 0 <= source[0] < 3 and 0 <= source[1] < 4
        expected = x[:, source[0], source[1], channel] if inside else torch.zeros(2)
        assert torch.equal(moved[:, row, column, channel], expected)


@pytest.mark.parametrize(("name", "side"), [("mixer_pyramid_micro2", 32), ("mixer_pyramid_t4", 224)])
def test_parameters_and_products_of_the_named_sizes_are_those_of_the_formulas(name, side):
    with torch.device("meta"):
        model = create_model(name, num_classes=10)
    config = model.config
    width, hidden, grid = config.hidden_dim, config.channel_mlp_dim, side // config.patch_size
    parameters = 3 * config.patch_size**2 * width + width
    macs = grid**2 * 3 * config.patch_size**2 * width
    for stage, blocks in enumerate(config.stage_blocks):
        if stage:
            parameters += 2 * 4 * width + 4 * width * 2 * width + 2 * width
            width, hidden, grid = 2 * width, 2 * hidden, grid // 2
            macs += grid**2 * 2 * width * width
        parameters += blocks * (4 * width + 2 * grid**2 + 2 * width * hidden + hidden + width)
        macs += blocks * grid**2 * (2 * grid * width + 2 * width * hidden)
    parameters += 2 * width + 10 * width + 10
    macs += 10 * width
    cost = measure_cost(model, (side, side))
    assert (cost.num_parameters, cost.macs) == (parameters, macs)


@pytest.mark.parametrize("local", ["none", "shift"])
@pytest.mark.parametrize("stage_mixing", ["full", "axial"])
@pytest.mark.parametrize("stages", [(2,), (1, 1)])
def test_every_combination_of_switches_learns_one_batch(stages, stage_mixing, local):
    torch.manual_seed(0)
    model = create_model(
        "mixer_pyramid_micro2", num_classes=4, image_size=(8, 8), stage_blocks=stages, stage_mixing=stage_mixing,
        local=local, hidden_dim=16,
    )  # fmt: skip
    assert is_plain(model)
    pictures, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pictures), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_settings_are_found_again_from_the_model():
    model = pyramid(stages=(1, 3), local="none", gelu="erf")
    again = create_model(**settings_of(model.config))
    assert again.config == model.config
    assert settings_of(create_model("mixer_pyramid_nano2").config)["name"] == "mixer_pyramid_nano2"
    assert display_name("mixer_pyramid_nano2") == "Mixer-Pyramid-Nano/2"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stages": (1, 0)}, "do not make"),
        ({"image_size": (12, 16), "stages": (1, 1, 1)}, "multiples of 4, it is 6x8"),
        ({"token_mixing": "untied"}, "only a variant of token mixing has token_mixing"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_reason(settings, words):
    with pytest.raises(UsageError, match=words):
        pyramid(**settings)
    with pytest.raises(UsageError, match="only a pyramid"):
        create_model("mixer_micro4", local="shift")


# ---- resolution


def resized(signal: np.ndarray, size: int) -> np.ndarray:
    """A 1-D signal at another number of samples: means over areas, or cubic (Keys, a = -0.75) interpolation."""
    tensor = torch.from_numpy(signal)[None, None, None]
    if size < len(signal):
        return torch.nn.functional.adaptive_avg_pool2d(tensor, (1, size))[0, 0, 0].numpy()
    return torch.nn.functional.interpolate(tensor, size=(1, size), mode="bicubic")[0, 0, 0].numpy()


def test_axial_maps_are_read_and_written_along_their_axis_at_another_size():
    model = pyramid(stages=(1, 1))
    larger = resample(model, (32, 24))
    assert larger(image(32, 24)).shape == (3, 5)
    for block, factor in ((0, 1), (1, 2)):
        for axis, new in (("columns", 16 // factor), ("rows", 12 // factor)):
            old_map = getattr(model.blocks[block].token_mixing, axis).weight.detach().numpy()
            new_map = getattr(larger.blocks[block].token_mixing, axis).weight.detach().numpy()
            signal = np.random.default_rng(0).normal(size=new)
            if new % len(old_map):
                continue  # areas that share samples: _resize's own test has those
            expected = resized(old_map @ resized(signal, len(old_map)), new)
            assert np.abs(new_map @ signal - expected).max() < 1e-12


def test_the_same_size_keeps_every_bit():
    model = pyramid(stage_mixing="full")
    for name, tensor in resample(model, SIZE).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


# ---- symmetries

GRID = 8  # of SIZE in patches of 2
NUMBERS = np.arange(GRID * GRID).reshape(GRID, GRID)
PIXELS = PixelPermutation(kind="patches_and_pixels", patch_size=2, seed=3).pixel_order()


def ordered(pictures: torch.Tensor, patch_order: np.ndarray, pixel_order: np.ndarray) -> torch.Tensor:
    """The images with their patches of 2 x 2, and the pixels in each, in another order."""
    patches = (
        pictures.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3).flatten(3)[:, :, patch_order][..., pixel_order]
    )
    grid = patches.unflatten(3, (2, 2)).unflatten(2, (GRID, GRID))
    return grid.permute(0, 1, 2, 4, 3, 5).reshape(pictures.shape)


def shuffled(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).permutation(*shape)


def blocks_of(side: int) -> np.ndarray:
    """Blocks of side x side patches in another order, inside of each one and the same other order."""
    count = GRID // side
    blocks = NUMBERS.reshape(count, side, count, side).transpose(0, 2, 1, 3).reshape(count**2, side**2)
    order = blocks[shuffled(count**2)][:, shuffled(side**2)]
    return order.reshape(count, count, side, side).transpose(0, 2, 1, 3).reshape(-1)


ROWS = NUMBERS[shuffled(GRID)][:, shuffled(GRID)[::-1]].reshape(-1)
PAIRS = np.array([5, 4, 1, 0, 7, 6, 3, 2])  # keeps pairs of neighbours together, mirrored
PAIRED = NUMBERS[PAIRS][:, PAIRS].T.reshape(-1)
SQUARE = {
    f"{turns} quarter turns{', mirrored' * mirrored}": np.rot90(
        NUMBERS[:, ::-1] if mirrored else NUMBERS, turns
    )
    for turns in range(4)
    for mirrored in (False, True)
}
ORDERS = {
    "any": shuffled(GRID * GRID),
    "blocks of 2": blocks_of(2),
    "rows and columns": ROWS,
    "rows and columns, pairs kept": PAIRED,
} | {name: order.reshape(-1) for name, order in SQUARE.items()}
FULL, AXIAL, SHIFT = {"stage_mixing": "full", "local": "none"}, {"local": "none"}, {}
HAS = [
    (FULL, (2,), {"any", "blocks of 2", "rows and columns", "rows and columns, pairs kept", *SQUARE}),
    (FULL, (1, 1), {"blocks of 2", "rows and columns, pairs kept", *SQUARE}),
    (AXIAL, (2,), {"rows and columns", "rows and columns, pairs kept", *SQUARE}),
    (AXIAL, (1, 1), {"rows and columns, pairs kept", *SQUARE}),
    (SHIFT, (2,), set(SQUARE)),
    (SHIFT, (1, 1), set(SQUARE)),
    (SHIFT | {"stage_mixing": "full"}, (1, 1), set(SQUARE)),
]


@pytest.mark.parametrize(("switches", "stages", "symmetries"), HAS)
def test_it_absorbs_the_orders_it_is_symmetric_under_and_refuses_the_others(switches, stages, symmetries):
    model = pyramid(stages=stages, **switches)
    pictures = image(*SIZE)
    expected = model(pictures)
    for name, order in ORDERS.items():
        order = np.ascontiguousarray(order)
        if name not in symmetries:
            with pytest.raises(UsageError, match="absorb"):
                absorb(model, order, PIXELS)
            continue
        permuted = ordered(pictures, order, PIXELS)
        assert (absorb(model, order, PIXELS)(permuted) - expected).abs().max() < 1e-12, name
        assert (model(permuted) - expected).abs().max() > 1e-3

"""`mixlab study filters`: numbers of planted weights whose answer is known, and images of what was asked for."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights, save_weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model, settings_of
from mixlab.report.study_figures import stem_filters, unit_pictures
from mixlab.studies.harness import Options, conduct
from mixlab.studies.questions.filters import STUDY
from mixlab.studies.rows import read_rows
from mixlab.studies.units import cosines, frequencies, measure, paired, shuffled, spreads

GRID = (8, 8)


def waves(numbers, noise=0.0, seed=0):
    """Cosines of so many waves along the rows and columns of the grid, each with its inverse behind it."""
    rows, columns = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    pictures = [np.cos(2 * np.pi * (a * rows + b * columns) / 8) for a, b in numbers]
    units = np.stack([sign * picture for picture in pictures for sign in (1, -1)]).reshape(-1, 64)
    return units + noise * np.random.default_rng(seed).standard_normal(units.shape)


def test_planted_pairs_are_counted_and_nothing_else():
    planted = waves([(0, 1), (1, 1), (2, 0), (3, 2)], noise=0.05)
    lonely = np.random.default_rng(1).standard_normal((12, 64))
    found = measure(np.concatenate([planted, lonely]), GRID)
    assert found.units == 20
    assert found.opposed == pytest.approx(8 / 20)
    assert found.mutual_pairs == 4
    assert measure(lonely, GRID).opposed == 0
    assert measure(shuffled(planted, seed=3), GRID).opposed == 0


def test_the_frequency_of_a_wave_is_its_own():
    numbers = [(0, 1), (2, 0), (3, 0), (2, 2)]
    expected = [np.hypot(a, b) / 8 for a, b in numbers for _ in range(2)]
    assert frequencies(waves(numbers), GRID) == pytest.approx(expected)
    assert frequencies(np.ones((1, 64)), GRID) == pytest.approx([0])
    checkers = np.indices(GRID).sum(axis=0) % 2 * 2.0 - 1
    assert frequencies(checkers.reshape(1, 64), GRID) == pytest.approx([np.hypot(0.5, 0.5)])


def test_a_single_patch_has_no_spread_and_equal_weights_have_one():
    one = np.zeros((1, 64))
    one[0, 27] = -3.0
    assert spreads(one, GRID) == pytest.approx([0])
    assert spreads(np.ones((1, 64)), GRID) == pytest.approx([1])
    corners = np.zeros((8, 8))
    corners[[0, 0, 7, 7], [0, 7, 0, 7]] = 1
    assert spreads(corners.reshape(1, 64), GRID)[0] > 1


def test_pairs_are_of_closest_inverses_low_frequencies_first():
    numbers = [(3, 2), (0, 1), (2, 0)]
    units = waves(numbers, noise=0.01)
    order = np.random.default_rng(0).permutation(len(units))
    pairs = paired(units[order], GRID)
    assert [sorted(order[pair] // 2) for pair in pairs] == [[1, 1], [2, 2], [0, 0]]
    cosine = cosines(units[order])
    assert all(cosine[a, b] < -0.99 for a, b in pairs)


@pytest.fixture
def planted(tmp_path):
    torch.manual_seed(0)
    model = create_model("mixer_custom4", num_classes=3, image_size=32, num_blocks=2, hidden_dim=8,
                         token_mlp_dim=12, channel_mlp_dim=16)  # fmt: skip
    with torch.no_grad():
        model.blocks[0].token_mixing.fc1.weight.copy_(
            torch.from_numpy(waves([(0, 1), (1, 0), (1, 1), (2, 1), (0, 3), (4, 4)], noise=0.01))
        )
    weights = Weights(
        model=model,
        model_settings=settings_of(model.config),
        preprocess=ImagePreprocess(image_size=(32, 32)),
        class_names=("a", "b", "c"),
        provenance={"data": "planted"},
    )
    save_weights(tmp_path / "weights", weights)
    return tmp_path / "weights"


def test_the_study_tells_planted_weights_from_drawn_ones(planted, tmp_path):
    result = conduct(STUDY, Options(subject=str(planted), out=tmp_path / "out", smoke=True))
    first, second = result["tables"][0]["rows"]
    assert first["opposite partner, %: trained"] == "100.0"
    assert first["mutual pairs: trained"] == "6.0"
    assert first["opposite partner, %: shuffled"] == "0.0"
    assert second["opposite partner, %: trained"] == "0.0"
    assert result["findings"][0]["verdict"] == "holds"
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert names == {"units-1.png", "units-2.png", "units-drawn.png", "stem.png", "layers.png"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "pairs of opposite phase" in page
    assert "100.0 %" in page
    json.dumps(result, allow_nan=False)


def test_the_checkpoints_of_a_run_are_measured_one_by_one(planted, tmp_path):
    """A run: its weights, and checkpoints in which the planted layer comes to be."""
    tensors = open_weights(planted).model.state_dict()
    key = "blocks.0.token_mixing.fc1.weight"
    final, noise = tensors[key], torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(1))
    for step, share in ((10, 0.0), (20, 1.0)):
        folder = planted / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        save_file(tensors | {key: share * final + (1 - share) * noise}, folder / "model.safetensors")
    coarse = planted / "checkpoints" / "step_00000005"  # of a curriculum, with other shapes
    coarse.mkdir()
    save_file(tensors | {key: torch.zeros(12, 16)}, coarse / "model.safetensors")
    conduct(STUDY, Options(subject=str(planted), out=tmp_path / "out", smoke=True))
    rows = [row for row in read_rows(tmp_path / "out/filters.csv") if row["weights"] == "checkpoint"]
    assert [(row["step"], row["layer"]) for row in rows] == [
        ("10", "1"),
        ("10", "2"),
        ("20", "1"),
        ("20", "2"),
    ]
    assert [float(row["opposed"]) for row in rows if row["layer"] == "1"] == [0.0, 1.0]
    assert (tmp_path / "out/figures/history.png").stat().st_size > 5_000


def test_every_unit_and_filter_is_drawn_on_its_own_scale():
    units = np.arange(200 * 4, dtype=float).reshape(200, 4) - 300
    pairs = np.arange(200).reshape(100, 2)
    (image,) = unit_pictures(units, pairs, (2, 2)).axes[0].images
    drawn = np.asarray(image.get_array().filled(np.nan))
    assert np.isfinite(drawn).sum() == 200 * 4
    assert np.nanmax(np.abs(drawn)) == 1
    filters = np.random.default_rng(0).standard_normal((600, 3, 4, 4))
    (image,) = stem_filters(filters).axes[0].images
    assert image.get_array().shape == (19 * 5, 32 * 5, 3)
    assert np.isclose(image.get_array()[:4, :4].min(), 0)
    assert np.isclose(image.get_array()[:4, :4].max(), 1)


def test_weights_without_such_units_are_refused(tmp_path):
    model = create_model("mixer_pyramid_micro2", num_classes=3)
    weights = Weights(
        model=model,
        model_settings=settings_of(model.config),
        preprocess=ImagePreprocess(image_size=(32, 32)),
        class_names=("a", "b", "c"),
        provenance={},
    )
    save_weights(tmp_path / "weights", weights)
    with pytest.raises(UsageError, match="no token-mixing MLPs over all patches"):
        conduct(STUDY, Options(subject=str(tmp_path / "weights"), out=tmp_path / "out"))
    with pytest.raises(UsageError, match="looks at weights"):
        conduct(STUDY, Options(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()

"""The Mixer against arrays computed by the authors' own code (../shared/reference), where they are present."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.formats import draw, draw_images
from mixlab.checkpoint.layouts import OFFICIAL
from mixlab.checkpoint.open import open_weights
from mixlab.models.catalog import create_model
from mixlab.models.layers import StochasticDepth
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.training.losses import LossConfig, loss_per_batch

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
PARTS = {"LayerNorm_0": "token_norm", "LayerNorm_1": "channel_norm", "Dense_0": "fc1", "Dense_1": "fc2"}


def our_name(key: str) -> str:
    """`MixerBlock_2/token_mixing/Dense_0/kernel` -> `blocks.2.token_mixing.fc1.weight`."""
    names = [PARTS.get(part, part) for part in key.split("/")]
    names[-1] = {"kernel": "weight", "scale": "weight"}.get(names[-1], names[-1])
    names[0] = names[0].replace("MixerBlock_", "blocks.").replace("pre_head_layer_norm", "pre_head_norm")
    return ".".join(names)


def our_array(value: np.ndarray) -> torch.Tensor:
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)  # HWIO -> OIHW, (in, out) -> (out, in)
    return torch.from_numpy(np.ascontiguousarray(value.transpose(axes) if axes else value))


@pytest.fixture(params=["square16", "square32", "rect16x32"])
def case(request):
    folder = REFERENCE / request.param
    if not folder.exists():
        pytest.skip("the reference arrays ../shared/reference are not here")
    sizes = json.loads((REFERENCE / "configs.json").read_text())[request.param]
    model = Mixer(
        MixerConfig(
            image_size=(sizes["height"], sizes["width"]),
            patch_size=sizes["patch_size"],
            hidden_dim=sizes["hidden_dim"],
            token_mlp_dim=sizes["tokens_mlp_dim"],
            channel_mlp_dim=sizes["channels_mlp_dim"],
            num_blocks=sizes["num_blocks"],
            num_classes=sizes["num_classes"],
        )
    )
    weights = np.load(folder / "weights.npz")
    model.load_state_dict({our_name(key): our_array(weights[key]) for key in weights.files})
    batch = np.load(folder / "batch.npz")
    image = torch.from_numpy(batch["images"].transpose(0, 3, 1, 2).copy())
    return folder, model.eval(), image, torch.from_numpy(batch["labels"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_logits_and_pre_logits_are_the_authors(case, dtype, tolerance):
    folder, model, image, _ = case
    expected = np.load(folder / "expected.npz")
    model, image = model.to(dtype), image.to(dtype)
    with torch.no_grad():
        assert np.abs(model(image).numpy() - expected["logits_f64"]).max() <= tolerance
        assert np.abs(model.features(image).numpy() - expected["pre_logits_f64"]).max() <= tolerance


# dtype, then tolerances of: loss, a gradient relative to its largest value, the one that is zero, the input's
PRECISIONS = [(torch.float32, 1e-6, 2e-5, 1e-6, 1e-6), (torch.float64, 1e-12, 1e-11, 1e-14, 1e-12)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_in_training_are_the_authors(case, precision):
    folder, model, image, label = case
    check_gradients(
        model, image, precision, np.load(folder / "grad_softmax.npz"), lambda y: F.cross_entropy(y, label)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", ["square16"], indirect=True)  # the only one they are there for
def test_gradients_of_the_sigmoid_loss_are_the_authors(case, precision):
    folder, model, image, label = case
    target = F.one_hot(label, 10).to(precision[0])

    def sigmoid_loss(logits):
        return loss_per_batch(logits, target, LossConfig(name="sigmoid"))

    dtype, loss_tolerance, *rest = precision
    check_gradients(
        model, image, (dtype, 10 * loss_tolerance, *rest), np.load(folder / "grad_sigmoid.npz"), sigmoid_loss
    )


def check_gradients(model, image, precision, expected, loss_of):
    dtype, loss_tolerance, tolerance, zero_tolerance, input_tolerance = precision
    model, image = model.to(dtype).train(), image.to(dtype).requires_grad_()
    loss = loss_of(model(image))
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), abs=loss_tolerance)
    parameters = dict(model.named_parameters())
    for key in expected.files:
        if not key.startswith("grad/"):
            continue
        theirs = our_array(expected[key])
        ours = parameters[our_name(key.removeprefix("grad/"))].grad
        largest = theirs.abs().max().item()
        if key.endswith("token_mixing/Dense_1/bias"):  # its true gradient is zero
            assert ours.abs().max().item() <= zero_tolerance
        else:
            assert (ours - theirs).abs().max().item() <= tolerance * largest, key
    theirs = expected["input"].transpose(0, 3, 1, 2)
    assert np.abs(image.grad.numpy() - theirs).max() <= input_tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stem_and_every_block_give_what_the_authors_do(case, dtype):
    # The second token-mixing bias never reaches the logits: only here is it seen.
    folder, model, image, _ = case
    expected = np.load(folder / "expected.npz")
    with torch.no_grad():
        stem, *blocks = model.to(dtype).intermediates(image.to(dtype))
    assert np.abs(stem.numpy() - expected["stem"].reshape(stem.shape)).max() <= 5e-6
    assert len(blocks) == 3
    for i, block in enumerate(blocks):
        assert np.abs(block.numpy() - expected[f"block_{i}"]).max() <= 5e-5


def reference_file(*parts: str) -> Path:
    path = REFERENCE.joinpath(*parts)
    if not path.exists():
        pytest.skip("the reference arrays ../shared/reference are not here")
    return path


def test_stochastic_depth_is_the_authors_with_their_own_draws(monkeypatch):
    expected = np.load(reference_file("training", "stochastic_depth.npz"))
    path = reference_file("square16", "weights.npz")
    config = replace(open_weights(path).model.config, stochastic_depth=float(expected["stoch_depth"]))
    model = Mixer(config)
    model.load_state_dict(open_weights(path).model.state_dict())
    masks = iter(torch.from_numpy(expected["keep"]).reshape(-1, 4))  # block, then token before channel mixing

    def draw(self, branch):
        keep = next(masks) if self.drop_prob else next(masks) * 0 + 1
        return branch * keep.view(-1, 1, 1).to(branch.dtype)

    monkeypatch.setattr(StochasticDepth, "forward", draw)
    image = torch.from_numpy(
        np.load(path.parent / "batch.npz")["images"].transpose(0, 3, 1, 2).copy()
    ).double()
    model = model.double().train()
    with torch.no_grad():
        features = model.features(image)
    assert np.abs(features.numpy() - expected["pre_logits_f64"]).max() <= 1e-12
    assert np.abs(model.head(features).detach().numpy() - expected["logits_f64"]).max() <= 1e-12
    assert next(masks, None) is None


def test_our_own_draws_drop_whole_branches_without_rescaling():
    drop = StochasticDepth(0.3).train()
    torch.manual_seed(0)
    branch = drop(torch.ones(20_000, 2, 3))
    assert set(branch.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(branch[:, 0, 0], branch.amax(dim=(1, 2)))
    assert branch[:, 0, 0].mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(drop.eval()(branch + 1), branch + 1)


def test_every_block_has_the_authors_drop_probability():
    cases = json.loads(reference_file("training", "schedules.json").read_text())["stochastic_depth"]
    assert len(cases) >= 5
    for case in cases:
        config = MixerConfig(
            image_size=(8, 8), patch_size=4, hidden_dim=4, token_mlp_dim=2, channel_mlp_dim=4, num_classes=2,
            num_blocks=case["num_blocks"], stochastic_depth=case["stoch_depth"],
        )  # fmt: skip
        ours = [block.drop.drop_prob for block in Mixer(config).blocks]
        assert ours == pytest.approx(case["drop_prob"], abs=1e-12)


def test_a_fresh_s16_has_the_authors_statistics():
    expected = json.loads(reference_file("training", "init_statistics.json").read_text())
    torch.manual_seed(0)
    state = create_model("mixer_s16").state_dict()
    for key, facts in expected.items():
        ours = state[our_name(key)].double()
        assert ours.numel() == np.prod(facts["shape"])
        if facts["std"] == 0:  # zeros and ones
            assert ours.min() == ours.max() == facts["mean"]
            continue
        # Two independent draws of n values: standard errors of std and of mean, five of them.
        error = facts["std"] / ours.numel() ** 0.5
        assert ours.std().item() == pytest.approx(facts["std"], abs=5 * error)
        assert ours.mean().item() == pytest.approx(facts["mean"], abs=8 * error)
        assert ours.abs().max().item() == pytest.approx(
            facts["absmax"], rel=0.01
        )  # truncated at two deviations


@pytest.mark.parametrize("name", ["S_16", pytest.param("B_16", marks=pytest.mark.slow)])
def test_full_size_models_are_the_authors(name):
    path = reference_file("full_size", f"{name}.npz")
    with np.load(path) as arrays:
        expected = dict(arrays)
    checks = json.loads((path.parent / "draw_check.json").read_text())[name]["draws"]
    assert len(checks) >= 3
    for key, facts in checks.items():
        drawn = draw_images() if key == "image" else draw(key, tuple(facts["shape"]))
        if drawn.reshape(-1)[:3].tolist() != facts["first"]:
            pytest.skip("this NumPy draws other random numbers than the reference was made with")
    with torch.device("meta"):
        model = create_model({"S_16": "mixer_s16", "B_16": "mixer_b16"}[name])
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    keys = OFFICIAL.keys(model.config.num_blocks)
    state = {
        key: OFFICIAL.to_ours(
            key, torch.from_numpy(draw(theirs, OFFICIAL.their_shape(key, shapes[key]))), shapes[key]
        )
        for key, theirs in keys.items()
    }
    model.load_state_dict(state, assign=True)
    image = torch.from_numpy(draw_images().transpose(0, 3, 1, 2).copy())
    for dtype, logits_tolerance, features_tolerance in (
        (torch.float32, 2e-5, 5e-6),
        (torch.float64, 1e-10, 1e-11),
    ):
        model, image = model.to(dtype).eval(), image.to(dtype)
        with torch.inference_mode():
            outputs = model.intermediates(image)
            features = model.pre_head_norm(outputs[-1]).mean(dim=1)
            logits = model.head(features)
        assert np.abs(logits.double().numpy() - expected["logits_f64"]).max() <= logits_tolerance
        assert np.abs(features.double().numpy() - expected["pre_logits_f64"]).max() <= features_tolerance
        stages = [*outputs, features, logits]
        assert len(stages) == len(expected["stages"])
        tolerance = 1e-6 if dtype == torch.float32 else 1e-10
        for stage, mean, std in zip(stages, expected["stage_mean"], expected["stage_std"], strict=True):
            assert stage.double().mean().item() == pytest.approx(mean, abs=tolerance)
            assert stage.double().std(correction=0).item() == pytest.approx(std, rel=tolerance)

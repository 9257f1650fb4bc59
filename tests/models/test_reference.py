"""The Mixer against arrays computed by the authors' own code (../shared/reference), where they are present."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixlab.models.mixer import Mixer, MixerConfig

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


def test_gradients_in_training_are_the_authors(case):
    folder, model, image, label = case
    expected = np.load(folder / "grad_softmax.npz")
    model, image = model.double().train(), image.double().requires_grad_()
    loss = F.cross_entropy(model(image), label)
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), abs=1e-12)
    parameters = dict(model.named_parameters())
    for key in expected.files:
        if not key.startswith("grad/"):
            continue
        theirs = our_array(expected[key])
        ours = parameters[our_name(key.removeprefix("grad/"))].grad
        largest = theirs.abs().max().item()
        if key.endswith("token_mixing/Dense_1/bias"):  # its true gradient is zero
            assert ours.abs().max().item() <= 1e-14
        else:
            assert (ours - theirs).abs().max().item() <= 1e-11 * largest, key
    theirs = expected["input"].transpose(0, 3, 1, 2)
    assert np.abs(image.grad.numpy() - theirs).max() <= 1e-12

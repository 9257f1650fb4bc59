"""The door of the CPU engine, and what comes of a change in a model's code that no kernel knows of."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mixlab
from mixlab.cpu import agreement
from mixlab.device import multiplies_bf16
from mixlab.errors import UsageError
from tests.cpu.test_inference import trained

PACKAGE = Path(mixlab.__file__).parent


@pytest.mark.parametrize(
    ("name", "size"),
    [("mixer_micro4", (32, 32)), ("mixer_pyramid_micro2", (16, 16))],
    ids=["flat", "pyramid"],
)
def test_the_copy_has_the_models_logits_and_keeps_no_gradients(name, size):
    model = trained(name, size)
    copy = mixlab.accelerate(model)
    image = torch.randn(5, 3, *size)
    assert copy is not model
    assert list(copy.parameters()) == []
    with torch.no_grad():
        expected = model(image)
    found = copy(image)
    assert not found.requires_grad
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.skipif(not multiplies_bf16(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize("name", ["mixer_micro4", "mixer_pyramid_micro2"])
def test_bf16_is_near_and_another_function_of_the_bits(name):
    model = trained(name, (32, 32))
    image = torch.randn(37, 3, 32, 32)
    with torch.no_grad():
        expected = model(image)
    difference = (mixlab.accelerate(model, "bf16")(image) - expected).abs().max()
    assert 1e-4 < difference < 0.05 * expected.abs().max()


def test_where_bf16_is_not_the_processors_own_the_copy_is_fp32_and_it_is_said(monkeypatch):
    monkeypatch.setattr("mixlab.cpu.accelerate.multiplies_bf16", lambda: False)
    model = trained("mixer_pico2", (8, 8))
    with pytest.warns(UserWarning, match="does not multiply bf16 itself, the copy is fp32"):
        copy = mixlab.accelerate(model, "bf16")
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(copy(image), mixlab.accelerate(model)(image))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: trained("mixer_pico2", (8, 8), token_mixing="untied"), "no kernels for a VariantMixer"),
        (lambda: trained("mixer_pico2", (8, 8)).double(), "float64, not float32"),
        (lambda: trained("mixer_pico2", (8, 8)).to("meta"), "on meta, not on the CPU"),
        (lambda: nn.Linear(2, 2), "no kernels for a Linear"),
    ],
    ids=["variant", "float64", "another device", "another model"],
)
def test_where_there_is_no_copy_the_model_itself_comes_back_with_the_reason(make, reason):
    model = make()
    with pytest.warns(UserWarning, match=reason):
        assert mixlab.accelerate(model) is model


def test_a_block_of_a_strangers_own_has_no_kernel():
    model = trained("mixer_pico2", (8, 8))
    model.blocks[1].channel_mixing = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    with pytest.warns(UserWarning, match="no kernels for its Sequential"):
        assert mixlab.accelerate(model) is model


def head_of_its_own(model):
    model.head = nn.Sequential(nn.Dropout(), nn.Linear(64, 7))


def norm_of_its_own(model):
    model.blocks[0].token_norm = nn.RMSNorm(64)


def hook(model):
    model.blocks[1].register_forward_hook(lambda module, given, found: found * 2)


def no_bias(model):
    model.head = nn.Linear(64, 7, bias=False)


def layers_of_its_own(model):
    model.blocks[0].channel_mixing.fc1 = nn.Sequential(nn.Linear(64, 128))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (head_of_its_own, "its head is a Sequential"),
        (norm_of_its_own, "its blocks.0.token_norm is a RMSNorm"),
        (hook, "there is a hook on its blocks.1"),
        (no_bias, "its head has no bias"),
        (layers_of_its_own, "its blocks.0.channel_mixing.fc1 is a Sequential"),
    ],
)
def test_a_model_that_somebody_changed_is_left_to_torch(change, reason):
    model = trained("mixer_pico2", (8, 8))
    change(model)
    with pytest.warns(UserWarning, match=reason):
        assert mixlab.accelerate(model) is model


def test_a_copy_stays_in_its_mode_and_refuses_other_sizes():
    for name, size, other in (("mixer_pico2", (8, 16), (16, 8)), ("mixer_pyramid_micro2", (8, 16), (16, 8))):
        copy = mixlab.accelerate(trained(name, size, stochastic_depth=0.9))
        image = torch.randn(9, 3, *size)
        expected = copy(image)
        copy.train()
        assert torch.equal(copy(image), expected)
        with pytest.raises(UsageError, match="takes images of 8x16"):
            copy(torch.randn(9, 3, *other))


def test_what_is_no_model_is_a_type_error():
    with pytest.raises(TypeError, match="model"):
        mixlab.accelerate("mixer_b16")


def test_wherever_it_is_asked_for_the_kernels_can_be_tried_and_no_draw_of_others_is_changed():
    model, image = trained("mixer_pico2", (8, 8)), torch.randn(2, 3, 8, 8)
    agreement._agree.cache_clear()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            copy = mixlab.accelerate(model)
        drawn = torch.rand(3, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert copy is not model
    assert torch.equal(drawn, expected)
    with torch.no_grad():
        assert (copy(image) - model(image)).abs().max() < 1e-4


def test_an_unknown_precision_is_refused():
    with pytest.raises(UsageError, match="no precision 'int8'"):
        mixlab.accelerate(trained("mixer_pico2", (8, 8)), "int8")


def changed_tree(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the package in which one file says something else."""
    shutil.copytree(
        PACKAGE, folder / "mixlab", ignore=shutil.ignore_patterns("shipped", "__pycache__", "page")
    )
    path = folder / "mixlab" / file
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))
    return folder


def answers(tree: Path, options: str = "") -> dict:
    """Of a small Mixer in the package at `tree`: how far everything that computes it is from the model itself."""
    code = f"""
import json, warnings
import numpy as np, onnxruntime, torch, torch.nn.functional as F
import mixlab
from mixlab.cpu.cores import Cores
from mixlab.cpu.passes import why_not
from mixlab.exports.runtimes import to_onnx
from mixlab.training.engines.by_cpu import dtype_of
from mixlab.training.recipe import Recipe
torch.manual_seed(0)
model = mixlab.create_model("mixer_pico2", num_classes=5, image_size=(8, 8), in_channels=1, num_blocks=2{options})
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
image, target = torch.randn(7, 1, 8, 8), F.one_hot(torch.arange(7) % 5, 5).float()
logits = model(image)
F.cross_entropy(logits, target).backward()
own = torch.cat([p.grad.flatten() for p in model.parameters()])
warnings.simplefilter("ignore")
fast = mixlab.accelerate(model.eval())(image)
to_onnx(model, image, __import__("pathlib").Path("model.onnx"))
exported = onnxruntime.InferenceSession("model.onnx").run(None, {{"image": image.numpy()}})[0]
reason = why_not(model)
passes = own
if "no kernel for its activation" not in str(reason):
    model.zero_grad()
    try:
        Cores(model).backward(image, target, F.cross_entropy)
        passes = torch.cat([p.grad.flatten() for p in model.parameters()])
    except RuntimeError:  # a parameter that they do not know
        passes = own + 1
print(json.dumps({{
    "file": mixlab.__file__, "reason": reason,
    "engine": dtype_of(Recipe(), model) is not None,
    "fast": float((fast - logits).abs().max()), "exported": float(np.abs(exported - logits.detach().numpy()).max()),
    "passes": float((passes - own).abs().max() / own.abs().max()),
}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["file"]).parent.parent == tree
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return F.gelu(x, approximate=\"tanh\")", "return F.relu(x)"),
        pytest.param("        return self.fc2(ACTIVATIONS[self.gelu_form].function(self.fc1(x)))",
                     "        return self.fc2(F.relu(self.fc1(x)))", marks=pytest.mark.slow),
        pytest.param(
            "        self.fc2 = nn.Linear(hidden_dim, width)\n\n    def forward(self, x: Tensor) -> Tensor:\n"
            "        return self.fc2(",
            "        self.fc2 = nn.Linear(hidden_dim, width)\n        self.scale = nn.Parameter(torch.ones(1))\n\n"
            "    def forward(self, x: Tensor) -> Tensor:\n        return self.scale * self.fc2(",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["the table's function", "the MLP's own line", "one more parameter"],
)  # fmt: skip
def test_relu_for_gelu_in_layers_alone_is_computed_by_all(old, new, tmp_path):
    """The training engine and the fast copy fall back to torch, since their kernels would give GELU's numbers."""
    tree = changed_tree(tmp_path, "models/layers.py", old, new)
    if "approximate" in old:  # the form for training stands above it, and would still be GELU
        path = tree / "mixlab" / "models" / "layers.py"
        path.write_text(
            path.read_text().replace("if x.requires_grad and x.device.type", "if False and x.device.type")
        )
    found = answers(tree)
    assert found["reason"] == "its code computes another function than the kernels"
    assert not found["engine"]
    assert found["fast"] == 0
    assert found["exported"] < 1e-4
    assert found["passes"] > 0.01  # what would have been trained in silence


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", ["", ", backward=lambda gradient, x: gradient * (x > 0), fused=('relu', '')"]
)
def test_another_activation_is_one_file(kernel, tmp_path):
    """A line of the table; with its derivative the passes have it too, at their own speed."""
    line = f'    "relu": Activation(F.relu{kernel}),'
    tree = changed_tree(tmp_path, "models/layers.py", "ACTIVATIONS = {", f"ACTIVATIONS = {{\n{line}")
    path = tree / "mixlab" / "models" / "layers.py"
    path.write_text(
        path.read_text().replace('Gelu = Literal["tanh", "erf"]', 'Gelu = Literal["tanh", "erf", "relu"]')
    )
    found = answers(tree, ", gelu='relu'")
    assert found["reason"] == (None if kernel else "there is no kernel for its activation relu")
    assert found["engine"] == bool(kernel)
    assert max(found["fast"], found["exported"], found["passes"]) < 1e-4

"""Models in other people's runtimes: the same logits, for any number of images."""

import numpy as np
import pytest
import torch

from mixlab.exports.runtimes import to_onnx, to_openvino
from mixlab.models.catalog import create_model

onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")
MODELS = {  # of one or two blocks a stage: exports take time by the block
    "flat": {"name": "mixer_nano4", "num_blocks": 2},
    "pyramid": {"name": "mixer_pyramid_micro2", "stage_blocks": (1, 1)},
    "pyramid without its switches": {
        "name": "mixer_pyramid_micro2", "stage_blocks": (1, 1), "stage_mixing": "full", "local": "none",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [kind if kind == "pyramid" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_logits_are_the_same_for_any_number_of_images(kind, tmp_path):
    torch.manual_seed(0)
    model = create_model(**MODELS[kind], num_classes=7, image_size=16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    example = torch.rand(2, 3, 16, 16)
    to_onnx(model, example, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(
        to_openvino(model, example), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for num_images in (1, 5):
        images = torch.rand(num_images, 3, 16, 16)
        with torch.inference_mode():
            expected = model(images).numpy()
        close = {"rtol": 1e-4, "atol": 1e-4 * float(np.abs(expected).max())}
        np.testing.assert_allclose(session.run(["logits"], {"image": images.numpy()})[0], expected, **close)
        np.testing.assert_allclose(compiled(images.numpy())[0], expected, **close)

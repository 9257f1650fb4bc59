"""The few-shot probe: the authors' predictions and protocol, and ridge regression as others compute it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from mixlab.data.loader import Batch
from mixlab.errors import DataError, UsageError
from mixlab.evaluation.few_shot import (
    Whitening,
    draw_support,
    extract_features,
    few_shot_accuracy,
    predict_few_shot,
    ridge_weights,
)
from mixlab.models.catalog import create_model

FEWSHOT = Path(__file__).resolve().parents[3] / "shared" / "reference" / "fewshot"


def reference(name: str):
    if not FEWSHOT.exists():
        pytest.skip("the reference arrays ../shared/reference are not here")
    return np.load(FEWSHOT / name)


@pytest.mark.parametrize("case", ["n_lt_d", "n_ge_d"])
@pytest.mark.parametrize("l2", [1024, 1])
def test_weights_and_predictions_are_the_authors(case, l2):
    arrays = reference("ridge.npz")
    x, y, test = (arrays[f"{case}/{key}"] for key in ("x_train", "y_train", "x_test"))
    num_classes = int(arrays[f"{case}/num_classes"])
    expected = arrays[f"{case}/l2_{l2}/weights"]
    (ours,) = ridge_weights(Whitening(x)(x), y, num_classes, [l2])
    assert np.abs(ours - expected).max() <= 1e-9 * np.abs(expected).max()
    (predicted,) = predict_few_shot(x, y, test, num_classes, [l2])
    assert np.array_equal(predicted, arrays[f"{case}/l2_{l2}/pred"])
    accuracy = (predicted == arrays[f"{case}/y_test"]).mean()
    assert accuracy == pytest.approx(float(arrays[f"{case}/l2_{l2}/accuracy"]), abs=1e-6)


def test_sampling_and_accuracy_follow_the_authors_protocol():
    arrays = reference("protocol.npz")
    ours = few_shot_accuracy(
        arrays["x_train"],
        arrays["y_train"],
        arrays["x_test"],
        arrays["y_test"],
        num_classes=int(arrays["num_classes"]),
        shots=arrays["shots"].tolist(),
        seeds=arrays["seeds"].tolist(),
        l2=float(arrays["l2"]),
    )
    assert ours.shape == arrays["accuracy"].shape
    assert np.abs(ours - arrays["accuracy"]).max() <= 1e-6


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_both_branches_are_ridge_regression_as_scikit_learn_computes_it(shape):
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal(shape), rng.integers(0, 4, shape[0])
    targets = np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    for strength, ours in zip((0.5, 30.0), ridge_weights(x, labels, 4, (0.5, 30.0)), strict=True):
        theirs = Ridge(alpha=strength, fit_intercept=False, solver="svd").fit(x, targets).coef_.T
        assert np.abs(ours - theirs).max() < 1e-10


def test_the_support_is_drawn_class_by_class_and_grows_with_the_shots():
    labels = np.repeat([0, 1, 2], [40, 30, 2])
    few, more = draw_support(labels, 5, 3, seed=1), draw_support(labels, 10, 3, seed=1)
    assert np.bincount(labels[few]).tolist() == [5, 5, 2]
    assert set(few) < set(more)
    assert len(set(more)) == 22
    assert not np.array_equal(few, draw_support(labels, 5, 3, seed=2))


def test_features_are_the_heads_input_of_mixers_and_of_timm_models():
    image = torch.randn(5, 3, 16, 16)
    batches = [
        Batch(image[:3], torch.arange(3), np.arange(3)),
        Batch(image[3:], torch.arange(2), np.arange(2)),
    ]
    for name, width in {"mixer_nano4": 128, "timm/vit_tiny_patch16_224": 192, "timm/resnet10t": 512}.items():
        torch.manual_seed(0)
        model = create_model(name, num_classes=4, image_size=16).train()
        head = model.head if hasattr(model, "head") else model.get_classifier()
        torch.nn.init.normal_(head.weight)
        features, labels = extract_features(model, batches, torch.device("cpu"))
        assert features.shape == (5, width)
        assert labels.tolist() == [0, 1, 2, 0, 1]
        assert model.training
        with torch.no_grad():
            logits = model.eval()(image)
            assert (head(torch.from_numpy(features)) - logits).abs().max() < 1e-5 * logits.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": np.full((6, 2), np.nan)}, DataError, "not finite"),
        ({"labels": np.zeros(6, dtype=int)}, DataError, "class 1"),
        ({"features": np.zeros((0, 2)), "labels": np.zeros(0, dtype=int)}, DataError, "no training features"),
        ({"shots": [0]}, UsageError, "shots"),
        ({"shots": []}, UsageError, "shots"),
        ({"l2": 0.0}, UsageError, "l2"),
    ],
)
def test_what_cannot_be_probed_is_refused(change, error, message):
    rng = np.random.default_rng(0)
    values = {
        "features": rng.standard_normal((6, 2)),
        "labels": np.array([0, 1, 0, 1, 0, 1]),
        "test_features": rng.standard_normal((3, 2)),
        "test_labels": np.array([0, 1, 0]),
        "num_classes": 2,
    } | change
    with pytest.raises(error, match=message):
        few_shot_accuracy(**values)

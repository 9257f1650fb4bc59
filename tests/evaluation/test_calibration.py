"""Temperature and thresholds: against other people's optimisers and on data whose answer is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torchmetrics.classification import MulticlassCalibrationError

from mixlab.evaluation.calibration import HIGHEST, LOWEST, coverage_at, find_thresholds, fit_temperature
from mixlab.evaluation.metrics import wilson_interval


def drawn(n: int, seed: int = 0, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose softmax is the true distribution of their labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_the_temperature_is_the_factor_that_true_logits_were_multiplied_by(factor: float):
    logits, label = drawn(20_000)
    assert fit_temperature(factor * logits, label) == pytest.approx(factor, rel=0.03)


def test_the_temperature_is_where_torchs_lbfgs_ends_too():
    logits, label = drawn(20_000, seed=1)
    logits = 3 * logits
    log_temperature = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], lr=0.1, max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), label)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fit_temperature(logits, label) == pytest.approx(log_temperature.exp().item(), rel=2e-3)


def test_torchmetrics_finds_a_smaller_calibration_error_on_other_images():
    logits, label = drawn(4000, seed=2)
    temperature = fit_temperature(4 * logits[:2000], label[:2000])
    error = MulticlassCalibrationError(num_classes=5, n_bins=15)
    before = error((4 * logits[2000:]).softmax(dim=1), label[2000:])
    after = error((4 * logits[2000:] / temperature).softmax(dim=1), label[2000:])
    assert before > 0.15
    assert after < 0.04


def test_a_validation_split_without_a_mistake_promises_no_certainty():
    label = torch.arange(100) % 4
    logits = 8.0 * F.one_hot(label, 4) + 0.1 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    temperature = fit_temperature(logits, label)
    confidence = (logits / temperature).softmax(dim=1).amax(dim=1).mean().item()
    assert LOWEST < temperature < HIGHEST
    assert confidence == pytest.approx(1 - 1 / 101, abs=2e-3)  # one more image, and wrong


def test_logits_that_are_not_finite_have_no_temperature():
    assert fit_temperature(torch.tensor([[math.nan, 0.0]]), torch.tensor([0])) == 1.0
    assert fit_temperature(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)) == 1.0


def test_a_threshold_is_the_lowest_that_keeps_the_promise():
    confidence = np.linspace(0.0, 0.999, 1000)
    correct = confidence >= 0.5
    found = {row["target"]: row for row in find_thresholds(confidence, correct)}
    # 500 right and w wrong above it: (w + 1) / (500 + w + 1) may be a tenth at most.
    assert found[0.9]["min_confidence"] == pytest.approx(confidence[500 - 54], abs=2e-4)
    assert found[0.9]["coverage"] == pytest.approx(554 / 1000, abs=2e-3)
    assert found[0.99]["min_confidence"] > found[0.9]["min_confidence"]
    for target, row in found.items():
        sure = coverage_at(row["min_confidence"], confidence, correct)
        assert sure["accuracy"] >= target
        assert sure["coverage"] == row["coverage"]


def test_a_threshold_holds_on_other_images():
    logits, label = drawn(8000, seed=3)
    confidence, predicted = (t.numpy() for t in logits.softmax(dim=1).max(dim=1))
    correct = predicted == label.numpy()
    for row in find_thresholds(confidence[:4000].astype(np.float64), correct[:4000]):
        sure = coverage_at(row["min_confidence"], confidence[4000:], correct[4000:])
        assert sure["coverage"] == pytest.approx(row["coverage"], abs=0.05)
        assert sure["accuracy"] > row["target"] - 0.03


def test_too_few_images_promise_nothing():
    assert find_thresholds(np.full(8, 0.9), np.ones(8, dtype=bool)) == []
    every = find_thresholds(np.full(20, 0.9), np.ones(20, dtype=bool))
    assert [(row["target"], row["min_confidence"], row["coverage"]) for row in every] == [
        (0.9, 0.0, 1.0),
        (0.95, 0.0, 1.0),
    ]


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (351, 360), (1, 2)])
def test_the_interval_is_scipys(right: int, count: int):
    theirs = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)

"""Metrics against torchmetrics and scikit-learn, which other people wrote."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from mixlab.data.loader import Batch
from mixlab.errors import DataError
from mixlab.evaluation.classify import classify
from mixlab.evaluation.metrics import summarize, wilson_interval

CLASSES = tuple("abcdefg")


class Table(torch.nn.Module):
    """Gives the logits it was made with, in order."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.position = logits, 0

    def forward(self, image):
        self.position += len(image)
        return self.logits[self.position - len(image) : self.position]


@pytest.fixture
def outcome():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(203, 7))).float() * 2
    label = torch.from_numpy(rng.choice(7, size=203, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.05, 0.05]))
    logits[torch.arange(203), label] += 1.5
    batches = [
        Batch(torch.zeros(len(part), 1), label[part], part)
        for part in np.array_split(np.arange(203), [60, 120, 180])
    ]
    return logits, label, classify(Table(logits), batches, torch.device("cpu"))


def test_ratios_equal_other_peoples(outcome):
    logits, label, predictions = outcome
    result = summarize(predictions, CLASSES)
    assert result.num_images == 203
    assert result.num_correct == int((logits.argmax(1) == label).sum())
    assert result.top1 == result.num_correct / 203
    top5 = multiclass_accuracy(logits, label, num_classes=7, top_k=5, average="micro")
    assert result.top5 == pytest.approx(top5.item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item(), rel=1e-5)
    assert result.ece == pytest.approx(
        multiclass_calibration_error(logits.softmax(1), label, 7, 15).item(), abs=1e-5
    )
    predicted = logits.argmax(1)
    assert np.array_equal(result.confusion, confusion_matrix(label, predicted, labels=range(7)))
    assert result.balanced_accuracy == pytest.approx(balanced_accuracy_score(label, predicted))
    precision, recall, f1, count = precision_recall_fscore_support(label, predicted, labels=range(7))
    for i, row in enumerate(result.per_class()):
        assert row["label"] == CLASSES[i]
        assert row["num_images"] == count[i]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx([precision[i], recall[i], f1[i]])


def test_bins_hold_every_image_once(outcome):
    bins = summarize(outcome[2], CLASSES).bins
    assert sum(row["num_images"] for row in bins) == 203
    assert all(row["lower"] <= row["confidence"] <= row["upper"] for row in bins if row["num_images"])


def test_balanced_accuracy_is_left_out_where_classes_are_of_like_size():
    logits = torch.eye(4).repeat(3, 1)
    batch = Batch(torch.zeros(12, 1), torch.arange(4).repeat(3), np.arange(12))
    result = summarize(classify(Table(logits), [batch], torch.device("cpu")), tuple("abcd"))
    assert result.balanced_accuracy is None
    assert "balanced_accuracy" not in result.to_json()


def test_a_class_without_images_has_no_recall():
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 0]), np.arange(2))
    result = summarize(
        classify(Table(torch.tensor([[2.0, 0, 0], [0, 2.0, 0]])), [batch], torch.device("cpu")), tuple("abc")
    )
    rows = result.per_class()
    assert rows[0]["recall"] == 0.5
    assert rows[1]["recall"] is None
    assert rows[2]["precision"] is None
    assert rows[2]["f1"] is None


def test_no_images_is_an_error_and_not_a_division_by_zero():
    with pytest.raises(DataError, match="no readable examples"):
        classify(Table(torch.zeros(0, 2)), [], torch.device("cpu"))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(
    ("num_correct", "num"), [(0, 1), (1, 1), (0, 12), (12, 12), (260, 357), (9838, 10000)]
)
def test_the_interval_of_an_accuracy_is_scipys(num_correct, num, confidence):
    expected = binomtest(num_correct, num).proportion_ci(confidence, method="wilson")
    found = wilson_interval(num_correct, num, confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (-1, 2), (1, 2, 1.0)])
def test_counts_that_cannot_be_have_no_interval(counts):
    with pytest.raises(DataError, match="there is no interval"):
        wilson_interval(*counts)

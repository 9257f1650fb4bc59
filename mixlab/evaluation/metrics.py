"""What a classifier's predictions are worth. Counts first, ratios last; fractions, not per cent."""

from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017
BALANCE_RATIO = 1.5  # report balanced accuracy where class counts differ by more than this


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The outcome for n images: label, predicted int64 (n,); confidence, loss float64 (n,); in_top5 bool (n,).

    index: int64 (n,), the images' numbers in their split. probability of the predicted class is `confidence`.
    """

    index: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    in_top5: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of a set of predictions; `confusion` int64 (K, K) counts, rows true, columns predicted."""

    class_names: tuple[str, ...]
    confusion: np.ndarray
    top5: float
    loss: float
    ece: float
    bins: list[dict[str, Any]]

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    @property
    def num_correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def top1(self) -> float:
        return self.num_correct / self.num_images

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean recall over the classes present; None where class counts differ by at most BALANCE_RATIO."""
        counts = self.confusion.sum(axis=1)
        present = counts > 0
        if counts[present].max() <= BALANCE_RATIO * counts[present].min():
            return None
        return float((np.diagonal(self.confusion)[present] / counts[present]).mean())

    def per_class(self) -> list[dict[str, Any]]:
        """Count, precision, recall and F1 of each class; None where a ratio has nothing to divide by."""
        rows = []
        for i, name in enumerate(self.class_names):
            correct = int(self.confusion[i, i])
            num_images, num_predicted = int(self.confusion[i].sum()), int(self.confusion[:, i].sum())
            total = num_images + num_predicted
            rows.append(
                {
                    "label": name,
                    "num_images": num_images,
                    "num_correct": correct,
                    "precision": correct / num_predicted if num_predicted else None,
                    "recall": correct / num_images if num_images else None,
                    "f1": 2 * correct / total if total else None,
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """The object that `evaluate --json` prints."""
        values: dict[str, Any] = {
            "num_images": self.num_images,
            "num_correct": self.num_correct,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "ece": self.ece,
        }
        if self.balanced_accuracy is not None:
            values["balanced_accuracy"] = self.balanced_accuracy
        return values | {"per_class": self.per_class()}


def summarize(predictions: Predictions, class_names: tuple[str, ...]) -> Evaluation:
    """All metrics of `predictions`."""
    num_classes = len(class_names)
    cells = predictions.label * num_classes + predictions.predicted
    bins = calibration_bins(predictions.confidence, predictions.predicted == predictions.label)
    num_images = len(predictions.label)
    ece = (
        sum(b["num_images"] * abs(b["accuracy"] - b["confidence"]) for b in bins if b["num_images"])
        / num_images
    )
    return Evaluation(
        class_names=class_names,
        confusion=np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes),
        top5=int(predictions.in_top5.sum()) / num_images,
        loss=float(predictions.loss.mean()),
        ece=float(ece),
        bins=bins,
    )


def calibration_bins(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """NUM_BINS equal bins of confidence (0, 1]: count, mean accuracy and mean confidence (None if empty)."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, NUM_BINS - 1)
    bins = []
    for i in range(NUM_BINS):
        members = which == i
        count = int(members.sum())
        bins.append(
            {
                "lower": float(edges[i]),
                "upper": float(edges[i + 1]),
                "num_images": count,
                "accuracy": float(correct[members].mean()) if count else None,
                "confidence": float(confidence[members].mean()) if count else None,
            }
        )
    return bins

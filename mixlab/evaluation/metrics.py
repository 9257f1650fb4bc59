"""What a classifier's predictions are worth. Counts first, ratios last; fractions, not per cent."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from mixlab.errors import DataError
from mixlab.evaluation.calibration import coverage_at

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017
BALANCE_RATIO = 1.5  # report balanced accuracy where class counts differ by more than this


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The outcome for n images: label, predicted int64 (n,); confidence, loss float64 (n,); top5 int64 (n, 5 or K).

    index: int64 (n,), the images' numbers in their split. confidence: probability of the predicted class, with the
    logits divided by `temperature`; raw_confidence: without. loss: of the logits as they are. logits: float32 (n, K)
    where they were kept.
    """

    index: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    top5: np.ndarray
    raw_confidence: np.ndarray | None = None
    logits: np.ndarray | None = None
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of a set of predictions of K classes. label, predicted: int64 (n,); confidence: float64 (n,).

    ece: of the confidences, after the temperature; ece_raw: before. thresholds: that validation chose
    (`calibration.find_thresholds`).

    real: the same predictions against several acceptable labels an image (`accuracy_of_any`), where that is wanted.
    num_trained_on: images that the model was trained on; None where that is not known. modality: what is counted
    as images here, by its name, which says many of them.
    """

    class_names: tuple[str, ...]
    label: np.ndarray
    predicted: np.ndarray
    top5: float
    loss: float
    ece: float
    bins: list[dict[str, Any]]
    confidence: np.ndarray
    ece_raw: float
    temperature: float = 1.0
    thresholds: tuple[dict[str, float], ...] = ()
    real: dict[str, Any] | None = None
    num_trained_on: int | None = None
    modality: str = "images"

    @property
    def confusion(self) -> np.ndarray:
        """int64 (K, K) counts, rows true, columns predicted: gigabytes for ImageNet-21k's classes."""
        num_classes = len(self.class_names)
        cells = np.bincount(self.label * num_classes + self.predicted, minlength=num_classes**2)
        return cells.reshape(num_classes, num_classes)

    @property
    def num_images(self) -> int:
        return len(self.label)

    @property
    def num_correct(self) -> int:
        return int((self.label == self.predicted).sum())

    @property
    def top1(self) -> float:
        return self.num_correct / self.num_images

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy on images like these, by Wilson's score."""
        return wilson_interval(self.num_correct, self.num_images)

    @property
    def coverage(self) -> list[dict[str, Any]]:
        """Each threshold with what validation promised and what is found here."""
        correct = self.predicted == self.label
        return [
            {
                "target": one["target"],
                "min_confidence": one["min_confidence"],
                "coverage_promised": one["coverage"],
                **coverage_at(one["min_confidence"], self.confidence, correct),
            }
            for one in self.thresholds
        ]

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean recall over the classes present; None where class counts differ by at most BALANCE_RATIO."""
        counts, _, correct = self._counts()
        present = counts > 0
        if counts[present].max() <= BALANCE_RATIO * counts[present].min():
            return None
        return float((correct[present] / counts[present]).mean())

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many images are of each class, predicted to be, and both: int64 (K,) each."""
        columns = (self.label, self.predicted, self.label[self.label == self.predicted])
        of_class, of_prediction, of_both = (
            np.bincount(column, minlength=len(self.class_names)) for column in columns
        )
        return of_class, of_prediction, of_both

    def per_class(self) -> list[dict[str, Any]]:
        """Count, precision, recall and F1 of each class; None where a ratio has nothing to divide by."""
        rows = []
        counts = (column.tolist() for column in self._counts())
        for name, num_images, num_predicted, correct in zip(self.class_names, *counts, strict=True):
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
            "modality": self.modality,
            "num_images": self.num_images,
            "num_correct": self.num_correct,
            "top1": self.top1,
            "top1_interval": list(self.top1_interval),
            "top5": self.top5,
            "loss": self.loss,
            "ece": self.ece,
            "ece_raw": self.ece_raw,
            "temperature": self.temperature,
            "coverage": self.coverage,
        }
        if self.balanced_accuracy is not None:
            values["balanced_accuracy"] = self.balanced_accuracy
        if self.real is not None:
            values["real"] = self.real
        values["num_trained_on"] = self.num_trained_on
        return values | {"per_class": self.per_class()}


def summarize(
    predictions: Predictions,
    class_names: tuple[str, ...],
    thresholds: Sequence[dict[str, float]] = (),
) -> Evaluation:
    """All metrics of `predictions`. thresholds: that validation chose, to be checked on these."""
    correct = predictions.predicted == predictions.label
    bins = calibration_bins(predictions.confidence, correct)
    num_images = len(predictions.label)
    ece, raw = calibration_error(bins), predictions.raw_confidence
    return Evaluation(
        class_names=class_names,
        label=predictions.label,
        predicted=predictions.predicted,
        top5=int((predictions.top5 == predictions.label[:, None]).any(axis=1).sum()) / num_images,
        loss=float(predictions.loss.mean()),
        ece=ece,
        bins=bins,
        confidence=predictions.confidence,
        ece_raw=ece if raw is None else calibration_error(calibration_bins(raw, correct)),
        temperature=predictions.temperature,
        thresholds=tuple(thresholds),
    )


def calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """The expected calibration error: the bins' gaps between accuracy and confidence, by their images."""
    filled = [b for b in bins if b["num_images"]]
    gaps = sum(b["num_images"] * abs(b["accuracy"] - b["confidence"]) for b in filled)
    return float(gaps / sum(b["num_images"] for b in filled))


def wilson_interval(num_correct: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of the accuracy of which `num_correct` of `num` is a sample: Wilson's score interval (1927), fractions.

    Unlike plus or minus two standard errors it holds for few images, and for accuracies near 0 and 1. DataError for
    no images, or for counts and a confidence that cannot be.
    """
    if num < 1 or not 0 <= num_correct <= num or not 0 < confidence < 1:
        raise DataError(f"there is no interval of {confidence:g} for {num_correct} of {num}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = num_correct / num, z * z / num
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / num + spread / (4 * num)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def accuracy_of_any(predictions: Predictions, acceptable: Sequence[frozenset[int]]) -> dict[str, Any]:
    """Accuracy where any of several labels is right, as ReaL counts; images without a label are left out.

    acceptable: for each image of `predictions` its labels. DataError if none has one.
    """
    judged = [row for row, labels in enumerate(acceptable) if labels]
    if not judged:
        raise DataError("none of these images has a label to be measured with", where="--labels")
    hits = sum(int(predictions.predicted[row]) in acceptable[row] for row in judged)
    top5 = sum(not acceptable[row].isdisjoint(predictions.top5[row].tolist()) for row in judged)
    return {
        "num_images": len(judged),
        "num_correct": hits,
        "top1": hits / len(judged),
        "top5": top5 / len(judged),
        "num_left_out": len(acceptable) - len(judged),
    }


def merged_bins(bins: Sequence[dict[str, Any]], at_least: int) -> tuple[list[dict[str, Any]], int]:
    """Neighbouring bins brought together until each has `at_least` images, and how many had fewer.

    Empty ones are left out. A rate of a few images says little, and looks like as much as one of hundreds.
    """
    groups: list[list[dict[str, Any]]] = []
    for one in (b for b in bins if b["num_images"]):
        if groups and sum(b["num_images"] for b in groups[-1]) < at_least:
            groups[-1].append(one)
        else:
            groups.append([one])
    if len(groups) > 1 and sum(b["num_images"] for b in groups[-1]) < at_least:
        groups[-2:] = [groups[-2] + groups[-1]]
    few = sum(0 < b["num_images"] < at_least for b in bins)
    return [_together(group) for group in groups], few if len(groups) > 1 else 0


def _together(group: list[dict[str, Any]]) -> dict[str, Any]:
    count = sum(b["num_images"] for b in group)
    means = {key: sum(b["num_images"] * b[key] for b in group) / count for key in ("accuracy", "confidence")}
    return {"lower": group[0]["lower"], "upper": group[-1]["upper"], "num_images": count, **means}


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

"""A temperature fitted on validation, so that probabilities are true (Guo et al. 2017), and how sure is sure enough.

Both count one more image than there are, as sure as the rest and wrong. It vanishes among thousands; without it a
small validation split without a mistake would promise certainty.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST, HIGHEST = 0.05, 20.0  # temperature
TARGETS = (0.9, 0.95, 0.98, 0.99, 0.995)  # shares of right answers that a threshold is looked for
STEPS = 10_000  # thresholds are multiples of a ten-thousandth, so that what is printed is what was measured


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """The temperature with the smallest negative log-likelihood, between LOWEST and HIGHEST, to four digits."""
    from scipy.optimize import minimize_scalar  # slow to import

    if logits.shape[1] < 2 or not bool(torch.isfinite(logits).all()):
        return 1.0
    rows = torch.arange(len(label))
    predicted = logits.argmax(dim=1)

    def loss(log_temperature: float) -> float:
        log_probs = F.log_softmax(logits / math.exp(log_temperature), dim=1)
        likelihood = log_probs[rows, label].double().sum()
        log_probs[rows, predicted] = -math.inf
        of_others = log_probs.logsumexp(dim=1).double().mean()  # that the one more image is of another class
        return float(-(likelihood + of_others) / (len(label) + 1))

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-5})
    return float(f"{math.exp(found.x):.4g}")


def find_thresholds(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """For each of TARGETS that can be had: the lowest confidence above which that share is right, and who is left.

    confidence: float64 (n,), correct: bool (n,). Gives {"target", "min_confidence", "coverage"}, fractions. A target
    that too few images could show, or that no confidence reaches, is left out.
    """
    steps = np.floor(confidence * STEPS).astype(np.int64)
    order = np.argsort(-steps, kind="stable")
    steps, wrong = steps[order], np.cumsum(~correct[order])
    count = np.arange(1, len(steps) + 1)
    ends = np.append(steps[1:] != steps[:-1], True)  # those that are as sure as each other stay together
    found = []
    for target in TARGETS:
        good = np.flatnonzero(ends & ((wrong + 1) <= (1 - target) * (count + 1) + 1e-9))
        if len(good):
            last = good[-1]
            lowest = 0.0 if last + 1 == len(steps) else float(steps[last]) / STEPS
            coverage = float(count[last]) / len(steps)
            found.append({"target": target, "min_confidence": lowest, "coverage": coverage})
    return found


def coverage_at(min_confidence: float, confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """How many are at least so sure, and how many of them are right. confidence, correct: (n,)."""
    sure = confidence >= min_confidence
    num_sure, num_correct = int(sure.sum()), int((sure & correct).sum())
    return {
        "num_sure": num_sure,
        "coverage": num_sure / len(confidence),
        "accuracy": num_correct / num_sure if num_sure else None,
    }

"""Weights with the temperature and the thresholds that their validation predictions say."""

from dataclasses import replace

import torch

from mixlab.checkpoint.store import Weights
from mixlab.evaluation.calibration import find_thresholds, fit_temperature
from mixlab.evaluation.metrics import Predictions


def calibrated(weights: Weights, predictions: Predictions) -> Weights:
    """`weights` with the calibration of `predictions`, theirs for the validation split, with logits."""
    if predictions.logits is None:
        raise ValueError("the predictions have no logits")
    logits, label = torch.from_numpy(predictions.logits), torch.from_numpy(predictions.label)
    temperature = fit_temperature(logits, label)
    confidence = (logits / temperature).softmax(dim=1).amax(dim=1).double().numpy()
    thresholds = find_thresholds(confidence, predictions.predicted == predictions.label)
    return replace(weights, temperature=temperature, thresholds=tuple(thresholds))

"""Weights with the temperature and the thresholds that their validation predictions say."""

from dataclasses import replace

import numpy as np
import torch

from mixlab.checkpoint.store import Weights
from mixlab.evaluation.calibration import find_thresholds, fit_temperature
from mixlab.evaluation.metrics import Predictions, calibration_bins, calibration_error


def calibrated(weights: Weights, predictions: Predictions) -> Weights:
    """`weights` with the calibration of `predictions`, theirs for the validation split, with logits."""
    if predictions.logits is None:
        raise ValueError("the predictions have no logits")
    logits, label = torch.from_numpy(predictions.logits), torch.from_numpy(predictions.label)
    correct = predictions.predicted == predictions.label

    def confidence(temperature: float) -> np.ndarray:
        found: np.ndarray = (logits / temperature).softmax(dim=1).amax(dim=1).double().numpy()
        return found

    def error(temperature: float) -> float:
        return calibration_error(calibration_bins(confidence(temperature), correct))

    temperature = fit_temperature(logits, label)
    # The likelihood is of all classes' probabilities. Of a model that is hardly trained it can gain by what the
    # second and third classes say, and the first, which is what people read, becomes far too sure.
    if error(temperature) >= error(1.0):
        temperature = 1.0
    thresholds = find_thresholds(confidence(temperature), correct)
    return replace(weights, temperature=temperature, thresholds=tuple(thresholds))

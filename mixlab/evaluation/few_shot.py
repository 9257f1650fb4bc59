"""The authors' few-shot probe: closed-form ridge regression on frozen features (big_vision, fewshot_lsr).

Shapes: N support images, M test images, D features, K classes. All of it in float64: with the constant feature of
100 the problem is too ill-conditioned for float32.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mixlab.data.loader import Batch
from mixlab.data.modality import mean_of_parts
from mixlab.errors import DataError, UsageError

L2 = 2.0**10
BIAS_FEATURE = 100.0
STD_FLOOR = 1e-5


def ridge_weights(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: Sequence[float]
) -> np.ndarray:
    """Ridge regression on prepared features (N, D), targets +1 and -1: float64 (len(l2), D, K).

    The smaller of the two normal equations is solved, of D or of N unknowns, from one eigendecomposition for all l2.
    """
    x = np.asarray(features, dtype=np.float64)
    y = np.where(np.asarray(labels)[:, None] == np.arange(num_classes), 1.0, -1.0)
    if any(not value > 0 for value in l2):
        raise UsageError(f"l2 must be above 0, got {list(l2)}", where="l2")
    num_images, num_features = x.shape
    if num_images >= num_features:
        values, vectors = np.linalg.eigh(x.T @ x)
        projected = vectors.T @ (x.T @ y)
        return np.stack([vectors @ (projected / (values + strength)[:, None]) for strength in l2])
    values, vectors = np.linalg.eigh(x @ x.T)
    projected = vectors.T @ y
    return np.stack([x.T @ (vectors @ (projected / (values + strength)[:, None])) for strength in l2])


class Whitening:
    """Features with the support's mean taken off, divided by its standard deviation, and a constant appended."""

    def __init__(self, support: np.ndarray) -> None:
        support = np.asarray(support, dtype=np.float64)
        self.mean, self.std = support.mean(axis=0), support.std(axis=0) + STD_FLOOR

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, D + 1)."""
        white = (np.asarray(features, dtype=np.float64) - self.mean) / self.std
        return np.concatenate([white, np.full((len(white), 1), BIAS_FEATURE)], axis=1)


def predict_few_shot(
    support: np.ndarray, labels: np.ndarray, test: np.ndarray, num_classes: int, l2: Sequence[float] = (L2,)
) -> np.ndarray:
    """Classes of `test` (M, D) by a probe fitted to `support` (N, D): int64 (len(l2), M)."""
    whiten = Whitening(support)
    weights = ridge_weights(whiten(support), labels, num_classes, l2)
    return (whiten(test) @ weights).argmax(axis=2)


def draw_support(labels: np.ndarray, shots: int, num_classes: int, seed: int) -> np.ndarray:
    """Numbers of the first `shots` images of each class in the seed's order, class by class.

    One numpy generator a seed permutes class 0, then 1, and so on; a class with fewer images gives what it has.
    """
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == k))[:shots] for k in range(num_classes)]
    return np.concatenate(chosen)


def few_shot_accuracy(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: Sequence[int] = (0, 1, 2),
    l2: float = L2,
) -> np.ndarray:
    """Share of test images classified right: float64 (seeds, shots). DataError for features that cannot be used."""
    for name, values in (("training", features), ("test", test_features)):
        if not len(values):
            raise DataError(f"there are no {name} features")
        if not np.isfinite(values).all():
            raise DataError(f"the {name} features are not finite")
    missing = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(missing):
        raise DataError(
            f"{len(missing)} of {num_classes} classes have no training example, the first is class {missing[0]}"
        )
    if any(shot < 1 for shot in shots) or not shots or not seeds:
        raise UsageError(f"shots must be numbers above 0, got {list(shots)}", where="shots")
    table = np.empty((len(seeds), len(shots)))
    for row, seed in enumerate(seeds):
        for column, shot in enumerate(shots):
            chosen = draw_support(labels, shot, num_classes, seed)
            (found,) = predict_few_shot(features[chosen], labels[chosen], test_features, num_classes, (l2,))
            table[row, column] = (found == test_labels).mean()
    return table


@torch.inference_mode()
def extract_features(
    model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """What the head of `model` sees for every image: float32 (N, D), and the labels (N,)."""
    was_training = model.training
    model.eval()
    found, labels = [], []
    for batch in batches:
        features = mean_of_parts(
            lambda inputs: _features(model, inputs), batch.inputs.to(device), batch.owner
        )
        found.append(features.numpy())
        labels.append(batch.label.numpy())
    model.train(was_training)
    if not found:
        raise DataError("there are no readable examples to take features from")
    return np.concatenate(found), np.concatenate(labels)


def _features(model: Any, image: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "features"):
        return model.features(image)
    return model.forward_head(model.forward_features(image), pre_logits=True)  # timm's models

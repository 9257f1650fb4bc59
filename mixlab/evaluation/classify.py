"""Run a classifier over batches; every image counts once, the last partial batch included."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from mixlab.data.loader import Batch
from mixlab.errors import DataError
from mixlab.evaluation.metrics import Predictions


@torch.inference_mode()
def classify(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Predictions:
    """Predictions for every image of `batches`. Loss is the softmax cross-entropy with the hard label."""
    was_training = model.training
    model.eval()
    parts = []
    for batch in batches:
        logits = model(batch.image.to(device)).float().cpu()
        log_probs = F.log_softmax(logits, dim=1)
        confidence, predicted = log_probs.exp().max(dim=1)
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
        parts.append(
            (
                torch.from_numpy(batch.index),
                batch.label,
                predicted,
                confidence.double(),
                -log_probs.gather(1, batch.label[:, None])[:, 0].double(),
                (top5 == batch.label[:, None]).any(dim=1),
            )
        )
    model.train(was_training)
    if not parts:
        raise DataError("there are no readable images to evaluate")
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    names = ("index", "label", "predicted", "confidence", "loss", "in_top5")
    return Predictions(**dict(zip(names, columns, strict=True)))

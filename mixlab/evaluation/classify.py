"""Run a classifier over batches; every image counts once, the last partial batch included."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mixlab.cpu.inference import fast
from mixlab.data.loader import Batch
from mixlab.data.modality import mean_of_parts
from mixlab.errors import DataError
from mixlab.evaluation.metrics import Predictions


def _alone(parts: list[Any]) -> list[list[Any]]:
    return [parts]


@torch.no_grad()
def classify(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    gather: Callable[[list[Any]], list[list[Any]]] = _alone,
    *,
    temperature: float = 1.0,
    keep_logits: bool = False,
) -> Predictions:
    """Predictions for every image of `batches`, by index. Loss is the softmax cross-entropy with the hard label.

    gather: where several processes have a share of the batches each, brings together what all of them found. Images
    of a batch beyond its labels are computed and forgotten. temperature: divides the logits for `confidence`, and
    for nothing else.
    """
    was_training = model.training
    quick = fast(model.eval())
    parts = []
    for batch in batches:
        logits = mean_of_parts(quick, batch.inputs.to(device), batch.owner)[: len(batch.label)]
        log_probs = F.log_softmax(logits, dim=1)
        raw_confidence, predicted = log_probs.exp().max(dim=1)
        confidence = (logits / temperature).softmax(dim=1).amax(dim=1) if temperature != 1 else raw_confidence
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
        parts.append(
            (
                torch.from_numpy(batch.index),
                batch.label,
                predicted,
                confidence.double(),
                -log_probs.gather(1, batch.label[:, None])[:, 0].double(),
                top5,
                raw_confidence.double(),
                *([logits] if keep_logits else []),
            )
        )
    model.train(was_training)
    parts = [part for found in gather(parts) for part in found]
    if not any(len(part[0]) for part in parts):
        raise DataError("there are no readable examples to evaluate")
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    columns = [column[order] for column in columns]
    names = ("index", "label", "predicted", "confidence", "loss", "top5", "raw_confidence", "logits")
    return Predictions(temperature=temperature, **dict(zip(names, columns, strict=False)))

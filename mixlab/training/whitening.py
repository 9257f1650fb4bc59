"""A stem that begins with whitened patches.

The pixels of a patch are nearly alike: most of what a stem gives at initialisation is their mean, and the rest is
lost beside it. The stem's first kernel is therefore multiplied by the whitening of the training images' patches:
what it gives has as much variance as before, but evenly in all directions. Jordan 2024 (arXiv 2404.00498) has the
like before a convolutional network, after Page 2019.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.data.reading import Examples
from mixlab.errors import DataError, ExampleError

NUM_EXAMPLES = 2048
FLOOR = 1e-3  # added to every variance, of normalised pixels: rounding to 8 bits has some 1e-5


@torch.no_grad()
def whiten_stem(model: Any, train: Examples) -> None:
    """Change the stem of a Mixer of any kind, as it was initialised, for patches of the examples in `train`.

    DataError if none of the examples looked at can be read.
    """
    side = model.config.patch_size
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for one in _some_examples(train):
        image = train.preprocess.to_input(one).double()
        patches = F.unfold(image, side, stride=side).transpose(1, 2).flatten(0, 1)
        count += len(patches)
        total, products = total + patches.sum(dim=0), products + patches.T @ patches
    if not count:
        raise DataError("no example of those looked at could be read", where="whiten_stem")
    mean = total / count
    variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    whitening = directions @ torch.diag((variances.clamp(min=0) + FLOOR).rsqrt()) @ directions.T
    kernel = model.stem.weight.flatten(1).double() @ whitening
    model.stem.weight.copy_(kernel.view_as(model.stem.weight))
    assert model.stem.bias is not None
    model.stem.bias.copy_(-kernel @ mean)


def _some_examples(train: Examples) -> Iterator[Tensor]:
    """At most NUM_EXAMPLES, evenly from the split; of a stream, which would be read to its end, the first."""
    encoded, count = train.split.encoded, min(NUM_EXAMPLES, len(train))
    if encoded is not None and encoded.window:
        chosen = np.arange(count)
    else:
        chosen = np.linspace(0, len(train) - 1, count).astype(np.int64)
    for index in chosen:
        try:
            yield train.at(np.array([index]))
        except ExampleError:  # the loader will say so
            continue

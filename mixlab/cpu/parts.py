"""Parts of a batch of training, each computed alone: in a thread, or in a program of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mixlab.cpu.passes import Passes

Loss = Callable[[Tensor, Tensor], Tensor]  # logits and targets of some images to their mean loss
MODEL = "model."  # before the names of its parameters, among the tensors of a batch


def gradient(passes: Passes, image: Tensor, target: Tensor, keep: Any, loss: Loss, share: float) -> Tensor:
    """Of some images: `share` of their mean loss, the number of correct answers, and all gradients, in one row.

    keep: as `Passes.draw` gives it.
    """
    parameters = [p for p in passes.parameters() if p.requires_grad]
    with torch.enable_grad():
        logits = passes(image, keep)
        value = share * loss(logits, target)
        gradients = torch.autograd.grad(value, parameters)
    return torch.cat(
        [torch.stack([value.detach(), num_correct(logits, target)]), *(g.flatten() for g in gradients)]
    )


def num_correct(logits: Tensor, target: Tensor) -> Tensor:
    """How many of the logits (B, K) are largest where the target is: (B, K), or the first row of (B, N, K)."""
    labels = target if target.ndim == 2 else target[:, 0]
    return (logits.argmax(dim=1) == labels.argmax(dim=1)).sum()


def cut(
    image: Tensor, target: Tensor, keep: list[Tensor | None], num_parts: int
) -> Iterator[tuple[Any, ...]]:
    """Equal parts of a batch: images, targets, and what `keep` has for them."""
    kept_parts = zip(
        *([None] * num_parts if kept is None else kept.tensor_split(num_parts) for kept in keep), strict=True
    )
    parts = zip(image.tensor_split(num_parts), target.tensor_split(num_parts), kept_parts, strict=True)
    return ((images, targets, list(kept)) for images, targets, kept in parts)


class SharedBatch:
    """A batch in memory that several processes see, and the model that computes parts of it there.

    tensors: `image`, `target`, `kept` (a row for each residual branch, images), `numbers` (images, parts, share of
    this batch). drops: of each branch, whether images are kept or not.
    """

    def __init__(self, passes: Passes, loss: Loss, drops: list[bool], tensors: dict[str, Tensor]) -> None:
        self.passes, self.loss, self.drops, self.tensors = passes, loss, drops, tensors

    def put(
        self, image: Tensor, target: Tensor, keep: list[Tensor | None], num_parts: int, share: float
    ) -> None:
        """Let these be the batch."""
        num_images, tensors = len(image), self.tensors
        tensors["image"][:num_images], tensors["target"][:num_images] = image, target
        for row, kept in zip(tensors["kept"], keep, strict=True):
            if kept is not None:
                row[:num_images] = kept.flatten()
        tensors["numbers"].copy_(torch.tensor([num_images, num_parts, share], dtype=torch.float64))

    def compute(self, part: int) -> Tensor:
        """The row of `gradient` of a part."""
        tensors = self.tensors
        num_images, num_parts, share = (
            int(tensors["numbers"][0]),
            int(tensors["numbers"][1]),
            tensors["numbers"][2],
        )
        kept = tensors["kept"]
        keep = [kept[i, :num_images, None, None] > 0 if on else None for i, on in enumerate(self.drops)]
        parts = cut(tensors["image"][:num_images], tensors["target"][:num_images], keep, num_parts)
        images, targets, keeps = list(parts)[part]
        return gradient(
            self.passes, images, targets, keeps, self.loss, float(share) * len(images) / num_images
        )


def build_model(kind: Any, config: Any, trained: list[str], tensors: dict[str, Tensor]) -> Any:
    """The model of class `kind` and configuration `config` whose parameters lie in `tensors`.

    trained: the names of those that have a gradient.
    """
    with torch.device("meta"):
        model = kind(config)
    own = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
    model.load_state_dict(own, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model

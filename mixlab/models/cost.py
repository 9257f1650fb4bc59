"""What a model costs: parameters, multiply-accumulates, activation memory. Measured, not estimated by hand."""

from dataclasses import asdict, dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of one image, and of a batch in memory.

    macs: multiply-accumulates of the forward pass on one image (matrix products and convolutions).
    flops: 2 x macs. weights_bytes: fp32 parameters and buffers.
    inference_bytes, training_bytes: weights, activations (and gradients, Adam state) at `batch_size`,
    estimated from tensor sizes; the process itself (about 400 MB with torch loaded) comes on top.
    """

    num_parameters: int
    macs: int
    flops: int
    weights_bytes: int
    batch_size: int
    inference_bytes: int
    training_bytes: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def measure_cost(
    model: nn.Module, image_size: tuple[int, int], *, in_channels: int = 3, batch_size: int = 1
) -> Cost:
    """Run `model` once on one blank image per measurement, without allocating where `model` is on `meta`."""
    from torch.utils.flop_counter import FlopCounterMode

    parameters = list(model.parameters())
    device = parameters[0].device
    image = torch.zeros(1, in_channels, *image_size, device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    saved, peak = _activation_bytes(model, image)
    model.train(was_training)
    weights = sum(p.numel() * p.element_size() for p in [*parameters, *model.buffers()])
    flops = int(counter.get_total_flops())
    return Cost(
        num_parameters=sum(p.numel() for p in parameters),
        macs=flops // 2,
        flops=flops,
        weights_bytes=weights,
        batch_size=batch_size,
        inference_bytes=weights + batch_size * peak,
        training_bytes=4 * weights + batch_size * saved,  # weights, gradients, two Adam moments
    )


def _activation_bytes(model: nn.Module, image: torch.Tensor) -> tuple[int, int]:
    """Bytes kept for the backward pass, and twice the largest single tensor (one in, one out)."""
    kept: dict[int, int] = {}
    largest = 0
    parameter_ids = {id(p) for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        if id(tensor) not in parameter_ids and not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            largest = max(largest, storage.nbytes())
        return tensor

    parameter_storages = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(image)  # kept alive so that no storage is freed and its address used again
    saved = sum(size for address, size in kept.items() if address not in parameter_storages)
    del output
    return saved, 2 * max(largest, image.untyped_storage().nbytes())

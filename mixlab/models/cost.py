"""What a model costs: parameters, multiply-accumulates, activation memory. Measured, not estimated by hand."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from mixlab.models.cores import images_at_once, number_of_parts
from mixlab.models.fast_training import is_plain_kind
from mixlab.models.mixer import MixerConfig

# Measured beside what tensors take (LOG.md): the gaps that an allocator leaves between them, where a core computes
# its only part of a batch and where it computes several, and what torch loads for the first step of a training.
GAPS_FEW, GAPS_MANY = 1.1, 1.7
FIRST_STEP_BYTES = 60 << 20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of one image, and of a batch in memory.

    macs: multiply-accumulates of the forward pass on one image (matrix products and convolutions).
    flops: 2 x macs. weights_bytes: fp32 parameters and buffers.
    inference_bytes, training_bytes: weights, activations (and gradients, Adam state) at `batch_size`, from tensor
    sizes, as mixlab computes on a CPU; the process itself with torch loaded and the data set come on top.
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
    weights = sum(p.numel() * p.element_size() for p in [*parameters, *model.buffers()])
    flops = int(counter.get_total_flops())
    if is_plain_kind(model):
        inference, training = _bytes_of_fast_passes(model.config, batch_size, weights)
    else:
        saved, peak = _activation_bytes(model, image)
        inference, training = batch_size * peak, batch_size * saved
    model.train(was_training)
    return Cost(
        num_parameters=sum(p.numel() for p in parameters),
        macs=flops // 2,
        flops=flops,
        weights_bytes=weights,
        batch_size=batch_size,
        inference_bytes=weights + inference,
        training_bytes=4 * weights + training,  # weights, gradients, two Adam moments
    )


def _bytes_of_fast_passes(config: MixerConfig, batch_size: int, weights: int) -> tuple[int, int]:
    """Beyond weights, gradients and moments, for inference and training: what fast.py and cores.py hold at a time."""
    num_threads = torch.get_num_threads()
    num_parts = number_of_parts(batch_size, images_at_once(config), num_threads)
    at_work = min(num_threads, num_parts)
    images = at_work * -(-batch_size // num_parts)
    tokens, width = config.num_patches, config.hidden_dim
    pixels = config.in_channels * tokens * config.patch_size**2
    table, hidden = tokens * width, tokens * config.channel_mlp_dim
    mixed = width * config.token_mlp_dim
    batch = 4 * batch_size * pixels
    inference = weights + batch + 4 * images * (pixels + 4 * table + hidden + mixed)
    kept = pixels + config.num_blocks * (4 * table + 2 * mixed + 2 * hidden) + 2 * table
    held = 4 * images * (kept + 3 * hidden + 2 * table) * (GAPS_MANY if num_parts > num_threads else GAPS_FEW)
    return inference, int((at_work - 1) * weights + batch + held + FIRST_STEP_BYTES)


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

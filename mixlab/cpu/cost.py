"""What a model costs: parameters, multiply-accumulates, activation memory. Measured, not estimated by hand."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from mixlab.cpu.cores import are_short, images_at_once, number_of_parts
from mixlab.cpu.inference import MOST
from mixlab.cpu.memory import Hollow
from mixlab.cpu.passes import is_plain_kind
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.models.pyramid import PyramidConfig

# Measured beside what tensors take (LOG.md): the gaps that an allocator leaves between them, where a core computes
# its only part of a batch and where it computes several, and those of torch's own passes (1.1 to 1.8, from one run to
# the next too); what torch loads for the first forward pass and for the first step of a training.
GAPS_FEW, GAPS_MANY, GAPS_OWN = 1.1, 1.7, 1.4
FIRST_PASS_BYTES, FIRST_STEP_BYTES = 20 << 20, 60 << 20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of one image, and of a batch in memory.

    macs: multiply-accumulates of the forward pass on one image (matrix products and convolutions).
    flops: 2 x macs. weights_bytes: fp32 parameters and buffers.
    inference_bytes, training_bytes: weights, images, activations (and gradients, Adam state) at `batch_size`, from
    tensor sizes, as mixlab computes on a CPU; the process itself with torch loaded and the data set come on top.
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
    model: nn.Module,
    image_size: tuple[int, int],
    *,
    in_channels: int = 3,
    batch_size: int = 1,
    accumulate: int = 1,
    fast: bool = True,
) -> Cost:
    """Run `model` on images without content; that takes no memory. accumulate, fast: as in a recipe."""
    hollow = Hollow(model, image_size, in_channels)
    flops = 2 * _count_macs(hollow)
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in [*parameters, *model.buffers()])
    batch = 4 * batch_size * in_channels * image_size[0] * image_size[1]
    if fast and is_plain_kind(model):
        inference = weights + _bytes_of_fast_inference(model.config, batch_size)
        training = _bytes_of_fast_training(model, batch_size, accumulate, weights)
    else:
        inference = int(GAPS_OWN * hollow.infer(batch_size)) + FIRST_PASS_BYTES
        training = int(GAPS_OWN * hollow.train(batch_size, accumulate)) + FIRST_STEP_BYTES
    return Cost(
        num_parameters=sum(p.numel() for p in parameters),
        macs=flops // 2,
        flops=flops,
        weights_bytes=weights,
        batch_size=batch_size,
        inference_bytes=weights + batch + inference,
        training_bytes=3 * weights + batch + training,  # weights and two Adam moments
    )


def count_macs(model: nn.Module, image_size: tuple[int, int], in_channels: int = 3) -> int:
    """Multiply-accumulates of the forward pass on one image, as in `Cost`."""
    return _count_macs(Hollow(model, image_size, in_channels))


def _count_macs(hollow: Hollow) -> int:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    # torch's table of operations lacks the attention that it computes on a CPU.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        hollow.infer(1)
    return int(counter.get_total_flops()) // 2


def _images_at_work(config: MixerConfig, num_images: int) -> tuple[int, int, int]:
    """How many images all cores together hold at a time, how many cores, and into how many parts a batch is cut."""
    num_threads = torch.get_num_threads()
    num_parts = number_of_parts(num_images, images_at_once(config), num_threads)
    at_work = min(num_threads, num_parts)
    return at_work * -(-num_images // num_parts), at_work, num_parts


def _block_floats(config: MixerConfig) -> list[tuple[int, int, int]]:
    """Of each block, for one image: tokens x channels, channel mixing's hidden units, token mixing's."""
    rows = []
    for index in range(config.num_blocks):
        own, mixed = config, config.hidden_dim * config.token_mlp_dim
        if isinstance(config, PyramidConfig):
            own = config.of_stage(config.stage(index))
            mixed = 0 if config.stage_mixing == "axial" else own.hidden_dim * own.token_mlp_dim
        rows.append((own.num_patches * own.hidden_dim, own.num_patches * own.channel_mlp_dim, mixed))
    return rows


def _bytes_of_fast_inference(config: MixerConfig, num_images: int) -> int:
    """What inference.py holds at a time beyond its weights and the images."""
    if isinstance(config, PyramidConfig):
        num_cores = torch.get_num_threads()
        images = min(num_images, num_cores * -(-num_images // number_of_parts(num_images, MOST, num_cores)))
    else:
        images, _, _ = _images_at_work(config, num_images)
    pixels = config.in_channels * config.num_patches * config.patch_size**2
    widest = max(4 * table + hidden + mixed for table, hidden, mixed in _block_floats(config))
    return 4 * images * (pixels + widest)


def _bytes_of_fast_training(model: Mixer, batch_size: int, accumulate: int, weights: int) -> int:
    """The same of passes.py and cores.py, with the gradients."""
    config = model.config
    images, at_work, num_parts = _images_at_work(config, -(-batch_size // accumulate))
    pixels = config.in_channels * config.num_patches * config.patch_size**2
    rows = _block_floats(config)
    kept = [4 * table + 2 * mixed + 2 * hidden for table, hidden, mixed in rows]
    widest = max(3 * hidden + 2 * table for table, hidden, _ in rows)
    in_all = sum(table for table, _, _ in rows) + max(kept) if model.checkpoint_blocks else sum(kept)
    # As backward passes begin; and as they end, each with all gradients, which it then has again in one row.
    first = 4 * images * (pixels + in_all + 2 * rows[-1][0] + widest)
    last = 4 * images * (pixels + max(kept) + widest)
    # Memory that goes back leaves few gaps, and what one core has just had twice is free for the next.
    is_returned = model.checkpoint_blocks
    gaps = GAPS_MANY if (num_parts > at_work or accumulate > 1) and not is_returned else GAPS_FEW
    passes = max(gaps * first, gaps * last + (at_work + 1 if is_returned else 2 * at_work) * weights)
    # Such rows beside the passes: their sum, one being added, one that waits; and gradients of earlier batches.
    # Programs have them all at a time.
    are_apart = are_short(config) and at_work > 1
    summed = ((num_parts if are_apart else min(num_parts, 2)) + 1 + (accumulate > 1)) * weights
    return int(passes + summed + FIRST_STEP_BYTES)

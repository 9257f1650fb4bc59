"""A copy of a Mixer for inference on a CPU: the same logits within rounding (1e-4), several times sooner.

Three things make it so. oneDNN computes a linear layer with its bias, GELU or residual sum in one pass over packed
weights. LayerNorm's scale and shift before channel mixing are folded into the kernel that follows. And each core
takes images of its own, a few at a time, so that activations stay in its cache and no thread waits for another; only
a single image is computed by all cores together.

Axes as in mixer.py: B batch, S tokens, C hidden_dim.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlab.models.layers import Mlp
from mixlab.models.mixer import Mixer, MixerBlock

CHUNK_BYTES = 6 << 20  # of the widest activation of one chunk of images; with MAX_CHUNK measured (LOG.md)
MAX_CHUNK = 32  # images
_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads are not copied into a forked process


def fast(model: nn.Module) -> nn.Module:
    """A faster copy of `model` for inference as it is now, or `model` itself where there is none.

    There is one for a plain Mixer in float32 on a CPU. Later changes to `model` do not reach it.
    """
    is_plain = type(model) is Mixer and all(
        type(block) is MixerBlock and type(block.token_mixing) is Mlp for block in model.blocks
    )
    if not is_plain or not torch.backends.mkldnn.is_available():
        return model
    assert isinstance(model, Mixer)
    weight = model.head.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return model
    return FastMixer(model)


class _Linear:
    """y = x W^T + b over packed weights, with what follows it: x (rows, in) -> (rows, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        assert bias is not None
        self._bias = bias.detach().clone()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def with_gelu(self, x: Tensor, form: str) -> Tensor:
        kind = "tanh" if form == "tanh" else "none"  # torch's names: "none" is the exact one
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "gelu", [], kind)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "add")


class FastMixer(nn.Module):
    """Images (B, in_channels, H, W), float32 on the CPU, to logits (B, K). It has no parameters to train."""

    def __init__(self, model: Mixer) -> None:
        super().__init__()
        self.config = config = model.config
        num_tokens, width = config.num_patches, config.hidden_dim
        widest = max(num_tokens * config.channel_mlp_dim, width * config.token_mlp_dim)
        self.chunk = min(max(CHUNK_BYTES // (4 * widest), 1), MAX_CHUNK)
        rows = self.chunk * num_tokens
        self._stem = _Linear(model.stem.weight.flatten(1), model.stem.bias, rows)
        self._blocks = []
        for block in model.blocks:
            assert isinstance(block, MixerBlock)
            assert isinstance(block.token_mixing, Mlp)
            token, channel, norm = block.token_mixing, block.channel_mixing, block.channel_norm
            folded = channel.fc1.weight * norm.weight
            shifted = channel.fc1.bias + channel.fc1.weight @ norm.bias
            self._blocks.append(
                (
                    (block.token_norm.weight.detach().clone(), block.token_norm.bias.detach().clone()),
                    _Linear(token.fc1.weight, token.fc1.bias, self.chunk * width),
                    _Linear(token.fc2.weight, token.fc2.bias, self.chunk * width),
                    _Linear(folded, shifted, rows),
                    _Linear(channel.fc2.weight, channel.fc2.bias, rows),
                )
            )
        # The last norm's scale and shift commute with the mean over tokens, and fold into the head.
        last = model.pre_head_norm
        head = model.head.weight * last.weight
        self._head = _Linear(head, model.head.bias + model.head.weight @ last.bias, self.chunk)
        self.eval()

    @torch.inference_mode()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits of any number of images of the model's size."""
        num_threads = torch.get_num_threads()
        num_images = len(image_BCHW)
        size = min(self.chunk, max(num_images // num_threads, 1))
        if num_threads == 1:
            return torch.cat([self._logits(part) for part in image_BCHW.split(size)])
        if num_images < num_threads:
            return self._logits(image_BCHW)
        parts = _pool(num_threads).map(self._logits_of_worker, image_BCHW.split(size))
        return torch.cat(list(parts))

    @torch.inference_mode()
    def _logits_of_worker(self, image_BCHW: Tensor) -> Tensor:
        return self._logits(image_BCHW)  # inference mode belongs to a thread

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        config, side = self.config, self.config.patch_size
        num_images, (rows, columns) = len(image_BCHW), config.grid
        tokens, width = config.num_patches, config.hidden_dim
        patches = image_BCHW.reshape(num_images, -1, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        x = self._stem(patches.reshape(num_images * tokens, -1)).view(num_images, tokens, width)
        for (scale, shift), token1, token2, channel1, channel2 in self._blocks:
            y = F.layer_norm(x, (width,), scale, shift, config.layer_norm_eps)
            y = y.transpose(1, 2).reshape(num_images * width, tokens)
            y = token2(token1.with_gelu(y, config.gelu)).view(num_images, width, tokens)
            x = x + y.transpose(1, 2)
            y = F.layer_norm(x, (width,), eps=config.layer_norm_eps).view(num_images * tokens, width)
            y = channel1.with_gelu(y, config.gelu)
            x = channel2.plus(y, x.view(num_images * tokens, width)).view(num_images, tokens, width)
        return self._head(F.layer_norm(x, (width,), eps=config.layer_norm_eps).mean(dim=1))


def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each."""
    with _pools_lock:
        if num_threads not in _pools:
            ready = threading.Barrier(num_threads)

            def begin() -> None:
                torch.set_num_threads(1)  # of this thread, but also of MKL in all of them: put right below
                ready.wait()

            pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fast", initializer=begin)
            list(pool.map(lambda _: None, range(num_threads)))
            torch.set_num_threads(num_threads)
            _pools[num_threads] = pool
        return _pools[num_threads]

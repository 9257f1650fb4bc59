"""A copy of a Mixer for inference on a CPU: the same logits within rounding (1e-4), several times sooner.

Four things make it so. oneDNN computes a linear layer with its bias, GELU or residual sum in one pass, over packed
weights where they are the wider matrix (without AVX-512, MKL does it sooner in two). The tokens stand as in
fast_training.py, so that nothing is transposed. LayerNorm's scale and shift before channel mixing are folded into the
kernel that follows. And each core takes images of its own, a few at a time, so that activations stay in its cache and
no thread waits for another; only a single image is computed by all cores together.

Axes as in mixer.py: B batch, S tokens, C hidden_dim.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlab.models.cores import images_at_once, number_of_parts
from mixlab.models.fast_functions import BY_MKL, patch_rows, product, product_and, product_then_gelu
from mixlab.models.fast_training import FastTraining, is_plain
from mixlab.models.layers import Gelu, Mlp
from mixlab.models.mixer import Mixer, MixerBlock
from mixlab.models.pyramid import PyramidMixer
from mixlab.threads import num_cores_here, one_core_each, shared

MOST = 64  # images of a pyramid that a core computes at a time


def fast(model: nn.Module) -> nn.Module:
    """A faster copy of `model` for inference as it is now, or `model` itself where there is none.

    There is one for a plain Mixer or a pyramid in float32 on a CPU. Later changes to `model` do not reach it.
    """
    if not is_plain(model):
        return model
    return FastPyramid(model) if isinstance(model, PyramidMixer) else FastMixer(model)


class FastPyramid(nn.Module):
    """Images (B, in_channels, H, W), float32 on the CPU, to logits (B, K): training's passes, a few at a time."""

    def __init__(self, model: PyramidMixer) -> None:
        super().__init__()
        self._passes = FastTraining(copy.deepcopy(model).eval().requires_grad_(False))

    @torch.inference_mode()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits of any number of images of the model's size."""
        num_cores, num_images = num_cores_here(), len(image_BCHW)
        if num_images < num_cores:
            return self._passes(image_BCHW)
        parts = image_BCHW.tensor_split(number_of_parts(num_images, MOST, num_cores))
        with one_core_each():
            return torch.cat(shared(self._logits_of_worker, parts))

    @torch.inference_mode()
    def _logits_of_worker(self, image_BCHW: Tensor) -> Tensor:
        logits: Tensor = self._passes(image_BCHW)
        return logits  # inference mode belongs to a thread


class _Linear:
    """y = x W^T + b over weights packed for oneDNN, with what follows it: x (rows, in) -> (rows, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        assert bias is not None
        self._bias = bias.detach().clone()
        self._weight = weight.detach().contiguous()
        if not BY_MKL:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        return product(x, self._weight, self._bias)

    def with_gelu(self, x: Tensor, form: Gelu) -> Tensor:
        return product_then_gelu(x, self._weight, self._bias, form)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return product_and("add", x, self._weight, other, self._bias)


class FastMixer(nn.Module):
    """Images (B, in_channels, H, W), float32 on the CPU, to logits (B, K). It has no parameters to train."""

    def __init__(self, model: Mixer) -> None:
        super().__init__()
        self.config = config = model.config
        self.chunk = images_at_once(config)
        rows = self.chunk * config.num_patches
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
                    # The bias as one more column, for a row of ones: the GELU then comes in the same pass.
                    torch.cat([token.fc1.weight, token.fc1.bias[:, None]], dim=1).detach(),
                    # Its bias adds one number to all channels of a token: every LayerNorm takes it out again.
                    token.fc2.weight.detach().clone(),
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
        num_cores, num_images = num_cores_here(), len(image_BCHW)
        if num_images < num_cores:
            return self._logits(image_BCHW)
        parts = image_BCHW.tensor_split(number_of_parts(num_images, self.chunk, num_cores))
        with one_core_each():
            return torch.cat(shared(self._logits_of_worker, parts))

    @torch.inference_mode()
    def _logits_of_worker(self, image_BCHW: Tensor) -> Tensor:
        return self._logits(image_BCHW)  # inference mode belongs to a thread

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        config, num_images = self.config, len(image_BCHW)
        tokens, width, eps = config.num_patches, config.hidden_dim, config.layer_norm_eps
        x = self._stem(patch_rows(image_BCHW, config.patch_size))
        normed = torch.ones(tokens + 1, num_images * width)
        for (scale, shift), token1, token2, channel1, channel2 in self._blocks:
            normed[:tokens] = F.layer_norm(x, (width,), scale, shift, eps).view(tokens, -1)
            h = product_then_gelu(token1, normed.t(), None, config.gelu)
            x = product_and("add", token2, h.t(), x.view(tokens, -1)).view(-1, width)
            h = channel1.with_gelu(F.layer_norm(x, (width,), eps=eps), config.gelu)
            x = channel2.plus(h, x)
        x = F.layer_norm(x, (width,), eps=eps)
        return self._head(x.view(tokens, num_images, width).mean(dim=0))

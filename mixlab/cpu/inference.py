"""A copy of a Mixer for inference on a CPU: the same logits within rounding (1e-4), several times faster.

Four things make it so. oneDNN computes a linear layer with its bias, GELU or residual sum in one pass, over packed
weights where they are the wider matrix (without AVX-512, MKL does it faster in two). The tokens stand as in
passes.py, so that nothing is transposed. LayerNorm's scale and shift before channel mixing are folded into the
kernel that follows. And each core takes images of its own, a few at a time, so that activations stay in its cache and
no thread waits for another; only a single image is computed by all cores together.

Axes as in mixer.py: B batch, S tokens, C hidden_dim.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlab.cpu.agreement import agree
from mixlab.cpu.cores import are_short, images_at_once, number_of_parts
from mixlab.cpu.functions import patch_rows
from mixlab.cpu.passes import Passes, why_not
from mixlab.cpu.products import packed, product, product_and, product_then
from mixlab.models.layers import ACTIVATIONS, Activation, Mlp
from mixlab.models.mixer import Mixer, MixerBlock, MixerConfig
from mixlab.threads import num_cores_here, one_core_each, shared

MOST = 64  # images of a pyramid that a core computes at a time


def fast(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A faster copy of `model` for inference as it is now, or `model` itself where there is none (`passes.why_not`).

    dtype: of activations and products, as Passes has it. Later changes to `model` do not reach the copy.
    """
    return model if why_not(model, with_gradients=False) is not None else copied(model, dtype)


def copied(model: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The copy of a model for which `passes.why_not` has no reason."""
    make = PACKED.get(type(model)) if dtype == torch.float32 else None
    with torch.autocast("cpu", enabled=False):  # which would round what is folded
        if make is not None and agree(type(model), model.config, make, with_gradients=False):
            return make(model)
        return FastPasses(model, dtype)


class _Copy(nn.Module):
    """Images (B, in_channels, H, W), float32 on the CPU, to logits (B, K), a few at a time on each core."""

    def __init__(self, config: MixerConfig, chunk: int) -> None:
        """chunk: images that a core takes at a time."""
        super().__init__()
        self.config, self.chunk = config, chunk
        self.eval()

    def _few(self, image_BCHW: Tensor) -> Tensor:
        """The logits of a few images, by this thread."""
        raise AssertionError("a subclass computes them")

    @torch.inference_mode()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits of any number of images of the model's size."""
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._all_logits(image_BCHW)
        return self._all_logits(image_BCHW)

    def _all_logits(self, image_BCHW: Tensor) -> Tensor:
        self.config.check_size(image_BCHW)
        num_cores, num_images = num_cores_here(), len(image_BCHW)
        if num_images < num_cores:
            return self._of_thread(image_BCHW)
        parts = image_BCHW.tensor_split(number_of_parts(num_images, self.chunk, num_cores))
        with one_core_each():
            return torch.cat(shared(self._of_thread, parts))

    @torch.inference_mode()
    def _of_thread(self, image_BCHW: Tensor) -> Tensor:
        return self._few(image_BCHW)  # inference mode belongs to a thread


class FastPasses(_Copy):
    """Training's passes, of a copy of the model."""

    def __init__(self, model: Mixer, dtype: torch.dtype = torch.float32) -> None:
        twin: Any = copy.deepcopy(model).eval().requires_grad_(False)
        for block in twin.blocks if dtype != torch.float32 else ():
            block.token_mixing.to(dtype)  # once, not at every call
            block.channel_mixing.to(dtype)
        chunk = MOST if are_short(model.config) else images_at_once(model.config)
        super().__init__(model.config, chunk)
        # No submodule: `train()`, `to()` and the like are for the model, not for this copy of its weights.
        self.__dict__["_passes"] = Passes(twin, dtype)

    def _few(self, image_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.__dict__["_passes"](image_BCHW)
        return logits


class _Linear:
    """y = x W^T + b over weights packed for oneDNN, with what follows it: x (rows, in) -> (rows, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        assert bias is not None
        self._bias = bias.detach().clone()
        self._weight = packed(weight.detach().contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        return product(x, self._weight, self._bias)

    def then(self, activation: Activation, x: Tensor) -> Tensor:
        return product_then(activation, x, self._weight, self._bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return product_and("add", x, self._weight, other, self._bias)


class FastMixer(_Copy):
    """Images (B, in_channels, H, W), float32 on the CPU, to logits (B, K). It has no parameters to train."""

    def __init__(self, model: Mixer) -> None:
        config = model.config
        super().__init__(config, images_at_once(config))
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

    def _few(self, image_BCHW: Tensor) -> Tensor:
        config, num_images = self.config, len(image_BCHW)
        tokens, width, eps = config.num_patches, config.hidden_dim, config.layer_norm_eps
        x = self._stem(patch_rows(image_BCHW, config.patch_size))
        activation = ACTIVATIONS[config.gelu]
        normed = torch.ones(tokens + 1, num_images * width, dtype=x.dtype, device=x.device)
        for (scale, shift), token1, token2, channel1, channel2 in self._blocks:
            normed[:tokens] = F.layer_norm(x, (width,), scale, shift, eps).view(tokens, -1)
            h = product_then(activation, token1, normed.t(), None)
            x = product_and("add", token2, h.t(), x.view(tokens, -1)).view(-1, width)
            h = channel1.then(activation, F.layer_norm(x, (width,), eps=eps))
            x = channel2.plus(h, x)
        x = F.layer_norm(x, (width,), eps=eps)
        return self._head(x.view(tokens, num_images, width).mean(dim=0))


# Models whose weights can be packed beforehand; the others are computed by their passes.
PACKED: dict[type[nn.Module], type[FastMixer]] = {Mixer: FastMixer}

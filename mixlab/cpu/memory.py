"""How much memory a model's tensors take at a time, found by running it on tensors that have shapes alone."""

import copy
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """`now`: bytes of the tensors that operations have made and that are still there; `most`: at any time so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known | given:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.remove(key)
        self.now -= num_bytes


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


class Hollow:
    """A model on a CPU that computes shapes only, for any number of images."""

    def __init__(self, model: nn.Module, image_size: tuple[int, int], in_channels: int) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        # Fake tensors on the CPU rather than `meta` ones: the kernels are chosen as on a CPU, attention above all.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._shape = (in_channels, *image_size)
        hollow: dict[int, Any] = {}
        learns = any(p.requires_grad for p in model.parameters())  # else, as for inference, all might
        with self.mode:
            for tensor in (*model.parameters(), *model.buffers()):
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                hollow[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad or not learns) if is_parameter else empty
                )
        self.model = copy.deepcopy(model, hollow)

    def infer(self, num_images: int) -> int:
        """The most that tensors take in a forward pass, beyond weights and images."""
        self.model.eval()
        with self.mode:
            image = torch.empty(num_images, *self._shape, device="cpu")
            with torch.no_grad(), LiveBytes() as live:
                self.model(image)
        return live.most

    def train(self, num_images: int, accumulate: int = 1) -> int:
        """The same for a forward and a backward pass, gradients included, of a batch cut into `accumulate` parts."""
        num_images = max(num_images, 2)  # batch normalisation trains on no single one
        self.model.train()
        with self.mode:
            image = torch.empty(num_images, *self._shape, device="cpu")
            self.model.zero_grad(set_to_none=True)
            with torch.enable_grad(), LiveBytes() as live:
                for part in image.tensor_split(min(accumulate, num_images))[
                    :2
                ]:  # the others are like the second
                    logits = self.model(part)
                    F.cross_entropy(logits, torch.empty_like(logits)).backward()
                    del logits
        return live.most

"""What goes into an exported graph around a model: kept examples to its input, and any image to pixels.

All of it is sums, products and comparisons of tensors, so that every runtime can have it.
"""

import PIL
import torch
from torch import Tensor, nn

from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.modality import Preprocess
from mixlab.errors import UsageError

LUMA = (19595, 38470, 7471)  # ITU-R 601 in 1/65536, as Pillow has it
PILLOW_MAJOR = int(PIL.__version__.split(".")[0])


def graph_of(model: nn.Module, preprocess: Preprocess) -> nn.Module:
    """From examples as `Preprocess.to_graph` gives them to logits."""
    return (
        PixelModel(model, preprocess)
        if isinstance(preprocess, ImagePreprocess)
        else KeptModel(model, preprocess)
    )


class KeptModel(nn.Module):
    """Kept examples (B, *kept_shape) -> logits (B, K)."""

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.model, self.to_input = model, preprocess.in_graph()

    def forward(self, examples: Tensor) -> Tensor:
        return self.model(self.to_input(examples))


class PixelModel(nn.Module):
    """uint8 (B, height, width, channels) at model size -> logits (B, K)."""

    scale: Tensor
    shift: Tensor
    order: Tensor | None

    def __init__(self, model: nn.Module, preprocess: ImagePreprocess) -> None:
        super().__init__()
        self.model = model
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self.register_buffer("scale", (1 / (255 * std)).view(-1, 1, 1))
        self.register_buffer("shift", (mean / std).view(-1, 1, 1))
        permutation = preprocess.permutation
        order = None if permutation is None else torch.from_numpy(permutation.index(preprocess.image_size))
        self.register_buffer("order", order)

    def forward(self, pixels: Tensor) -> Tensor:
        image = pixels.permute(0, 3, 1, 2).float() * self.scale - self.shift
        if self.order is not None:
            image = image.flatten(2)[:, :, self.order].unflatten(2, image.shape[2:])
        return self.model(image)


class ImageModel(nn.Module):
    """One RGB image of any size, uint8 (height, width, 3) -> logits (1, K): crop and scale as `Preprocess` does."""

    def __init__(self, model: nn.Module, preprocess: ImagePreprocess) -> None:
        super().__init__()
        self.pixels = Scale(preprocess)
        self.classify = PixelModel(model, preprocess)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.pixels(image)[None])


class Scale(nn.Module):
    """RGB image uint8 (height, width, 3) -> whole numbers, float32 (model height, model width, channels).

    Pillow's antialiased resampling as a product with a matrix for each side, rounded after each and in the order of
    the Pillow that is installed: along the rows first, but from version 13 on second where the height loses more than
    twice as many pixels as the width.
    """

    def __init__(self, preprocess: ImagePreprocess) -> None:
        super().__init__()
        if preprocess.fit not in ("crop", "stretch", "resize-crop"):
            raise UsageError(f"there is no graph for the fit {preprocess.fit!r}", where="--resize-in-graph")
        self.preprocess = preprocess

    def forward(self, image: Tensor) -> Tensor:
        own, shape, image = self.preprocess, image.shape, image.float()
        if own.channels == 1:
            parts = (weight * image[..., channel] for channel, weight in enumerate(LUMA))
            image = torch.floor((sum(parts, torch.zeros(())) + 32768) / 65536)[..., None]
        # Lengths as tensors: a graph for any size must compute with them.
        rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
        height, width = (rows[-1] + 1).double(), (columns[-1] + 1).double()
        top, bottom, left, right = self._box(height, width)
        across = self._matrix(columns, left, right, own.image_size[1])
        down = self._matrix(rows, top, bottom, own.image_size[0])
        pixels = _along(down, _rounded(torch.matmul(across, image)))
        if PILLOW_MAJOR < 13:
            return pixels
        lost = (height - own.image_size[0], width - own.image_size[1])
        columns_first = (lost[0] > 0) & (lost[0] > 2 * lost[1])
        return torch.where(columns_first, _rounded(torch.matmul(across, _along(down, image))), pixels)

    def _box(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`Preprocess.box` in tensors: top, bottom, left, right."""
        own = self.preprocess
        if own.fit == "stretch":
            box_height, box_width = height, width
        elif own.fit == "resize-crop":
            box_height, box_width = own.crop_fraction * height, own.crop_fraction * width
        else:
            target_height, target_width = own.image_size
            scale = own.crop_fraction * torch.minimum(height / target_height, width / target_width)
            box_height = torch.minimum(target_height * scale, height)
            box_width = torch.minimum(target_width * scale, width)
        top, left = (height - box_height) / 2, (width - box_width) / 2
        return top, top + box_height, left, left + box_width

    def _matrix(self, places: Tensor, start: Tensor, stop: Tensor, length: int) -> Tensor:
        """(length, number of places): how much of each pixel goes into each of the new ones."""
        scale = (stop - start) / length
        wide = torch.clamp(scale, min=1.0)
        centers = start + (torch.arange(length).double() + 0.5) * scale
        x = ((places.double() + 0.5)[None, :] - centers[:, None]).abs() / wide
        if self.preprocess.interpolation == "bicubic":
            near = (1.5 * x - 2.5) * x * x + 1
            far = ((-0.5 * x + 2.5) * x - 4) * x + 2
            weight = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
        else:
            weight = torch.clamp(1 - x, min=0.0)
        return (weight / weight.sum(dim=1, keepdim=True)).float()


def _along(matrix: Tensor, image: Tensor) -> Tensor:
    return _rounded(torch.matmul(matrix, image.flatten(1)).unflatten(1, image.shape[1:]))


def _rounded(values: Tensor) -> Tensor:
    return torch.clamp(torch.floor(values + 0.5), 0, 255)

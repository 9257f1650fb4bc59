"""Tensors of which each rank has a part (torch's DTensor), told by what only those have: nobody else imports it."""

from typing import Any

from torch import Tensor


def is_dtensor(value: Any) -> bool:
    """Whether it is a tensor of which each rank has a part (a DTensor, told by what only that has)."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def distributed_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """`tensor`, the same on all ranks, spread as `like` is, if that is spread and of the same shape."""
    if like is None or not is_dtensor(like) or is_dtensor(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def full_tensor(value: Any) -> Any:
    """A tensor that is the same on all ranks, out of its spread form."""
    return value.full_tensor() if is_dtensor(value) else value


def to_local(value: Any) -> Tensor:
    """This rank's part of a tensor, all of it if it is not spread."""
    part: Tensor = value.to_local() if is_dtensor(value) else value
    return part

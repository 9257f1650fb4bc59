"""Tensors that no process holds whole, in PyTorch's distributed checkpoint format (DCP), read without trusting it.

DCP's index, `.metadata`, is a pickle, which can run code when it is read. It is opened only from a checkpoint whose
manifest verifies, only by --resume, and only the few classes that DCP itself writes may come out of it.
"""

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import StorageMeta
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mixlab.checkpoint.checkpoints import PARTS_INDEX
from mixlab.errors import WeightsError
from mixlab.records import read_bytes

MAX_INDEX_BYTES = 64 * 2**20
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_ALLOWED = {
    "torch": {"Size", "device", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):  # dotted names, which reach into modules, are never in it
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")
        return super().find_class(module, name)


def read_index(folder: Path) -> Metadata:
    """DCP's index of a folder; WeightsError for anything in it that is not about tensors in files of the folder."""
    path = folder / PARTS_INDEX
    try:
        content = read_bytes(path, MAX_INDEX_BYTES)
        _check_costs(content)
        index = _AllowList(io.BytesIO(content)).load()
        if not isinstance(index, Metadata):
            raise ValueError(f"it holds a {type(index).__name__}")
        for name, facts in index.state_dict_metadata.items():
            # Anything but a tensor would be unpickled by DCP without limits.
            if not isinstance(facts, TensorStorageMetadata) or not isinstance(name, str):
                raise ValueError(f"{name!r} is no tensor")
        for place in index.storage_data.values():
            if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
                raise ValueError(f"{place.relative_path!r} is not a plain file of the checkpoint")
    except WeightsError:
        raise
    except Exception as error:  # a hostile pickle can raise nearly anything
        raise WeightsError(f"the index cannot be read: {error}"[:300], where=str(path)) from error
    return index


def _check_costs(content: bytes) -> None:
    """ValueError for a pickle that takes far more memory than it has bytes; nothing of it is run."""
    if sum(content.count(sign) for sign in (b"]", b"}", b"(", b")")) > max(len(content) // 4, 100_000):
        raise ValueError("it is made of empty lists")
    for opcode, argument, _ in pickletools.genops(content):  # which compares lengths with what is there
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError(f"it numbers an object {argument}")
        if opcode.name in ("BYTEARRAY8", "NEXT_BUFFER", "PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "DUP"):
            raise ValueError(f"its pickle uses {opcode.name}")


def shapes_of(folder: Path) -> dict[str, torch.Size]:
    """Shape by name of every tensor that a folder's index lists. WeightsError as for `read_index`."""
    facts = read_index(folder).state_dict_metadata
    return {name: found.size for name, found in facts.items() if isinstance(found, TensorStorageMetadata)}


class _Reader(dcp.FileSystemReader):
    """DCP's reader, with an index that was read by `read_index`."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index.storage_meta is None:
            self._index.storage_meta = StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index


def write_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write every rank's parts into `folder`; all ranks of `group` call it together. OSError if any of them fails."""
    try:
        dcp.save(
            dict(tensors),
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True, overwrite=True),
            process_group=group,
        )
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {cause}") from error


def read_shards(
    folder: Path, place: Callable[[str, torch.Size, torch.dtype], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The tensors in `folder` by file and name, whatever number of ranks wrote them; all ranks call it together.

    place: for a name, shape and type gives what shall be filled, which may be a rank's part of it, or refuses.
    """
    index = read_index(folder)
    targets = {}
    for name, facts in index.state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata)  # `read_index` refuses others
        targets[name] = place(name, facts.size, facts.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="torch.distributed is disabled"
            )  # one process may read too
            dcp.load(dict(targets), storage_reader=_Reader(folder, index))
    except (CheckpointException, RuntimeError, ValueError, AssertionError, KeyError, OSError) as error:
        raise WeightsError(f"its parts cannot be read: {error}"[:300], where=str(folder)) from error
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in targets.items():
        file, _, inner = name.partition(".")
        files.setdefault(file, {})[inner] = tensor
    return files

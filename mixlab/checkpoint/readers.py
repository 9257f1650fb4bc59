"""Tensors out of files that nobody vouches for: .npz, .safetensors and torch's zip format, told apart by content.

What is declared is checked before memory is taken for it, and no code is ever run: numpy never unpickles, and a
.pth file's pickle is read opcode by opcode first and may name nothing but tensors. Tensors are read one at a time.
Damage is noticed by the checksums of the zip formats; safetensors has none, so a flipped bit in its data cannot be
seen here (mixlab's own files carry a digest, which store.py checks).
"""

import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mixlab.errors import WeightsError

Shape = tuple[int, ...]

MAX_MEMBERS = 100_000
MAX_BYTES = 64 * 2**30
MAX_INFLATION = 10  # declared size over file size: weights hardly compress, bombs do
MAX_PICKLE_BYTES = 64 * 2**20
MAX_NPY_HEADER = 10_000

_SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# What torch.save writes for a dictionary of tensors and plain values, and nothing else.
_OPCODES = {
    "PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BINUNICODE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "BINPERSID",
    "REDUCE", "BUILD",
}  # fmt: skip
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}Storage" for name in _STORAGES),
}


class TensorFile:
    """An open file of tensors. shapes, dtypes: of every tensor, known before any is read. metadata: text by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self._read: Callable[[str], Tensor]
        self._close: Callable[[], object] = lambda: None

    def read(self, name: str) -> Tensor:
        """One tensor, in the file's own shape and type; WeightsError if it is damaged or not finite."""
        with _named_errors(self.path, name):
            tensor = self._read(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                raise WeightsError(
                    f"{name} holds {float(tensor[tuple(place)])} at {place}",
                    where=str(self.path),
                    hint="these weights went wrong in training; take earlier ones",
                )
            return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def open_tensors(path: Path) -> TensorFile:
    """The tensors in a .npz, .safetensors or .pth file. WeightsError for anything else, damaged or hostile."""
    with _named_errors(path):
        if path.is_dir():
            raise WeightsError("it is a folder, not a file of weights", where=str(path))
        try:
            with path.open("rb") as file:
                start = file.read(265)
        except FileNotFoundError:
            raise WeightsError("there is no such file", where=str(path)) from None
        if start.startswith(b"PK\x03\x04"):
            return _open_zip(path)
        if len(start) > 8 and start[8:9] == b"{":
            return _open_safetensors(path)
        known = {
            b"\x80": "it is a bare pickle, torch's old format, which could run code",
            b"\x89HDF": "it is a Keras file (HDF5), which no known Mixer weights are in",
            b"PK\x05\x06": "it is an empty archive",
        }
        what = next((text for magic, text in known.items() if start.startswith(magic)), None)
        if what is None:
            what = "it is a tar archive" if start[257:262] == b"ustar" else "it is no known file of weights"
        raise WeightsError(
            what if start else "it is empty",
            where=str(path),
            hint="known are .npz, .safetensors, and .pth as torch >= 1.6 writes it; save the state_dict again",
        )


@contextmanager
def _named_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Whatever a parser says about a file that someone may have made on purpose is a finding about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except WeightsError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        what = "it" if name is None else name
        raise WeightsError(
            f"{what} is damaged or not what it seems: {type(error).__name__}: {text}", where=str(path)
        ) from error


def _refuse(path: Path, what: str, hint: str | None = None) -> WeightsError:
    return WeightsError(what, where=str(path), hint=hint)


def _open_safetensors(path: Path) -> TensorFile:
    file = TensorFile(path)
    handle: Any = safe_open(path, framework="pt")
    opened = handle.__enter__()
    file._close = lambda: handle.__exit__(None, None, None)
    names = list(opened.keys())
    if len(names) > MAX_MEMBERS:
        raise _refuse(path, f"{len(names)} tensors are more than a model has")
    for name in names:
        tensor = opened.get_slice(name)
        if tensor.get_dtype() not in _SAFETENSORS_TYPES:
            raise _refuse(path, f"{name} has type {tensor.get_dtype()}, which weights do not have")
        file.shapes[name] = tuple(tensor.get_shape())
        file.dtypes[name] = _SAFETENSORS_TYPES[tensor.get_dtype()]
    file.metadata = dict(opened.metadata() or {})
    file._read = opened.get_tensor
    return file


def _open_zip(path: Path) -> TensorFile:
    archive = zipfile.ZipFile(path)
    try:
        members = _check_members(path, archive)
        if any(name.endswith("/data.pkl") for name in members):
            return _open_pth(path, archive, members)
        return _open_npz(path, archive, members)
    except BaseException:
        archive.close()
        raise


def _check_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by name, if what the directory declares can be true."""
    infos, size = archive.infolist(), path.stat().st_size
    if not infos or len(infos) > MAX_MEMBERS:
        raise _refuse(path, f"an archive of {len(infos)} members is no file of weights")
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise _refuse(path, "two members of the archive have the same name")
    with path.open("rb") as file:
        file.seek(-22, 2)
        last = file.read()
    count = int.from_bytes(last[10:12], "little")
    if not last.startswith(b"PK\x05\x06") or (count != len(infos) and count != 0xFFFF):
        raise _refuse(path, "its directory does not end as numpy and torch write it, or counts other members")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refuse(path, f"{info.filename} is encrypted or packed in an unusual way")
        if info.header_offset < end:
            raise _refuse(path, f"{info.filename} overlaps another member")
        end = info.header_offset + 30 + info.compress_size
    declared = sum(info.file_size for info in infos)
    if end > size or declared > min(MAX_BYTES, MAX_INFLATION * size):
        raise _refuse(path, f"it declares {declared} bytes in a file of {size}: a bomb, or damaged")
    return members


def _open_npz(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> TensorFile:
    file = TensorFile(path)
    file._close = archive.close
    layouts: dict[str, tuple[zipfile.ZipInfo, int, np.dtype, bool]] = {}
    for member, info in members.items():
        if not member.endswith(".npy"):
            raise _refuse(path, f"{member!r} is neither a numpy array nor a part of torch's format")
        name = member.removesuffix(".npy")
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            readers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in readers:
                raise _refuse(path, f"{name} has an unknown version of numpy's format: {version}")
            shape, fortran, dtype = readers[version](stream, max_header_size=MAX_NPY_HEADER)
            start = stream.tell()
        file.dtypes[name] = _torch_type(path, name, dtype)
        if len(shape) > 8 or any(type(side) is not int or side < 0 for side in shape):
            raise _refuse(path, f"{name} has the shape {shape}")
        if start + prod(shape) * dtype.itemsize != info.file_size:
            raise _refuse(path, f"{name} declares {shape} {dtype}, which is not the size of its data")
        file.shapes[name] = shape
        layouts[name] = (info, start, dtype, fortran)

    def read(name: str) -> Tensor:
        info, start, dtype, fortran = layouts[name]
        with archive.open(info) as stream:
            stream.read(start)
            data = bytearray(stream.read(info.file_size - start))
            stream.read(1)  # reaching the end is what makes zipfile compare the checksum
        if len(data) != info.file_size - start:
            raise _refuse(path, f"{name} ends too early")
        shape = file.shapes[name]
        array = np.frombuffer(data, dtype=dtype).reshape(shape[::-1] if fortran else shape)
        array = array.T if fortran else array
        if dtype.kind == "V":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))

    file._read = read
    return file


def _torch_type(path: Path, name: str, dtype: np.dtype) -> torch.dtype:
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.fields is None and dtype.subdtype is None:
        return torch.bfloat16  # how JAX's arrays of bfloat16 are written
    if dtype.hasobject:
        raise _refuse(path, f"{name} holds Python objects, which could run code; weights are numbers")
    if (dtype.kind, dtype.itemsize) not in {
        *(("f", n) for n in (2, 4, 8)),
        *(("i", n) for n in (1, 2, 4, 8)),
        ("u", 1),
        ("b", 1),
    }:
        raise _refuse(path, f"{name} has type {dtype}, which weights do not have")
    return torch.from_numpy(np.zeros(1, dtype.newbyteorder("="))).dtype


def _open_pth(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> TensorFile:
    folders = {name.split("/", 1)[0] for name in members}
    pickles = [name for name in members if name.endswith(".pkl")]
    if len(folders) != 1 or len(pickles) != 1 or min(i.header_offset for i in members.values()):
        raise _refuse(path, "it is not laid out as torch.save does it")
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED:
            raise _refuse(path, f"{name} is compressed, which torch.save never does")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise _refuse(path, "the description of its tensors is too large")
    broken = archive.testzip()
    if broken is not None:
        raise _refuse(path, f"{broken} is damaged: its checksum is wrong")
    _check_pickle(path, archive.read(pickles[0]))
    archive.close()
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = _find_tensors(path, content)
    file = TensorFile(path)
    declared = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        declared += size
        if (
            tensor.layout is not torch.strided
            or tensor.is_quantized
            or size > tensor.untyped_storage().nbytes()
        ):
            raise _refuse(path, f"{name} is no plain tensor, or larger than its data")
        file.shapes[name], file.dtypes[name] = tuple(tensor.shape), tensor.dtype
    if declared > path.stat().st_size:
        raise _refuse(path, f"it declares {declared} bytes of tensors in a file of {path.stat().st_size}")
    file._read = lambda name: tensors[name].detach()
    return file


def _check_pickle(path: Path, content: bytes) -> None:
    """Refuse every pickle that does anything but describe tensors and plain values; nothing of it is run."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and argument not in _GLOBALS:
            raise _refuse(
                path,
                f"it wants to use {str(argument).replace(' ', '.', 1)[:100]}, which is no part of weights",
                "where you trust it, load it with torch yourself and save only its state_dict",
            )
        if opcode.name not in _OPCODES:
            raise _refuse(
                path,
                f"its pickle uses {opcode.name}, which torch.save does not write for weights",
                "where you trust it, load it with torch yourself and save only its state_dict",
            )


def _find_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The state_dict itself, or the one under `state_dict` or `model`, without a `module.` before every name."""
    for key in (None, "state_dict", "model"):
        found = content if key is None else content.get(key)
        if not isinstance(found, dict):
            if key is None:
                break
            continue
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            if all(name.startswith("module.") for name in tensors):
                tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
            return tensors
    raise _refuse(path, "there is no state_dict in it", "it should be what model.state_dict() gives")

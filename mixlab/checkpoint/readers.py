"""Tensors out of files that nobody vouches for: .npz, .safetensors and torch's zip format, told apart by content.

What is declared is checked before memory is taken for it, and no code is ever run: numpy never unpickles, and a
.pth file's pickle is read opcode by opcode first and may name nothing but tensors. Tensors are read one at a time.
Damage is noticed by the checksums of the zip formats; safetensors has none, so a flipped bit in its data cannot be
seen here (mixlab's own files carry a digest, which store.py checks).
"""

import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mixlab.checkpoint.pth import open_pth
from mixlab.checkpoint.tensor_file import TensorFile, named_errors, refuse
from mixlab.errors import WeightsError

MAX_MEMBERS = 100_000
MAX_BYTES = 64 * 2**30
MAX_INFLATION = 10  # declared size over file size: weights hardly compress, bombs do
MAX_NPY_HEADER = 10_000

_SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def open_tensors(path: Path) -> TensorFile:
    """The tensors in a .npz, .safetensors or .pth file. WeightsError for anything else, damaged or hostile."""
    with named_errors(path):
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


def _open_safetensors(path: Path) -> TensorFile:
    file = TensorFile(path)
    handle: Any = safe_open(path, framework="pt")
    opened = handle.__enter__()
    file._close = lambda: handle.__exit__(None, None, None)
    names = list(opened.keys())
    if len(names) > MAX_MEMBERS:
        raise refuse(path, f"{len(names)} tensors are more than a model has")
    for name in names:
        tensor = opened.get_slice(name)
        if tensor.get_dtype() not in _SAFETENSORS_TYPES:
            raise refuse(path, f"{name} has type {tensor.get_dtype()}, which weights do not have")
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
            return open_pth(path, archive, members)
        return _open_npz(path, archive, members)
    except BaseException:
        archive.close()
        raise


def _check_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by name, if what the directory declares can be true."""
    infos, size = archive.infolist(), path.stat().st_size
    if not infos or len(infos) > MAX_MEMBERS:
        raise refuse(path, f"an archive of {len(infos)} members is no file of weights")
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise refuse(path, "two members of the archive have the same name")
    with path.open("rb") as file:
        file.seek(-22, 2)
        last = file.read()
    count = int.from_bytes(last[10:12], "little")
    if not last.startswith(b"PK\x05\x06") or (count != len(infos) and count != 0xFFFF):
        raise refuse(path, "its directory does not end as numpy and torch write it, or counts other members")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse(path, f"{info.filename} is encrypted or packed in an unusual way")
        if info.header_offset < end:
            raise refuse(path, f"{info.filename} overlaps another member")
        end = info.header_offset + 30 + info.compress_size
    declared = sum(info.file_size for info in infos)
    if end > size or declared > min(MAX_BYTES, MAX_INFLATION * size):
        raise refuse(path, f"it declares {declared} bytes in a file of {size}: a bomb, or damaged")
    return members


def _open_npz(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> TensorFile:
    file = TensorFile(path)
    file._close = archive.close
    layouts: dict[str, tuple[zipfile.ZipInfo, int, np.dtype, bool]] = {}
    for member, info in members.items():
        if not member.endswith(".npy"):
            raise refuse(path, f"{member!r} is neither a numpy array nor a part of torch's format")
        name = member.removesuffix(".npy")
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            readers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in readers:
                raise refuse(path, f"{name} has an unknown version of numpy's format: {version}")
            shape, fortran, dtype = readers[version](stream, max_header_size=MAX_NPY_HEADER)
            start = stream.tell()
        file.dtypes[name] = _torch_type(path, name, dtype)
        if len(shape) > 8 or any(type(side) is not int or side < 0 for side in shape):
            raise refuse(path, f"{name} has the shape {shape}")
        if start + prod(shape) * dtype.itemsize != info.file_size:
            raise refuse(path, f"{name} declares {shape} {dtype}, which is not the size of its data")
        file.shapes[name] = shape
        layouts[name] = (info, start, dtype, fortran)

    def read(name: str) -> Tensor:
        info, start, dtype, fortran = layouts[name]
        with archive.open(info) as stream:
            stream.read(start)
            data = bytearray(stream.read(info.file_size - start))
            stream.read(1)  # reaching the end is what makes zipfile compare the checksum
        if len(data) != info.file_size - start:
            raise refuse(path, f"{name} ends too early")
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
        raise refuse(path, f"{name} holds Python objects, which could run code; weights are numbers")
    if (dtype.kind, dtype.itemsize) not in {
        *(("f", n) for n in (2, 4, 8)),
        *(("i", n) for n in (1, 2, 4, 8)),
        ("u", 1),
        ("b", 1),
    }:
        raise refuse(path, f"{name} has type {dtype}, which weights do not have")
    return torch.from_numpy(np.zeros(1, dtype.newbyteorder("="))).dtype

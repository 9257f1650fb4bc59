"""torch's zip format, .pth: its pickle is read opcode by opcode before torch reads it, and may only name tensors."""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixlab.checkpoint.tensor_file import TensorFile, refuse

MAX_PICKLE_BYTES = 64 * 2**20
MAX_DEPTH = 4  # of tuples in tuples
_MARK, _GLOBAL, _ORDERED_DICT = -1, -2, -3  # on the stack, where other values have a depth
_TRUSTED = "where you trust it, load it with torch yourself and save only its state_dict"
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


def open_pth(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> TensorFile:
    folders = {name.split("/", 1)[0] for name in members}
    pickles = [name for name in members if name.endswith(".pkl")]
    if len(folders) != 1 or len(pickles) != 1 or min(i.header_offset for i in members.values()):
        raise refuse(path, "it is not laid out as torch.save does it")
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED:
            raise refuse(path, f"{name} is compressed, which torch.save never does")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise refuse(path, "the description of its tensors is too large")
    broken = archive.testzip()
    if broken is not None:
        raise refuse(path, f"{broken} is damaged: its checksum is wrong")
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
            raise refuse(path, f"{name} is no plain tensor, or larger than its data")
        file.shapes[name], file.dtypes[name] = tuple(tensor.shape), tensor.dtype
    if declared > path.stat().st_size:
        raise refuse(path, f"it declares {declared} bytes of tensors in a file of {path.stat().st_size}")
    file._read = lambda name: tensors[name].detach()
    return file


def _check_pickle(path: Path, content: bytes) -> None:
    """Refuse every pickle that does anything but describe tensors and plain values; nothing of it is run.

    torch's own reader of weights keeps code out. It does not keep out `bytearray(10**11)`, nor tuples that hold each
    other: hashing one as a key takes twice as long with each level, and a million levels end Python with SIGSEGV.
    """
    stack: list[int] = []  # for each value how deep its tuples go: 0 for a plain one, 1 for a list
    memo: dict[int, int] = {}
    before = ""
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name == "GLOBAL" and argument not in _GLOBALS:
            what = f"wants to use {str(argument).replace(' ', '.', 1)[:100]}, which is no part of weights"
            raise refuse(path, f"it {what}", _TRUSTED)
        if name not in _OPCODES:
            raise refuse(
                path, f"its pickle uses {name}, which torch.save does not write for weights", _TRUSTED
            )
        if name == "LONG1" and abs(argument) >= 2**64:  # as keys, many of them can be made to share one hash
            raise refuse(path, "its pickle has a number of more than 64 bits, which weights do not have")
        taken = _take(stack, opcode)
        is_strange = (
            (name == "SETITEM" and taken[1] > 0)
            or (name == "SETITEMS" and max([0, *taken[1::2]]) > 0)
            or (name == "BINPERSID" and taken != [1])
            or (name == "REDUCE" and taken[0] != (_ORDERED_DICT if before == "EMPTY_TUPLE" else _GLOBAL))
        )
        for kind in opcode.stack_after:
            depth = 0
            if kind is pickletools.markobject:
                depth = _MARK
            elif kind is pickletools.pytuple:
                depth = 1 + max([0, *taken])
            elif kind in (pickletools.pylist, pickletools.pydict):
                depth = 1
            elif name == "GLOBAL":
                depth = _ORDERED_DICT if argument == "collections OrderedDict" else _GLOBAL
            elif name in ("BINGET", "LONG_BINGET"):  # a tuple again: one in which it stands is too deep
                known = memo.get(argument, 0)
                depth = MAX_DEPTH if known > 0 else known
            stack.append(depth)
        if is_strange or (stack and stack[-1] > MAX_DEPTH):
            raise refuse(
                path, "its pickle holds tuples as torch.save does not write them for weights", _TRUSTED
            )
        if name in ("BINPUT", "LONG_BINPUT") and stack:
            memo[argument] = stack[-1]
        before = name


def _take(stack: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """What an opcode takes off the stack, the lowest first; without the mark."""
    kinds, taken = list(opcode.stack_before), []
    if pickletools.markobject in kinds:
        kinds = kinds[: kinds.index(pickletools.markobject)]
        while stack and (top := stack.pop()) != _MARK:
            taken.append(top)
    taken += [stack.pop() if stack else 0 for _ in kinds]
    return taken[::-1]


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
    raise refuse(path, "there is no state_dict in it", "it should be what model.state_dict() gives")

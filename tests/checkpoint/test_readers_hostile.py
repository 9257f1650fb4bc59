"""Files made to harm: no code runs, no memory is taken for what is only declared, and the reason is named."""

import collections
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixlab.checkpoint.readers import open_tensors
from mixlab.errors import WeightsError


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {name: file.read(name).clone() for name in file.shapes}


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as error:
        read_all(path)
    assert error.value.where == str(path)
    return str(error.value)


class Call:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def raw(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


# 40 pairs, each of the one before twice: to take its hash, or to print it, is 2^40 steps.
HOLDING = b")" + b"".join(b"q%bh%b\x86" % (bytes([i]), bytes([i])) for i in range(40))

# Each of these would leave the file `canary` behind, take the machine's memory, or confuse a reader, if it ran.
TOUCH = "open('canary', 'w').close()"
PAYLOADS: dict[str, bytes] = {
    "os.system": pickle.dumps(Call(os.system, "touch canary"), 2),
    "posix.system by name": raw(b"cposix\nsystem\n", text("touch canary"), b"\x85R"),
    "eval": pickle.dumps(Call(eval, TOUCH), 2),
    "exec": pickle.dumps(Call(exec, TOUCH), 2),
    "compile": pickle.dumps(Call(compile, TOUCH, "x", "exec"), 2),
    "getattr": pickle.dumps(Call(getattr, os, "system") if False else Call(getattr, "x", "upper"), 2),
    "import": raw(b"c__builtin__\n__import__\n", text("os"), b"\x85R"),
    "subprocess": pickle.dumps(Call(subprocess.Popen, ["touch", "canary"]), 2),
    "runpy": raw(b"crunpy\nrun_path\n", text("canary.py"), b"\x85R"),
    "open for writing": pickle.dumps(Call(open, "canary", "w"), 2),
    "pty": raw(b"cpty\nspawn\n", text("touch canary"), b"\x85R"),
    "code": raw(b"ccode\ninteract\n", b")R"),
    "pickle in pickle": raw(b"c_pickle\nloads\n", text("x"), b"\x85R"),
    "torch.load again": raw(b"ctorch\nload\n", text("other.pth"), b"\x85R"),
    "torch.hub": raw(b"ctorch.hub\nload\n", text("x/y"), b"\x85R"),
    "numpy scalar": pickle.dumps({"x": np.float32(1)}, 2),
    "numpy array of objects": pickle.dumps({"x": np.array([Call(os.system, "touch canary")], object)}, 2),
    "INST": raw(b"(", text("touch canary"), b"ios\nsystem\n"),
    "OBJ": raw(b"(cos\nsystem\n", text("touch canary"), b"o"),
    "NEWOBJ": raw(b"csubprocess\nPopen\n", text("touch canary"), b"\x85\x81"),
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + text("touch canary") + b"\x85R.",
    "STACK_GLOBAL through the memo": raw(text("os"), b"q\x000", text("system"), b"q\x010h\x00h\x01\x93"),
    "EXT1": raw(b"\x82\x01"),
    "EXT4": raw(b"\x84" + struct.pack("<i", 7)),
    "protocol 4 frames": pickle.dumps({"x": [1, 2]}, 4),
    "protocol 5 buffers": b"\x80\x05\x97.",
    "BUILD on a function": raw(b"cbuiltins\nprint\n}", text("__doc__"), text("x"), b"sb"),
    "bytearray bomb": pickle.dumps(Call(bytearray, 10**11), 2),
    "range list bomb": pickle.dumps(Call(list, range(10**10)), 2),
    "string repeat bomb": raw(b"coperator\nmul\n", text("x"), b"\x8a\x05\x00\xe4\x0b\x54\x02\x86R"),
    "tuples that hold each other as a key": raw(b"}", HOLDING, b"K\x01s"),
    "tuples that hold each other as keys": raw(b"}(", HOLDING, b"K\x01u"),
    "tuples that hold each other as a storage's name": raw(
        b"(", text("storage"), b"ctorch\nFloatStorage\n", HOLDING, text("cpu"), b"K\x01tQ"
    ),
    "tuples that hold each other in an OrderedDict": raw(
        b"ccollections\nOrderedDict\n]]", HOLDING, b"aK\x01aa\x85R"
    ),
    "deep tuples as a key": raw(b"})", b"\x85" * 1_000_000, b"K\x01s"),
    "lists that hold each other as a function": raw(
        b"]q\x00", *(b"](h%bh%beq%b" % (bytes([i]), bytes([i]), bytes([i + 1])) for i in range(40)), b")R"
    ),
    "keys of one hash": raw(
        b"}(",
        *(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(9, 50_000)),
        b"u",
    ),
    "huge memo index": raw(b"N", b"r" + struct.pack("<I", 2**32 - 1), b"0N"),
    "get of nothing": raw(b"h\x07"),
    "long without end": b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"x",
    "string without end": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x",
    "deep nesting": raw(b"(" * 100_000, b"t" * 100_000),
    "no stop": b"\x80\x02}",
    "empty": b"",
    "text persistent id": b"\x80\x02Pstorage\n.",
    "storage of a strange type": raw(
        b"(", text("storage"), b"cos\nsystem\n", text("0"), text("cpu"), b"K\x01tQ"
    ),
    "set of lists": raw(b"c__builtin__\nset\n]\x85R"),
    "class with a setstate": pickle.dumps(collections.Counter("abc"), 2),
    "complex": pickle.dumps(complex(1, 2), 2),
    "a number": pickle.dumps(5, 2),
    "a list": raw(b"]"),
    "none": raw(b"N"),
}
assert len(PAYLOADS) >= 40


def write_pth(
    path: Path, content: bytes, *, extra: dict[str, bytes] | None = None, method=zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        members = {"data.pkl": content, "byteorder": b"little", "version": b"3\n", "data/0": bytes(64)}
        for name, data in (members | (extra or {})).items():
            archive.writestr(f"archive/{name}", data)


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pth(tmp_path / "a.pth", PAYLOADS[name])
    reason = refused(tmp_path / "a.pth")
    assert len(reason) < 1000
    assert not Path("canary").exists()
    if "hold each other" in name or name in ("deep tuples as a key", "keys of one hash"):
        assert "its pickle h" in reason  # has a number, holds tuples
    if name in ("os.system", "eval", "subprocess", "INST", "OBJ", "EXT1"):
        assert any(word in reason for word in ("wants to use", "pickle uses")), reason
    # The same bytes as a bare pickle, and as an array's content.
    (tmp_path / "bare.pth").write_bytes(PAYLOADS[name])
    refused(tmp_path / "bare.pth")


def test_arrays_of_objects_are_refused_and_nothing_of_them_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", good=np.zeros(2), bad=np.array([Call(os.system, "touch canary"), None], object))
    assert "bad holds Python objects" in refused(Path("a.npz"))
    assert not Path("canary").exists()
    np.savez("b.npz", bad=np.zeros(2, [("x", "f4"), ("y", "O")]))
    refused(Path("b.npz"))


@pytest.mark.parametrize("dtype", ["U4", "S4", "c8", "M8[s]", "V4", "V3", [("x", "f4")], "f2,f4", "u8", "m8"])
def test_types_that_no_weights_have_are_refused(dtype, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3, dtype))
    assert "type" in refused(tmp_path / "a.npz")


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1")
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + data


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }\n"


@pytest.mark.parametrize(
    "content",
    [
        npy(HEADER % "4,", bytes(12)),
        npy(HEADER % "4,", bytes(20)),
        npy(HEADER % "-4,", b""),
        npy(HEADER % "99999999999,", bytes(16)),
        npy(HEADER % "2**40,", bytes(16)),
        npy(HEADER % "True,", bytes(4)),
        npy(HEADER % ("1," * 40), bytes(4)),
        npy(HEADER % "4", bytes(16)),
        npy("__import__('os').system('touch canary')", bytes(16)),
        npy("(" * 5000 + ")" * 5000, bytes(16)),
        npy("{'descr': '<f4'}", bytes(16)),
        npy(HEADER % "4,", bytes(16), b"\x03\x00"),
        npy(HEADER % "4,", bytes(16), b"\x09\x00"),
        npy("x" * 60_000, bytes(16)),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
        b"\x93NUMPX\x01\x00",
        b"",
    ],
)
def test_array_headers_that_lie_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    refused(Path("a.npz"))
    assert not Path("canary").exists()


def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(5_000_000, np.float32))
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    assert "declares" in refused(tmp_path / "a.npz")
    write_pth(
        tmp_path / "a.pth",
        pickle.dumps({}, 2),
        extra={"data/1": bytes(20_000_000)},
        method=zipfile.ZIP_DEFLATED,
    )
    assert "declares" in refused(tmp_path / "a.pth")
    write_pth(
        tmp_path / "b.pth",
        pickle.dumps({}, 2),
        extra={"data/1": os.urandom(1000)},
        method=zipfile.ZIP_DEFLATED,
    )
    assert "compressed" in refused(tmp_path / "b.pth")


def edit_directory(data: bytes, offset: int, value: bytes) -> bytes:
    """The same zip file with bytes of its first central directory entry replaced."""
    start = data.index(b"PK\x01\x02") + offset
    return data[:start] + value + data[start + len(value) :]


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (8, b"\x01\x00"),  # flags: encrypted
        (10, b"\x0c\x00"),  # method: bzip2
        (10, b"\x63\x00"),  # method: AES
        (20, struct.pack("<I", 2**31)),  # packed size
        (24, struct.pack("<I", 2**31)),  # unpacked size
        (24, struct.pack("<I", 5)),
        (42, struct.pack("<I", 7)),  # offset of the member
        (16, b"\x00\x00\x00\x00"),  # checksum
    ],
)
def test_directories_that_lie_are_refused(offset, value, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(100, dtype=np.float32), y=np.arange(100, dtype=np.float32))
    good = (tmp_path / "a.npz").read_bytes()
    assert len(read_all(tmp_path / "a.npz")) == 2
    (tmp_path / "a.npz").write_bytes(edit_directory(good, offset, value))
    refused(tmp_path / "a.npz")


def test_members_that_share_a_name_or_their_bytes_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(4, np.float32))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x.npy", buffer.getvalue())
    assert "same name" in refused(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
        other = zipfile.ZipInfo("y.npy")
        first = archive.infolist()[0]
        other.header_offset, other.CRC = first.header_offset, first.CRC
        other.file_size, other.compress_size = first.file_size, first.compress_size
        archive.filelist.append(other)
        archive.NameToInfo["y.npy"] = other
        archive._didModify = True
    assert "overlaps" in refused(tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("x.txt", b"hello")
    assert "neither" in refused(tmp_path / "c.npz")


def test_two_pickles_two_folders_or_something_before_the_zip_are_refused(tmp_path):
    good = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, good)
    for name, extra in (("a", {"other.pkl": PAYLOADS["os.system"]}), ("b", {"../evil/data.pkl": b"x"})):
        write_pth(tmp_path / f"{name}.pth", pickle.dumps({}, 2), extra=extra)
        refused(tmp_path / f"{name}.pth")
    (tmp_path / "c.pth").write_bytes(b"PK\x03\x04" + good.getvalue())
    refused(tmp_path / "c.pth")
    with zipfile.ZipFile(tmp_path / "d.pth", "w") as archive:
        archive.writestr("one/data.pkl", pickle.dumps({}, 2))
        archive.writestr("two/version", b"3")
    refused(tmp_path / "d.pth")


def test_tensors_larger_than_their_data_are_refused(tmp_path):
    torch.save({"x": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pth")
    assert "larger than its data" in refused(tmp_path / "a.pth")
    base = torch.zeros(1000)
    torch.save({f"x{i}": base for i in range(50)}, tmp_path / "b.pth")
    assert "declares" in refused(tmp_path / "b.pth")
    torch.save({"x": torch.eye(3).to_sparse()}, tmp_path / "c.pth")
    refused(tmp_path / "c.pth")


def safetensors_file(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if size is None else size) + content + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),  # overlap
        safetensors_file({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)),  # hole
        safetensors_file({"a": entry([2], 0, 8)}, bytes(4)),
        safetensors_file({"a": entry([2], 0, 8)}, bytes(16)),
        safetensors_file({"a": entry([3], 0, 8)}, bytes(8)),
        safetensors_file({"a": entry([-2], 0, 8)}, bytes(8)),
        safetensors_file({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)),
        safetensors_file({"a": entry([2**62, 4], 0, 0)}),
        safetensors_file({"a": entry([2], 8, 0)}, bytes(8)),
        safetensors_file({"a": entry([2], 0, 8, "F31")}, bytes(8)),
        safetensors_file({"a": entry([2], 0, 16, "C64")}, bytes(16)),
        safetensors_file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' * 1, bytes(8)),
        safetensors_file({"a": entry([2], 0, 8)}, bytes(8), size=2**63),
        safetensors_file({"a": entry([2], 0, 8)}, bytes(8), size=200_000_000),
        safetensors_file({"a": entry([2], 0, 8)}, bytes(8), size=10**6),
        safetensors_file(b"{" * 100_000),
        safetensors_file(b'{"\xff\xfe": 1}'),
        safetensors_file({"a": 5}),
        safetensors_file({"__metadata__": {"a": 5}}),
        safetensors_file([]),
    ],
)
def test_safetensors_headers_that_lie_are_refused(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors")


def good_files(folder: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    arrays = {f"layer{i}/kernel": rng.standard_normal((8, 6)).astype(np.float32) for i in range(4)}
    np.savez(folder / "a.npz", **arrays)
    np.savez_compressed(folder / "b.npz", **arrays)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(tensors, folder / "a.pth")
    save_file(tensors, folder / "a.safetensors")
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["a.npz", "b.npz", "a.pth", "a.safetensors"])
def test_a_truncated_file_is_always_refused(name, tmp_path):
    path = good_files(tmp_path)[name]
    content = path.read_bytes()
    assert len(read_all(path)) == 4
    for cut in range(50):
        path.write_bytes(content[: len(content) * cut // 50])
        refused(path)
    path.write_bytes(content[:-1])
    refused(path)


@pytest.mark.parametrize("name", ["a.npz", "b.npz", "a.pth"])
def test_a_flipped_bit_is_refused_or_changes_nothing(name, tmp_path):
    path = good_files(tmp_path)[name]
    content, expected = path.read_bytes(), read_all(path)
    draw = random.Random(0)
    num_refused = 0
    for _ in range(400):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            found = read_all(path)
        except WeightsError:
            num_refused += 1
            continue
        # Times and attributes of members mean nothing; a name is checked where it is known which there should be.
        values = zip(found.values(), expected.values(), strict=True)
        assert all(torch.equal(a, b) for a, b in values)
    assert num_refused > 200


def test_in_safetensors_a_flipped_bit_of_the_data_cannot_be_seen(tmp_path):
    # What mixlab writes itself carries a digest: tests/checkpoint/test_store.py.
    path = good_files(tmp_path)["a.safetensors"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x01
    path.write_bytes(content)
    assert len(read_all(path)) == 4


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the address space is limited as Linux does it"
)
def test_bombs_are_refused_with_little_memory(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(50_000_000, np.float32))
    (tmp_path / "b.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", npy(HEADER % "60000000000,", bytes(16)))
    torch.save({"x": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "c.pth")
    (tmp_path / "d.safetensors").write_bytes(
        safetensors_file({"a": entry([2], 0, 8)}, bytes(8), size=90_000_000)
    )
    write_pth(tmp_path / "e.pth", PAYLOADS["bytearray bomb"])
    code = """
import resource, sys
from pathlib import Path
from mixlab.checkpoint.readers import open_tensors
from mixlab.errors import WeightsError
size = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + 150 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        open_tensors(Path(path))
    except WeightsError as error:
        print("refused", "Memory" not in str(error))
"""
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    output = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["refused", "True"] * 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0

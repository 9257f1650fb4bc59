"""Readers of weight files: what other libraries wrote is read equal, one tensor at a time."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.torch import save_file

from mixlab.checkpoint.readers import open_tensors
from mixlab.errors import WeightsError

TYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs"]),
    min_size=1,
    max_size=12,
)
ARRAYS = st.dictionaries(
    NAMES.filter(lambda name: "\\" not in name and not name.endswith("/") and name not in (".", "..")),
    npst.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint8]),
        npst.array_shapes(min_dims=0, max_dims=4, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False},
    ),
    min_size=1,
    max_size=5,
)


def read_all(path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        found = {name: file.read(name).clone() for name in file.shapes}
        assert {name: tuple(t.shape) for name, t in found.items()} == file.shapes
        assert {name: t.dtype for name, t in found.items()} == file.dtypes
        return found


@QUICK
@given(arrays=ARRAYS, packed=st.booleans())
def test_what_numpy_wrote_is_read_equal(arrays, packed, tmp_path):
    (np.savez_compressed if packed else np.savez)(
        tmp_path / "a.npz", **{f"k{n}": a for n, a in enumerate(arrays.values())}
    )
    found = read_all(tmp_path / "a.npz")
    for number, array in enumerate(arrays.values()):
        assert np.array_equal(found[f"k{number}"].numpy(), array)


@QUICK
@given(arrays=ARRAYS)
def test_what_safetensors_and_torch_wrote_is_read_equal(arrays, tmp_path):
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        found = read_all(tmp_path / name)
        assert set(found) == set(tensors)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_of_weights_is_read(dtype, tmp_path):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    torch.save({"x": tensor}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        assert torch.equal(read_all(tmp_path / name)["x"], tensor)


def test_unusual_but_honest_arrays_are_read(tmp_path):
    column = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    bfloat16 = torch.arange(6).to(torch.bfloat16)
    np.savez(
        tmp_path / "a.npz",
        column=column,
        big=np.arange(3).astype(">f4"),
        half=bfloat16.view(torch.int16).numpy().view("V2"),  # how JAX's bfloat16 is written
        scalar=np.float32(2.5),
        empty=np.zeros((0, 3), np.float32),
    )
    found = read_all(tmp_path / "a.npz")
    assert np.array_equal(found["column"].numpy(), column)
    assert found["big"].tolist() == [0, 1, 2]
    assert torch.equal(found["half"], bfloat16)
    assert found["scalar"].item() == 2.5
    assert found["empty"].shape == (0, 3)


def test_training_states_of_others_are_unwrapped(tmp_path):
    state = torch.nn.Linear(2, 3).state_dict()
    for wrapped in (
        {"state_dict": state, "epoch": 3, "meta": {"classes": ["a", "b"], "lr": 0.5}},
        {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        state,
    ):
        torch.save(wrapped, tmp_path / "a.pth")
        found = read_all(tmp_path / "a.pth")
        assert set(found) == {"weight", "bias"}
        assert torch.equal(found["weight"], state["weight"])


def test_shared_and_transposed_tensors_are_read(tmp_path):
    base = torch.randn(4, 3)
    torch.save({"a": base.T, "b": base[1:3]}, tmp_path / "a.pth")
    found = read_all(tmp_path / "a.pth")
    assert torch.equal(found["a"], base.T)
    assert torch.equal(found["b"], base[1:3])


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x80\x02}.", b"PK\x05\x06" + bytes(18), b"\x89HDF\r\n", b"{}" * 300]
)
def test_what_is_no_weights_file_says_what_it_is_or_that_it_is_unknown(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(WeightsError) as error:
        open_tensors(tmp_path / "a")
    assert error.value.where == str(tmp_path / "a")


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match="folder"):
        open_tensors(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        open_tensors(tmp_path / "none")


@pytest.mark.parametrize("kind", ["npz", "pth", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_place(kind, value, tmp_path):
    tensor = torch.zeros(3, 4)
    tensor[1, 2] = value
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, bad=tensor.numpy(), good=np.zeros(2))
    elif kind == "pth":
        torch.save({"bad": tensor, "good": torch.zeros(2)}, path)
    else:
        save_file({"bad": tensor, "good": torch.zeros(2)}, path)
    with open_tensors(path) as file:
        file.read("good")
        with pytest.raises(WeightsError, match=r"bad holds .* at \[1, 2\]"):
            file.read("bad")


def test_reading_takes_the_memory_of_one_tensor_at_a_time(tmp_path):
    # 40 arrays of 4 MB: all together are 160 MB, one and its copies far below 60.
    np.savez(tmp_path / "a.npz", **{f"k{i}": np.full(1 << 20, i, np.float32) for i in range(40)})
    code = """
import sys
from pathlib import Path
from mixlab.checkpoint.readers import open_tensors
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
with open_tensors(Path(sys.argv[1])) as file:
    total = sum(float(file.read(name)[0]) for name in file.shapes)
print(total, peak() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of memory is read from /proc")
    command = [sys.executable, "-c", code, str(tmp_path / "a.npz")]
    total, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(total) == sum(range(40))
    assert int(peak) < 60_000


def test_a_training_saved_whole_by_torch_is_read_for_its_state_dict(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = [{"params": [parameter], "lr": 0.1 * n} for n, parameter in enumerate(model.parameters(), 1)]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))  # one tuple, which every group holds
    for group in optimizer.param_groups:
        group["eps2"], group["shapes"] = (1e-30, 1e-3), [(1, 2), [3, (4, 5)]]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "rng": 2**64 - 1,
        "parameters": torch.nn.ParameterDict({"x": model[0].weight}).state_dict(),
    }
    torch.save(content, tmp_path / "a.pth")
    with open_tensors(tmp_path / "a.pth") as file:
        assert set(file.shapes) == set(model.state_dict())
        assert torch.equal(file.read("1.bias"), model[1].bias.detach())
    torch.save(
        {name: torch.nn.Parameter(value) for name, value in model.state_dict().items()}, tmp_path / "b.pth"
    )
    with open_tensors(tmp_path / "b.pth") as file:
        assert set(file.shapes) == set(model.state_dict())

"""How a process uses the machine."""

import os
import platform
import subprocess
import sys

import pytest
import torch

import mixlab.device

COUNT_FAULTS = """
import resource, torch
from mixlab.device import keep_memory
print(keep_memory())
torch.set_num_threads(1)
a = torch.ones(16 << 20)  # 64 MiB: glibc itself keeps up to 32
for _ in range(5): a * 2
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): a * 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_memory_of_a_result_is_used_again_unless_forbidden():
    faults = {}
    for value in ("1", "0"):
        run = subprocess.run(
            [sys.executable, "-c", COUNT_FAULTS],
            env=os.environ | {"MIXLAB_KEEP_MEMORY": value},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        kept, count = run.stdout.split()
        assert kept == str(value == "1")
        faults[value] = int(count)
    assert 5 * faults["1"] < faults["0"], faults


HOLES = """
import torch
from mixlab.device import current_memory_bytes, keep_memory, return_memory
keep_memory()
if {returns}: return_memory()
torch.set_num_threads(1)
pieces = [torch.ones(4 << 20) for _ in range(20)]  # 16 MiB each
before = current_memory_bytes()
del pieces[::2]
print(before - current_memory_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_memory_between_pieces_in_use_goes_back_where_it_is_asked_for():
    freed = {}
    for returns in (True, False):
        run = [sys.executable, "-c", HOLES.format(returns=returns)]
        freed[returns] = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) >> 20
    assert freed[True] > 150, freed
    assert freed[False] < 20, freed


def test_whether_bf16_is_faster_does_not_depend_on_other_programs():
    quiet = mixlab.device.is_bf16_faster()
    busy = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(busy) for _ in range(3 * mixlab.device.num_cores())]
    try:
        assert [mixlab.device.is_bf16_faster() for _ in range(3)] == [quiet] * 3
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize(
    ("supported", "seconds", "expected"),
    [(True, 0.5, True), (True, 0.9, False), (True, 1.8, False), (False, 0.5, False)],
)
def test_bf16_is_faster_only_where_a_product_takes_less_time(monkeypatch, supported, seconds, expected):
    clock = 0.0

    def linear(rows, columns):
        nonlocal clock
        clock += seconds if rows.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(mixlab.device, "multiplies_bf16", lambda: supported)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(mixlab.device.time, "thread_time", lambda: clock)
    assert mixlab.device.is_bf16_faster() is expected

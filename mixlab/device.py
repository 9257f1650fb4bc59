"""How this process uses the machine: device, threads, precision, memory. Chosen once, outside the models.

What each choice gave is in docs/results.md. The wait policy of OpenMP's threads is left as it is: to set
`GOMP_SPINCOUNT=1000` in the environment costs a little on a free machine, and helps models of timm on a busy one.
"""

import contextlib
import ctypes
import os
import time
from typing import Any

import torch

from mixlab.errors import UsageError
from mixlab.threads import one_core_each

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of glibc's malloc.h
KEPT_BYTES = 1 << 30  # free memory at the heap's end that is kept
USUAL_PIECES, USUAL_BYTES = 1 << 16, 1 << 17  # what glibc begins with
ROWS, COLUMNS = (1024, 512), (512, 512)  # of a product that is bound by arithmetic
MEASURED = 9  # times
MAX_THREADS = 512
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def num_cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; UsageError for a device that is not there.

    On CUDA fp32 is float32 from then on: cuDNN would otherwise round what convolutions multiply to TF32's 10 bits.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if name not in available:
        raise UsageError(
            f"there is no device {name!r}", where="--device", hint="choose auto, cpu, cuda or mps"
        )
    if not available[name]:
        raise UsageError(
            f"this machine or this torch has no {name} device", where="--device", hint="use --device cpu"
        )
    if name == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # for products of matrices torch does not by itself
    return torch.device(name)


def check_threads(threads: int | None) -> None:
    """UsageError for a number of threads that no machine computes with; torch would end the process."""
    if threads is not None and threads > MAX_THREADS:
        raise UsageError(
            f"{threads} threads are more than the {MAX_THREADS} that any machine computes with",
            where="--threads",
            hint="one a core is what it takes by itself",
        )


def set_threads(threads: int | None) -> int:
    """Set and return torch's number of CPU threads; None takes one a core. Also `keep_memory`."""
    check_threads(threads)
    keep_memory()
    threads = threads or num_cores()
    torch.set_num_threads(threads)
    return threads


def keep_memory() -> bool:
    """Let glibc keep the memory that tensors give back, for the next ones; whether it does.

    It would return every large piece to the kernel at once, which clears it anew for the next operation's result.
    Other C libraries are left alone, and all with MIXLAB_KEEP_MEMORY=0 in the environment.
    """
    return os.environ.get("MIXLAB_KEEP_MEMORY") != "0" and _set_allocator(0, KEPT_BYTES)


def return_memory() -> bool:
    """The opposite of `keep_memory`, where memory matters more than time: what is kept seldom has the size wanted."""
    return _set_allocator(USUAL_PIECES, USUAL_BYTES)


def _set_allocator(separate_pieces: int, kept_bytes: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    is_set = mallopt(M_MMAP_MAX, separate_pieces)
    return bool(mallopt(M_TRIM_THRESHOLD, kept_bytes) and is_set)


def autocast(device: torch.device, precision: str) -> Any:
    """A context in which matrix products run in `precision`; fp32 changes nothing. Not run on a GPU yet."""
    if precision in ("fp32", "auto"):
        return contextlib.nullcontext()
    if precision == "fp16" and device.type != "cuda":
        raise UsageError("fp16 needs a CUDA device", where="precision", hint="use bf16 or fp32")
    return torch.autocast(device.type, dtype=DTYPES[precision])


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX-512 BF16); see `is_bf16_faster`."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it
    return supported is not None and bool(supported())


def is_bf16_faster() -> bool:
    """Whether products of bfloat16 take clearly less time than float32's here, five sixths of it at most; measured.

    The instructions alone do not tell: AMD's Zen 4 takes half the time with them, an Intel Xeon of model 207 without
    its AMX tiles takes 1.8 times as long. It is a core's own time, since other programs lengthen the time of the
    clock, that of the slower kind more. 0.1 to 0.2 s, where there are such instructions.
    """
    if not multiplies_bf16():
        return False
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.inference_mode(), one_core_each():
        pairs = {
            dtype: (torch.ones(*ROWS, dtype=dtype), torch.ones(*COLUMNS, dtype=dtype)) for dtype in seconds
        }
        for _ in range(MEASURED):  # in turns; the first ones prepare the library
            for dtype, (rows, columns) in pairs.items():
                began = time.thread_time()
                torch.nn.functional.linear(rows, columns)
                seconds[dtype].append(time.thread_time() - began)
    return 1.2 * min(seconds[torch.bfloat16]) < min(seconds[torch.float32])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, for timing."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def describe_machine() -> dict[str, Any]:
    """Versions, processor and device, for environment.json and `doctor`."""
    import platform
    from importlib.metadata import version

    packages = ("mixlab", "torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "safetensors")
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {"versions": {name: _version(version, name) for name in packages}}
    facts |= {"cpu": _cpu_name(), "cores": num_cores(), "memory_bytes": memory_bytes()}
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    facts["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts["mps"] = torch.backends.mps.is_available()
    return facts


def machine_name(facts: dict[str, Any]) -> str:
    """What tables of measurements call the machine of these facts (describe_machine's, or of an environment.json)."""
    return "{cores} cores, {cpu} ({cpu_capability})".format(**facts)


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or what its container allows if that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(physical, int(file.read()))
    except (OSError, ValueError):  # no such limit: the file is missing or says "max"
        return physical


def current_memory_bytes() -> int:
    """The memory this process has now; outside Linux the most it has had."""
    return _status("VmRSS") or peak_memory_bytes()


def peak_memory_bytes() -> int:
    """The most memory this process has had so far."""
    if found := _status("VmHWM"):  # the figure of getrusage begins with the parent's
        return found
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int | None:
    """A figure in bytes of what Linux says about this process."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(key)), None)
    except OSError:
        return None


def _version(version: Any, name: str) -> str | None:
    try:
        return str(version(name))
    except Exception:  # a package may be there without metadata; doctor then says so
        return None


def _cpu_name() -> str:
    import platform
    import re

    try:
        with open("/proc/cpuinfo") as file:
            lines = file.read().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    name = facts.get("model name")
    if name and {"cpu family", "model"} <= facts.keys() and not re.search(r"\d", name):
        # Rented machines call every generation the same, though one may be twice as fast as another.
        name += f" family {facts['cpu family']} model {facts['model']}"
    return name or platform.processor() or platform.machine()

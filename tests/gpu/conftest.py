"""The device as a parameter: every test here runs on the CPU, and on a GPU where there is one.

`pytest -m gpu -k cuda` runs the second half of each.
"""

import os

import pytest
import torch

from mixlab.device import pick_device

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read when cuBLAS begins; else it may not repeat its bits

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
DEVICES = ("cpu", pytest.param("cuda", marks=NO_CUDA))


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> torch.device:
    return pick_device(request.param)


@pytest.fixture(autouse=True)
def _as_before():
    """What a test sets for its process is not left to the next."""
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()

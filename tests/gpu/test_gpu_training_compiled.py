"""torch.compile on a device; the last file of these, as it may take minutes."""

import pytest

from tests.gpu.conftest import DEVICES
from tests.gpu.test_gpu_numbers import five_steps

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), *DEVICES[1:]], indirect=True
)  # a compiler of C++ takes a minute
def test_a_compiled_training_step_is_the_eager_one(device):
    size = {"num_blocks": 2}  # each takes seconds to compile
    eager, _ = five_steps(device, "mixer_micro4", "sgd", size=size, fast=False)
    compiled, _ = five_steps(device, "mixer_micro4", "sgd", size=size, compile=True)
    assert compiled == pytest.approx(eager, abs=1e-4)

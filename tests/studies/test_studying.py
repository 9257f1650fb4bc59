"""`mixlab study`: what is refused before anything is measured."""

import pytest

from mixlab.commands.studying import study
from mixlab.errors import UsageError


def test_an_option_that_a_study_has_no_use_for_is_refused(tmp_path):
    with pytest.raises(UsageError, match="trains nothing"):
        study("filters", "mixer_cifar:cifar10", seeds=2, out=tmp_path / "out")
    with pytest.raises(UsageError, match="trains nothing"):
        study("throughput", minutes=2.0, out=tmp_path / "out")
    with pytest.raises(UsageError, match="neither data nor weights"):
        study("throughput", "digits", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

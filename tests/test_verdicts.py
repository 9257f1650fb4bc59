"""`mixlab doctor` and `mixlab check` say what to do."""

import tomllib
from pathlib import Path

from mixlab.commands.verdicts import EXTRAS, verdicts
from mixlab.report.checks import check_advice

WELL = {
    "python": "3.12", "platform": "Linux", "versions": {"torch": "2.14", "simplejpeg": "1.9"}, "cpu": "EPYC",
    "cores": 2, "threads": 2, "memory_bytes": 8 << 30, "cpu_capability": "AVX512", "cuda": "H200", "mps": False,
    "device": "cuda", "bf16_products": True, "programs_for_cores": "begin in 0.4 s",
    "memory_kept_for_tensors": True, "jpeg_decoder": "simplejpeg",
}  # fmt: skip
ILL = {
    "versions": {"torch": "2.14", "simplejpeg": None}, "memory_bytes": 1 << 30, "cpu_capability": "DEFAULT",
    "cuda": None, "device": "cpu", "bf16_products": False, "programs_for_cores": "no: the disk is full",
    "memory_kept_for_tensors": False, "jpeg_decoder": "Pillow (install simplejpeg for speed)",
}  # fmt: skip


def test_a_machine_that_is_well_needs_no_advice():
    rows = verdicts(WELL, lambda module: True)
    assert {row["verdict"] for row in rows} == {"ok"}
    assert not any(row["advice"] for row in rows)


def test_whatever_is_slow_or_missing_comes_with_what_to_do():
    rows = {row["what"]: row for row in verdicts(WELL | ILL, lambda module: module != "onnxruntime")}
    ill = {what: row["verdict"] for what, row in rows.items() if row["verdict"] != "ok"}
    assert ill == {
        "packages": "missing", "GPU": "missing", "memory": "slow", "vector instructions": "slow",
        "bfloat16": "slow", "processes for cores": "missing", "memory of tensors": "slow",
        "JPEG decoder": "slow", "extra export": "missing",
    }  # fmt: skip
    assert all(rows[what]["advice"] for what in ill)
    assert rows["packages"]["advice"] == "pip install simplejpeg"
    assert rows["extra export"]["advice"].endswith("pip install '.[export]'")
    assert set(EXTRAS) <= {what.removeprefix("extra ") for what in rows}


def test_all_extras_that_users_can_install_are_looked_at():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev", "docs"}


def test_each_finding_of_a_check_has_its_advice():
    clean = dict.fromkeys(("num_bad", "num_duplicates_within", "num_near_copies"), 0) | {
        "duplicates": [],
        "conflicts": [],
    }
    assert check_advice(clean, "sound", "sounds") == ["nothing is wrong here: `mixlab train DATA` comes next"]
    found = {
        "num_bad": 2,
        "duplicates": [1],
        "conflicts": [1],
        "num_duplicates_within": 1,
        "num_near_copies": 2,
        "cautions": ["few"],
    }
    advice = check_advice(found, "sound", "sounds")
    assert len(advice) == 6
    assert advice[3].startswith("1 sound could go")
    assert "unreadable sounds" in advice[0]
    assert advice[-1] == "few"

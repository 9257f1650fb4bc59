"""Pages that are made are what would be made now; tables of results name what is there; the site asks nobody."""

import csv
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mixlab
from benchmarks.constraints import needed
from benchmarks.pages import DOCS, PAGES, read_results, table

ROOT = DOCS.parent
COMMIT = re.compile(r"[0-9a-f]{7}( [0-9a-f]{7})*")
DATE = re.compile(r"2026-\d\d-\d\d")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_that_is_made_is_as_it_would_be_made_now(name):
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "write `make pages`"


def test_a_table_leaves_out_columns_without_a_value():
    rows = [{"a": "1", "b": "", "c": "x|y"}, {"a": "", "b": "", "c": "2"}]
    assert table(rows, {"a": "A", "b": "B", "c": "C"}) == "| A | C |\n|---|---|\n| 1 | x\\|y |\n|  | 2 |"


def test_every_accuracy_has_a_machine_and_a_commit_and_a_spread_where_there_are_three_seeds():
    machines = {row["name"] for row in read_results("machines")}
    rows = read_results("accuracy")
    assert len(rows) > 30
    for row in rows:
        assert row["machine"] in machines
        assert COMMIT.fullmatch(row["commit"])
        assert DATE.fullmatch(row["date"] or "2026-01-01")
        assert 0 < float(row["accuracy"]) < 100
        assert row["sd"] or int(row["n"]) < 3


def test_the_accuracies_of_whole_groups_are_the_means_of_their_seeds():
    # recipes.csv has a row a seed; a row of accuracy.csv that has the same commits and length says their mean.
    seeds = [row for row in read_results("recipes") if row["split"] == "test"]
    compared = 0
    for row in read_results("accuracy"):
        group = f"{'flat' if 'flat' in row['recipe'] else 'pyramid'}-{row['budget']}"
        mine = [
            seed for seed in seeds if seed["group"] == group and seed["commit"][:7] in row["commit"].split()
        ]
        if row["task"] != "cifar10" or len(mine) != int(row["n"]):
            continue
        mean = 100 * sum(float(seed["accuracy"]) for seed in mine) / len(mine)
        assert abs(mean - float(row["accuracy"])) < 0.0051, row
        compared += 1
    assert compared >= 8


def test_measures_name_a_script_that_is_there():
    rows = read_results("measures")
    assert len(rows) > 60
    names = {row["script"] for row in rows if row["script"].startswith("benchmarks.")}
    assert names
    assert [name for name in names if importlib.util.find_spec(name) is None] == []


def test_csv_files_of_results_have_as_many_cells_a_row_as_titles():
    for path in sorted((DOCS / "results").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            titles, *rows = csv.reader(file)
        assert rows
        assert {len(row) for row in rows} == {len(titles)}, path.name


def test_every_variable_of_the_environment_is_in_the_table_of_them():
    files = [path for part in ("mixlab", "tests", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    used = {
        name
        for file in files
        for name in re.findall(r"MIXLAB_[A-Z_]+[A-Z]", file.read_text(encoding="utf-8"))
    }
    listed = set(re.findall(r"^\| `(MIXLAB_[A-Z_]+)`", (DOCS / "environment.md").read_text(), re.MULTILINE))
    assert listed == used


def test_the_tested_versions_are_within_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    asked = [Requirement(text) for text in project["dependencies"]]
    assert len(asked) > 10
    for one in asked:
        assert one.specifier.contains(tested[canonicalize_name(one.name)]), one


def test_what_is_needed_is_found_through_extras_and_needs_of_needs():
    alone, serving = needed("mixlab"), needed("mixlab", ("serve",))
    assert {"torch", "numpy", "sympy"} <= set(alone)  # sympy is torch's
    assert set(serving) - set(alone) >= {"starlette", "uvicorn"}
    assert not [name for name in serving if name.startswith("nvidia-")]


def test_the_citation_has_the_version_of_the_package():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mixlab.__version__}\n" in text


@pytest.mark.parametrize(
    ("html", "is_found"),
    [
        ('<script src="https://cdn.example/x.js">', True),
        ("<img alt=a src=//example.org/a.png>", True),
        ('<link rel="stylesheet" href="https://fonts.example/css">', True),
        ("body { background: url(https://example.org/a.png) }", True),
        ('<a href="https://example.org">', False),
        ('<link rel="alternate" href="https://example.org/ko/">', False),
        ('<script src="../assets/x.js"></script>', False),
    ],
)
def test_a_page_that_asks_another_server_is_noticed(html, is_found):
    pytest.importorskip("mkdocs", reason="mixlab[docs] is not installed")
    where = importlib.util.spec_from_file_location("hooks", Path(DOCS) / "hooks.py")
    hooks = importlib.util.module_from_spec(where)
    where.loader.exec_module(hooks)
    assert bool(hooks.loads_elsewhere(html)) == is_found

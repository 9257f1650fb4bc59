# `make train` and `make test` work on a fresh clone: they make .venv with pip when it is missing.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: train test test-slow lint types api format clean

train: $(READY)
	$(BIN)/mixlab train digits

test: $(READY)
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(READY)
	$(if $(shell command -v timeout),timeout 1500) $(BIN)/pytest -n 2 -m slow

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# A page for each module, from its docstrings: build/api/index.html. pdoc sees what `mixlab` imports only when asked
# for it, so it is asked for first.
api: $(READY)
	$(BIN)/python -c "import mixlab; [getattr(mixlab, name) for name in mixlab.__all__]; from pdoc.__main__ import cli; cli()" --docformat numpy --output-directory build/api mixlab $(subst /,.,$(patsubst %.py,%,$(patsubst %/__init__.py,%,$(wildcard mixlab/*/__init__.py mixlab/[a-z]*.py))))

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Only as old as pyproject.toml: a new dependency there installs again.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mixlab needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# `make train` and `make test` work on a fresh clone: they make .venv with pip when it is missing. The first installs
# what mixlab needs to train; the others add what developing it needs.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
DEVELOP = $(VENV)/.develop

.PHONY: train test test-slow test-oldest test-newest test-edge lint types docs pages format clean

train: $(READY)
	$(BIN)/mixlab train digits

# Two processes begin with half of the tests each, so that a file, and what its tests share, is in one of them.
PYTEST = pytest -n 2 --dist worksteal

test: $(DEVELOP)
	$(BIN)/$(PYTEST) -m "not slow"

test-slow: $(DEVELOP)
	$(if $(shell command -v timeout),timeout 1500) $(BIN)/$(PYTEST) -m slow

# The oldest torch that pyproject.toml allows, and the newest there is, each in an environment of its own below build/,
# which is gigabytes: not part of .ci/run. They run a small part: training of digits and a pyramid, exports, accelerate.
EDGE = tests/cpu/test_accelerate.py tests/cpu/test_passes.py tests/cpu/test_inference.py tests/models/test_mixer.py \
	tests/models/test_pyramid.py tests/exports/test_export.py tests/training/test_fit.py tests/training/test_nonfinite.py

test-oldest:
	$(MAKE) test-edge FIRST='.[dev] torch==$(shell sed -n 's/.*"torch>=\([0-9.]*\),.*/\1/p' pyproject.toml).*'

test-newest:
	$(MAKE) test-edge FIRST='.[dev]' THEN='--upgrade torch torchvision'

test-edge:
	rm -rf build/edge && $(PYTHON) -m venv build/edge
	build/edge/bin/python -m pip install --quiet --disable-pip-version-check -e $(FIRST)
	$(if $(THEN),build/edge/bin/python -m pip install --quiet --disable-pip-version-check $(THEN))
	build/edge/bin/python -c 'import torch; print("torch", torch.__version__)'
	build/edge/bin/pytest -n 2 -p no:cacheprovider $(EDGE)
	for model in mixer_pico mixer_pyramid_micro; do \
		build/edge/bin/mixlab train digits --model.name $$model --steps 20 --run build/edge/run-$$model || exit 1; done

lint: $(DEVELOP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEVELOP)
	$(BIN)/mypy

# The documentation as a site, build/site/index.html; every link is checked (not with --quiet: then mkdocs counts no
# warnings). `make pages` writes the pages that are made.
docs: $(DEVELOP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pages: $(DEVELOP)
	$(BIN)/python -m benchmarks.pages

format: $(DEVELOP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Only as old as pyproject.toml: a new dependency there installs again.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mixlab needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $(READY)

$(DEVELOP): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	touch $(DEVELOP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

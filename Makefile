# One command each; every target makes its own environment first. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
# One process a core; a file stays in one process, for what its tests build once.
SPREAD := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo bench-load test test-all wheel-test aot aot-budgets lint types contracts format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with everything that development needs

demo: $(STAMP)  ## compress a small model and show what it costs and keeps
	@$(BIN)/ciuic demo

bench-load: $(STAMP)  ## measure how fast, and in how much memory, a checkpoint loads
	@$(BIN)/ciuic bench load

test: lint  ## format check, lint, types, import contracts, fast tests
	@echo "pytest: fast tests"
	@$(BIN)/python -m pytest $(SPREAD)

test-all: lint  ## the same with the slow tests
	@echo "pytest: all tests"
	@$(BIN)/python -m pytest -m "slow or not slow" --hypothesis-profile thorough

wheel-test: $(STAMP)  ## build the wheel, install it in a clean environment, run the demo there
	@echo "pytest: the wheel, in a clean environment (a few minutes)"
	@$(BIN)/python -m pytest -m slow tests/packaging

aot: $(STAMP)  ## compile every GPU kernel, without a GPU, with three releases of Triton, and check the machine code
	@echo "pytest: kernels compiled ahead of time (half an hour the first time)"
	@$(BIN)/python -m pytest -m "slow or not slow" tests/triton

aot-budgets: $(STAMP)  ## store what the kernels' loops cost now, print what changed
	@PYTHONPATH=.:kernels $(BIN)/python -m tests.triton.budgets

lint: $(STAMP)  ## format check, lint, types, import contracts
	@echo "ruff: format"
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run 'make format'"; exit 1; }
	@echo "ruff: lint"
	@$(BIN)/ruff check --quiet .
	@echo "mypy: types (the first run reads torch and takes a minute)"
	@$(BIN)/mypy --no-error-summary
	@echo "import-linter: layers"
	@out=$$($(BIN)/lint-imports --no-logo) || { echo "$$out"; exit 1; }

format: $(STAMP)  ## format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

clean:  ## remove the environment, builds and caches
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, at the exact release that constraints.txt names: asked for as a range, or
# together with packages that depend on it, pip may settle on another build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "setup: $(VENV) with $$($(PYTHON) --version) (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: torch"
	@$(PIP) install --constraint constraints.txt torch
	@echo "setup: everything else"
	@$(PIP) install --constraint constraints.txt --editable ".[dev,demo]"
	@touch $@

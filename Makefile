# `make demo` and `make test` make their own virtual environment; nothing else is needed before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests and the demo never ask the Hub for anything.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := true

.PHONY: help demo test check lint format types clean

help:
	@echo "make demo    train, evaluate and analyse a small MoE on this machine (about 8 minutes on 2 cores)"
	@echo "make test    the tests"
	@echo "make check   lint, format, types and the tests: what CI runs"
	@echo "make format  rewrite the sources in the house format"
	@echo "make clean   remove the virtual environment and caches (runs/ and corpus/ stay)"

# torch comes first and alone, so that where pip finds a CPU build of the pinned version nothing else decides.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy needs the package under its own name, whatever this folder is called.
types: $(STAMP)
	mkdir -p .cache/tree
	ln -sfn ../.. .cache/tree/equipoise
	MYPYPATH=.cache/tree $(BIN)/mypy -p equipoise

check: lint types test

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

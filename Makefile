# Everything a newcomer or CI runs. Needs Python 3.10 or newer, git and a compiler; the rest is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.calibfuse-installed

.PHONY: help install demo test test-fast lint format bench clean

help:
	@echo "make demo    install into $(VENV) if needed, then show plain and fused continuations side by side"
	@echo "             (make demo MODEL=FOLDER: of a model of yours)"
	@echo "make test    the whole test suite (test-fast leaves the slow tests out)"
	@echo "make lint    ruff and mypy (format rewrites the files as ruff wants them)"
	@echo "make bench   speed and memory with and without fusion"

install: $(STAMP)

# torch first, by itself: the largest download, and the one that a mirror or a CPU build most often replaces.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing calibfuse and its tools into $(VENV) (a minute or two, once)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,train,eval]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/calibfuse demo $(if $(MODEL),--model "$(MODEL)")

test: $(STAMP)
	$(BIN)/python -m pytest -m "not network"

test-fast: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/benchmark_speed.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

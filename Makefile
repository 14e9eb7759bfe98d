# make run: train the starter model on this machine. make test: the tests. Both set .venv up first.
# PYTHON=/path/to/python3.11 names an interpreter; pip's own variables (PIP_INDEX_URL, ...) work as usual.
SHELL := /bin/bash
BIN := .venv/bin
RECIPE ?= recipes/quickstart.yaml
SOAK_MINUTES ?= 15
SOAK_SEED ?=

.DELETE_ON_ERROR:
.PHONY: run test check chaos soak gpu setup lock clean

run: setup data/starter/heldout.jsonl
	@$(BIN)/covey train $(RECIPE)

# The file that is written last; make deletes it when the command is interrupted.
data/starter/heldout.jsonl: | setup
	@$(BIN)/covey starter data --out data/starter

test: setup
	@$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not ray and not gpu"

# Every role killed in every phase, case by case; then at random for SOAK_MINUTES. SOAK_SEED repeats a plan.
chaos: setup
	@$(BIN)/python -m pytest -m chaos tests/chaos

soak: setup
	@$(BIN)/python -m tests.chaos.soak --minutes $(SOAK_MINUTES) $(if $(SOAK_SEED),--seed $(SOAK_SEED))

setup:
	@./setup.sh

gpu:
	@./setup.sh gpu

# Needs uv (pip install uv). Keeps the versions that still fit; delete a lock's lines to renew them. uv does not
# read pip's settings: name PyTorch's CPU wheel index in UV_INDEX, or a folder with that wheel in UV_FIND_LINKS.
UV_COMPILE := uv pip compile pyproject.toml --quiet --extra dev --extra qlora --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --no-annotate \
	--custom-compile-command 'make lock   (what is left out of the CPU lock, and why: [tool.uv] in pyproject.toml)'

lock:
	$(UV_COMPILE) --extra cpu --output-file requirements-cpu.lock
	$(UV_COMPILE) --extra gpu --output-file requirements-gpu.lock --no-config

clean:
	rm -rf .venv .setup.log .mypy_cache .pytest_cache .ruff_cache build *.egg-info data/starter
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The project's commands. `make demo` and `make test` each do all the set-up they need.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test lowest lint format setup clean
.DEFAULT_GOAL := demo

demo: setup                 ## train four rules side by side on the embedded digits, and write a page
	$(BIN)/hbll compare digits --rules stream greedy paper bp --blocks 15 --stage 4 5 6 --epochs 15

test: setup                 ## the whole test suite
	$(BIN)/python -m pytest

lowest: .venv-lowest/.complete  ## the library's core with the lowest versions that pyproject.toml allows
	PYTHONPATH=src .venv-lowest/bin/python -m pytest tests/rules/test_contract.py tests/test_engine.py tests/test_network.py

.venv-lowest/.complete: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet $(PIP_ARGS) torch==2.11.0 "numpy==2.0.*" "safetensors==0.5.*" pytest hypothesis
	touch $@

lint: setup                 ## formatting, lint and types, as CI checks them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: .venv/.complete      ## the environment, in .venv

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable ".[cli,data,sublinear,hf]" --group dev
	touch $@

clean:
	rm -rf .venv .venv-lowest build dist .pytest_cache .ruff_cache .hypothesis

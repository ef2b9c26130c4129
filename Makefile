# The project's commands. `make demo` and `make test` each do all the set-up they need.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test lowest lint format docs dist installed setup clean
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

docs: setup                 ## the documentation, in docs/_build
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build
	@echo docs/_build/index.html

dist: setup                 ## the wheel and the source distribution, in dist
	rm -rf dist
	$(BIN)/python -m build --quiet .
	@ls -lh dist

installed: dist             ## installs the wheel alone in a fresh environment, and runs the lines of the README there
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --no-compile --constraint constraints.txt $(PIP_ARGS) dist/*.whl
	OMP_NUM_THREADS=1 .venv-wheel/bin/python .ci/installed.py README.md
	rm -rf .venv-wheel

setup: .venv/.complete      ## the environment, in .venv

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable ".[cli,data,sublinear,hf]" --group dev --group docs
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-wheel build dist docs/_build docs/results .pytest_cache .ruff_cache .hypothesis

# make demo   a first dataset with the embedded teacher      make test   the fast tests
# make check  format, lint, types, tests, docs               make test-all   slow tests too
# make chaos  what survives kills, crashes, failing disks and damage, as a table (long; a sample: tests/chaos --short)
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all check chaos format clean

demo: $(VENV)/.local
	$(BIN)/selfinstruct model pull smollm2
	$(BIN)/selfinstruct generate outputs/demo --num 10
	$(BIN)/selfinstruct show outputs/demo --rows 3
	@echo
	@echo "Load it in Python:"
	@echo "  import selfinstruct; rows = selfinstruct.load('outputs/demo')"
	@echo "  import datasets; rows = datasets.load_dataset('outputs/demo', split='train')"
	@echo "  import pandas; rows = pandas.read_parquet('outputs/demo/v1')"

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.all
	$(BIN)/selfinstruct model pull smollm2
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

chaos: $(VENV)/.dev
	$(BIN)/python tests/chaos

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One environment for all; each stamp says which extras were installed from the pyproject.toml as it is now.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; say which one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.local: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[local]'
	@touch $@

# torch first and by itself: another package would bring the largest build there is.
$(VENV)/.all: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/pip install -q '$(TORCH)'
	$(BIN)/pip install -q -e '.[dev,local,train,trl]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

# Only Python 3.11+ and make are needed; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-slow lint clean

$(VENV)/runtime: pyproject.toml requirements/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c requirements/lock.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/runtime
	$(PIP) torch==2.13.0
	$(PIP) -c requirements/lock.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/runtime
	$(BIN)/python -m x2jax.tiny.demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)

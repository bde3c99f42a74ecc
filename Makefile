PYTHON ?= python3
BIN := .venv/bin
MINUTES := 30

# Small models on few cores: more threads per process spin against each other, 5 to 100 times slower.
export OMP_NUM_THREADS := 1

.PHONY: demo test test-all chaos lint clean

.venv: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/lightning-fed fit --config configs/quickstart.yaml

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -m "not slow"

test-all: lint
	$(BIN)/pytest

chaos: .venv/installed
	$(BIN)/python benchmarks/chaos.py loop --minutes $(MINUTES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

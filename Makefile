# `make demo` and `make test` set up .venv by themselves; everything else assumes nothing either.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint format clean

demo: $(VENV)/.installed
	$(BIN)/python recipes/demo.py --output_dir outputs/demo

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 15

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow --durations 15

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info

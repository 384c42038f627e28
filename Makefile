# `make demo` and `make test` set up .venv by themselves; everything else assumes nothing either.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-wheel test-gpu docs lint format clean

demo: $(VENV)/.installed
	$(BIN)/python recipes/demo.py --output_dir outputs/demo

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 15

# DeepSpeed compiles on first use, and looks for ninja on the path.
test-slow: $(VENV)/.deepspeed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slow -rs --durations 15

# Builds a wheel, installs it into an empty environment and runs the demo and a fine-tuning there: minutes, most of them
# pip's.
test-wheel: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -rs tests/test_wheel.py

# On a machine with CUDA; it fails where there is none, and names what it skips where there is one GPU or no DeepSpeed.
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest tests/gpu -m "gpu or multi_gpu" -rs --durations 15

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --site-dir outputs/site

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

# Nothing else needs it: without it the tests that do are skipped, and listed as such.
$(VENV)/.deepspeed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --editable ".[deepspeed]" && touch $@ \
		|| echo "DeepSpeed could not be installed: what needs it is skipped."

clean:
	rm -rf $(VENV) outputs build *.egg-info

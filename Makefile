# `make demo` and `make test` set up .venv by themselves; everything else assumes nothing either. With `VENV=` nothing is
# installed and PYTHON is used as it is: `make test-gpu PYTHON=python3 VENV=`.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY := $(if $(VENV),$(VENV)/.installed)
MINUTES := 8
export TOKENIZERS_PARALLELISM := false
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test test-slow test-wheel test-gpu test-clusters test-oldest bench-gpu docs lint format clean

demo: $(READY)
	$(RUN) recipes/demo.py --output_dir outputs/demo

test: $(READY) lint
	$(RUN) -m pytest -n 2 --dist loadfile --durations 15

# DeepSpeed compiles on first use, and looks for ninja on the path.
test-slow: $(if $(VENV),$(VENV)/.deepspeed)
	PATH="$(if $(VENV),$(CURDIR)/$(VENV)/bin:)$$PATH" $(RUN) -m pytest -m slow -rs --durations 15

# Builds a wheel, installs it into an empty environment and runs the demo and a fine-tuning there: minutes, most of them
# pip's.
test-wheel: $(READY)
	$(RUN) -m pytest -m slow -rs tests/test_wheel.py

# On a machine with CUDA; it fails where there is none, and names what it skips where there is one GPU or no DeepSpeed.
test-gpu: $(READY)
	@$(RUN) -c "import sys, torch; torch.cuda.is_available() or sys.exit('no CUDA device is visible here: no GPU test was run')"
	$(RUN) -m pytest tests/gpu -m "gpu or multi_gpu" -rs --durations 15

# A real Ray and a real Slurm on this machine. What could not be installed is said at the end, as skipped and why.
test-clusters: $(if $(VENV),$(VENV)/.clusters)
	$(RUN) -m pytest tests/clusters -m clusters -rs --durations 15

# What a step costs on the card at hand, in at most MINUTES: outputs/bench-gpu/bench.json and bench.md.
bench-gpu: $(READY)
	@$(RUN) -m hf_sam.benchmark.on_gpu --minutes $(MINUTES) --output_dir outputs/bench-gpu

docs: $(READY)
	$(RUN) -m mkdocs build --strict --site-dir outputs/site

# The default tests with the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --durations 15

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/.installed: pyproject.toml constraints-cpu.txt
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
$(OLDEST)/.installed: EXTRAS := dev,vision
%/.installed: EXTRAS := dev
%/.installed:
	test -d $* || $(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet --constraint $(filter constraints-%,$^) torch
	$*/bin/python -m pip install --quiet --constraint $(filter constraints-%,$^) --editable ".[$(EXTRAS)]"
	touch $@

# Nothing else needs it: without it the tests that do are skipped, and listed as such.
$(VENV)/.deepspeed: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints-cpu.txt --editable ".[deepspeed]" && touch $@ \
		|| echo "DeepSpeed could not be installed: what needs it is skipped."

$(VENV)/.clusters: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints-cpu.txt --editable ".[ray]" \
		|| echo "Ray could not be installed: what needs it is skipped."
	$(VENV)/bin/python -m pip install --quiet --constraint constraints-cpu.txt --editable ".[slurm]" \
		|| echo "submitit could not be installed: what needs it is skipped."
	PATH="$$PATH:/usr/sbin"; (command -v slurmctld && command -v munged) >/dev/null \
		|| (command -v apt-get && test "$$(id -u)" = 0 && apt-get update --quiet && apt-get install --yes --quiet slurm-wlm munge) \
		|| echo "Slurm is missing, and installing it takes root on Debian (apt-get install slurm-wlm munge): what needs it is skipped."
	$(VENV)/bin/python -c "import ray, submitit" 2>/dev/null && touch $@ || true  # else tried again next time

clean:
	rm -rf $(VENV) $(OLDEST) outputs build *.egg-info

# The verbs of this project. Each can be interrupted and run again.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/setup.stamp
XLA_VENV := .venv-xla
XLA_STAMP := $(XLA_VENV)/setup.stamp
DEMO_FLAGS ?=
MILESTONE_FLAGS ?=
GPU_FLAGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Some containers forbid bytecode: each of the tests' processes would compile all of the package.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo milestone test check style recipe fuzz kill parity bench gpu xla xla-setup \
    lock clean

help:  ## list the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## make .venv with the versions of constraints.txt
	@:

# The stamp comes last, so what an interrupt leaves behind is completed by the next call.
# What has hashes goes first, so that torch, another build on each platform, brings none of it.
$(STAMP): constraints.txt pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer' >&2; exit 2; }
	@echo 'setup: making $(VENV), some minutes the first time' >&2
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/python -m pip install -qq --require-hashes --no-deps -r requirements-dev.txt
	@$(RUN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup  ## small files of SmolLM2-135M, next to llama.cpp's own (installs llama.cpp)
	@$(RUN)/python -m pip install -qq -c constraints.txt -e '.[demo]' || \
	    echo 'demo: llama.cpp could not be installed, PyTorch answers in its place' >&2
	@$(RUN)/qat demo $(DEMO_FLAGS)

milestone: setup  ## a new model from text to files that llama.cpp runs (installs llama.cpp)
	@$(RUN)/python -m pip install -qq -c constraints.txt -e '.[demo]' || \
	    echo 'milestone: llama.cpp could not be installed, no runtime reads the files' >&2
	@$(RUN)/python speedrun/milestone.py $(MILESTONE_FLAGS)

test: setup  ## the fast tests
	@OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto --dist loadfile

check: setup  ## lint, format, house rules
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .
	@$(RUN)/python -m pytest -q tests/test_house_rules.py

style: setup  ## mend what lint and format can mend
	@$(RUN)/ruff check --fix .
	@$(RUN)/ruff format .

recipe: setup  ## real commands on tiny models, and the slower tests
	@OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m recipe -n 2 --dist loadfile

fuzz: setup  ## N damaged files of every kind that is read (N=2000)
	@OMP_NUM_THREADS=1 FUZZ_CASES=$(N) $(RUN)/python -m pytest -m fuzz -n auto --dist worksteal tests/fuzz

kill: setup  ## N kills at random instants of every command that writes (N=5)
	@OMP_NUM_THREADS=1 KILLS=$(N) $(RUN)/python -m pytest -m kill -n auto --dist worksteal tests/kill

parity: setup  ## exported files in their runtimes (installs those)
	@$(RUN)/python -m pip install -qq -c constraints.txt -e '.[parity]'
	@$(RUN)/qat fetch smollm2 --output-dir models/smollm2-135m
	@OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m parity -n 2 --dist loadfile

bench: setup  ## the training step against plain fine-tuning, as JSON
	@$(RUN)/qat fetch smollm2 --output-dir models/smollm2-135m
	@$(RUN)/qat bench

gpu:  ## device tests and rates on a CUDA GPU, by $(PYTHON) with torch and transformers
	@$(PYTHON) speedrun/gpu.py $(GPU_FLAGS)

xla: xla-setup  ## the same commands on XLA, in a venv of its own (7 GB)
	@PJRT_DEVICE=CPU $(XLA_VENV)/bin/python -m pytest -m xla -n 2 --dist loadfile tests/xla

xla-setup: $(XLA_STAMP)
	@:

# torch_xla runs beside one release of torch, older than that of constraints.txt, and its metadata
# does not say so. All else is of the same versions; PJRT_DEVICE=CPU needs no libtpu.
$(XLA_STAMP): constraints.txt pyproject.toml
	@echo 'xla: making $(XLA_VENV), some minutes and 7 GB the first time' >&2
	@$(PYTHON) -m venv $(XLA_VENV)
	@grep -v '^torch==' constraints.txt > $(XLA_VENV)/constraints.txt
	@$(XLA_VENV)/bin/python -m pip install -qq -c $(XLA_VENV)/constraints.txt \
	    torch==2.9.0 torch_xla==2.9.0
	@$(XLA_VENV)/bin/python -m pip install -qq -c $(XLA_VENV)/constraints.txt \
	    torch==2.9.0 -e . pytest pytest-xdist
	@touch $@

# What torch brings along goes with it, without a hash.
COMPILE := uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate \
    --python-version 3.11 -c constraints.txt pyproject.toml
WITHOUT_TORCH := sed -E '/^(torch|triton|nvidia-|cuda-)/,/[^\]$$/d'

lock:  ## write requirements.txt and -dev.txt anew from constraints.txt
	@$(PYTHON) -m venv $(VENV)-lock
	@$(VENV)-lock/bin/python -m pip install -qq uv
	@$(VENV)-lock/bin/$(COMPILE) | $(WITHOUT_TORCH) > requirements.txt
	@$(VENV)-lock/bin/$(COMPILE) --extra dev | $(WITHOUT_TORCH) > requirements-dev.txt
	@rm -r $(VENV)-lock

clean:  ## remove what make and the tools made; models, caches and runs stay
	rm -rf $(VENV) $(XLA_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find qat tests scripts speedrun -name __pycache__ -type d -prune -exec rm -rf {} +

# `make` alone lists the words. Each word makes .venv and installs what it needs on its first use.
# PYTHON=/path/to/python uses that interpreter as it is, and then installs nothing.
# BASE_PYTHON is the interpreter that .venv is made with.

.DEFAULT_GOAL := help
# demo, evals, kernels and methods are also folders here, so every target is declared phony.
.PHONY: help setup eval eval-full test test-full check drift demo browser bench fmt clean

BASE_PYTHON ?= python3
# Processes that run the tests; each has one thread. Tests of a file share fixtures and mostly run in
# one process; one that has nothing left to do takes over half of what another has. 0: pytest alone.
WORKERS ?= 2
PYTEST = $(PYTHON) -m pytest -q -n $(WORKERS) --dist worksteal
TORCH := torch==2.13.0
# Not the README: ruff would take its example apart, one argument per line.
SOURCES := vlmfix tests docs examples setup.py

ifeq ($(origin PYTHON),undefined)
PYTHON := .venv/bin/python
FOR_EVAL := .venv/.vlmfix-eval
FOR_DEMO := .venv/.vlmfix-demo
FOR_DEV := .venv/.vlmfix-dev
endif

help:  ## list these words
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(FOR_DEV)  ## make .venv with everything that the tests need

eval: $(FOR_EVAL)  ## POPE and CHAIR on the bundled images and model: base, VHR and PAI, 100 images
	$(PYTHON) -m vlmfix eval pope,chair --method vhr,pai --limit 100 --threads 1

eval-full: $(FOR_EVAL)  ## POPE and CHAIR on all bundled images: base and every method that fits
	$(PYTHON) -m vlmfix eval pope,chair --method var,vhr,gift,pai,imba,ad_hh,spin,vaf --threads 1

test: $(FOR_DEV)  ## the tests of every change; five minutes on two cores
	$(PYTEST) -m "not slow and not gpu"

test-full: $(FOR_DEV)  ## every test, as .ci/run does; those for a GPU are skipped, by name, where there is none
	$(PYTEST)

# What is compared with docs/models/cells.json. A path takes a git checkout of transformers.
TRANSFORMERS ?= transformers
drift:  ## every method on every family under the newest transformers: what changed
	$(BASE_PYTHON) -m venv .venv-drift
	.venv-drift/bin/python -c "import torch" 2>/dev/null || .venv-drift/bin/python -m pip install -q "$(TORCH)"
	.venv-drift/bin/python -m pip install -q -e ".[dev]"
	.venv-drift/bin/python -m pip install -q --upgrade "$(TRANSFORMERS)"
	.venv-drift/bin/python docs/generate.py --drift

check: $(FOR_DEV)  ## lint, format and types
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy

demo: $(FOR_DEMO)  ## the demo in the browser
	$(PYTHON) -m vlmfix demo

browser:  ## install Chromium (Debian, Ubuntu), with which `make test-full` tests the demo, too
	apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core

bench: $(FOR_EVAL)  ## speed of decoding, wrapped over plain
	$(PYTHON) -m vlmfix bench

fmt: $(FOR_DEV)  ## format the code and fix what the linter can fix
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

clean:  ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

# A venv that failed half-way has a python but no pip, so pip is the proof that it is whole.
.venv/bin/pip:
	$(BASE_PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "could not make .venv; on Debian: apt install python3-venv" >&2; exit 1; }

# The tested torch goes in first: resolving it with the rest may bring another version.
.venv/.vlmfix-%: pyproject.toml | .venv/bin/pip
	$(PYTHON) -c "import torch" 2>/dev/null || $(PYTHON) -m pip install -q "$(TORCH)"
	$(PYTHON) -m pip install -q -e ".[$*]"
	@touch $@

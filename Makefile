# make demo    synthesise clips, train, evaluate, report (needs nothing but Python >= 3.11; no GPU)
# make test    the test suite
# make lint    ruff and mypy
# make docs    the documentation site, to build/site
# make gpu     GPU tests and benchmarks (kernels, training step, decoding) from the source tree, with the packages of $(PYTHON) as they are
# make lock    bring requirements.lock up to date with setup.py
# make clean   remove what these commands built, except the demo's results
#
# Everything but `make gpu` runs in .venv, which is made here. Installing again happens only when setup.py or the lock has changed.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
WORKERS ?= 2
TIMEOUT ?= 600

VENV := .venv
RUN := $(VENV)/bin/python -m
CREATED := $(VENV)/.created
# The lock holds every package of every extra; used as a constraint, it fixes the versions and each target installs what it needs.
# The folder is part of the state: an environment that was moved with its checkout is installed anew.
STATE := $(shell { pwd; cat setup.py requirements.lock; } | cksum | cut -d' ' -f1)
BASE := $(VENV)/.base-$(STATE)
TEST := $(VENV)/.test-$(STATE)
LINT := $(VENV)/.lint-$(STATE)
DOCS := $(VENV)/.docs-$(STATE)
PIP := $(RUN) pip install --disable-pip-version-check --constraint requirements.lock

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs gpu lock clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(BASE)
	@$(RUN) amd_fast.cli demo

test: $(TEST)
	@OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --timeout $(TIMEOUT)

lint: $(LINT)
	@$(RUN) ruff check .
	@$(RUN) mypy

docs: $(DOCS)
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet
	@echo "wrote build/site/index.html"

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "amd_fast needs Python 3.11 or newer; '$(PYTHON)' is missing or older. Name another one: make PYTHON=python3.12 <target>" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# setuptools comes first, from the lock, so that building needs no isolated environment with versions of its own.
$(BASE): $(CREATED)
	@$(PIP) --quiet setuptools
	@$(PIP) --no-build-isolation --editable .
	@rm -f $(VENV)/.base-* && touch $@

$(TEST): $(BASE)
	@$(PIP) --quiet --no-build-isolation --editable '.[test,dali,remote,web,adapters,peers,docs]'
	@rm -f $(VENV)/.test-* && touch $@

$(LINT): $(BASE)
	@$(PIP) --quiet --no-build-isolation --editable '.[lint]'
	@rm -f $(VENV)/.lint-* && touch $@

$(DOCS): $(BASE)
	@$(PIP) --quiet --no-build-isolation --editable '.[docs]'
	@rm -f $(VENV)/.docs-* && touch $@

gpu:
	@PYTHON='$(PYTHON)' sh benchmarks/gpu.sh

lock: $(CREATED)
	@$(RUN) pip install --quiet --disable-pip-version-check uv
	@$(RUN) uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
	    --custom-compile-command "make lock" setup.py --output-file requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

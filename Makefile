# The two commands of the README, and what developers use beside them.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# glibc gives big buffers back to the kernel after every step and faults them
# in again; a step on CPU takes less time where they are kept: docs/TRAINING.md.
export MALLOC_MMAP_THRESHOLD_ ?= 17179869184
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
export MALLOC_ARENA_MAX ?= 1

.PHONY: quickstart demo test test-all lint format docs bench bench-features \
	bench-compile bench-input bench-curves bench-prep bench-people bench-sync \
	clean help

help:  ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

quickstart: $(VENV)/.installed  ## Prepare the sample video and pretrain on it
	$(BIN)/python -m marlin_jax.train --config=configs/quickstart.py
	@echo "The environment is $(VENV); for further commands: . $(BIN)/activate"

demo: $(VENV)/.installed-demo runs/quickstart/checkpoints  ## Show the quickstart's network on your videos
	$(BIN)/python -m marlin_jax.demo

test: $(VENV)/.installed-test  ## Run the tests, but for the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/.installed-test  ## Run all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-test  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test  ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs  ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html; with its search: $(BIN)/python -m http.server -d site"

bench: $(VENV)/.installed-test  ## Training step and features against PyTorch
	$(BIN)/python -m tests.benchmarks.step
	$(BIN)/python -m tests.benchmarks.features

bench-curves: $(VENV)/.installed-test  ## Loss curves of settings that are not exact
	$(BIN)/python -m tests.benchmarks.curves

bench-features: $(VENV)/.installed-test  ## Feature extraction against PyTorch
	$(BIN)/python -m tests.benchmarks.features

bench-compile: $(VENV)/.installed-test  ## Compile time of B and L
	$(BIN)/python -m tests.benchmarks.compile

bench-input: $(VENV)/.installed-test  ## Clips per core's second, by stage
	$(BIN)/python -m tests.benchmarks.input

bench-prep: $(VENV)/.installed-test  ## Frames per core's second of data_prep
	$(BIN)/python -m tests.benchmarks.prep

bench-people: $(VENV)/.installed-test  ## Does it learn? FOOTAGE=DIR HOURS=6
	$(BIN)/python -m tests.benchmarks.people --footage=$(FOOTAGE) \
	  --hours=$(or $(HOURS),6) $(ARGS)

bench-sync: $(VENV)/.installed-test  ## Sync expert on people not seen; FOOTAGE=DIR
	$(BIN)/python -m tests.benchmarks.sync --footage=$(FOOTAGE)

clean:  ## Remove the environment, runs/ and all that was built or cached
	rm -rf $(VENV) runs build site *.egg-info .pytest_cache .ruff_cache

runs/quickstart/checkpoints:
	$(MAKE) quickstart

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "marlin_jax needs Python 3.11 or newer; found" \
	    "$$($(PYTHON) --version). Point PYTHON at one: make PYTHON=python3.12" \
	    "quickstart"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing? On Debian" \
	  "and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing the environment into $(VENV), 1.7 GB ..."
	@$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed-demo $(VENV)/.installed-docs: $(VENV)/.installed
	@echo "Installing $(subst .installed-,,$(@F)) into $(VENV) ..."
	@$(INSTALL) -e '.[$(subst .installed-,,$(@F))]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-beam.txt
	@echo "Installing test dependencies into $(VENV), some GB ..."
	@$(INSTALL) -e '.[test]'
	@$(INSTALL) --no-deps marlin-pytorch==0.3.4 syncnet-python==0.2.3
	@$(INSTALL) -r requirements-beam.txt
	@touch $@

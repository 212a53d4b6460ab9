# Each of `make demo` and `make test` does all set-up by itself; a second run only checks two time stamps.
#
# On Linux without a GPU, pip's default torch brings CUDA libraries along. To take the CPU build instead:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
OLDEST := $(VENV)-oldest
TORCH_INDEX ?=
PYTEST_ARGS ?=
# A test process for each core, each with one thread; the models are tiny.
PYTEST := $(VENV)/bin/python -m pytest -n auto --maxprocesses=4

# The parity core, which the oldest transformers is tested with too.
OLDEST_TESTS := $(addprefix tests/parity/test_,$(addsuffix .py,adapters architectures auto_classes caches \
	continuous_rows generate generate_beams generate_caches generate_inputs interop models_logits own_modules \
	quantised_checkpoints ragged seed_pages streaming_transformers trainers unseen))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-oldest lint format typecheck bench train clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## install, then write a story with the built-in model
	@$(BIN)/unspool generate "Once upon a time"

test: $(VENV)/.installed-dev  ## install, then run the tests
	$(PYTEST) -m "not full" $(PYTEST_ARGS)

test-full: $(VENV)/.installed-dev  ## all tests, the wide ones included
	$(PYTEST) $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.installed  ## the parity core with the oldest transformers, in an environment of its own
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses=4 -m "not full" $(OLDEST_TESTS)

lint: $(VENV)/.installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed-dev  ## mypy, strict
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## speed and memory beside transformers, on this machine
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/modes.py
	$(BIN)/python benchmarks/engines.py

train: $(VENV)/.installed-dev  ## train the built-in model anew
	$(BIN)/python training/train.py --out src/unspool/assets

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is asked for torch alone first, so that TORCH_INDEX serves torch and nothing else.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "unspool needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 ..."; exit 1; }
	@echo "Making $(VENV) and installing torch; the first time takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo "Installing unspool into $(VENV)."
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV)."
	@$(PIP) -e '.[dev]'
	@touch $@

# Only what differs is installed: everything else, torch above all, is the first environment's.
$(OLDEST)/.installed: constraints-oldest.txt $(VENV)/.installed-dev
	@echo "Making $(OLDEST) with the oldest transformers."
	@rm -rf $(OLDEST)
	@$(BIN)/python -m venv --without-pip $(OLDEST)
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $(OLDEST)/first.pth
	@mv $(OLDEST)/first.pth $$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')
	@$(BIN)/python -m pip --python $(OLDEST)/bin/python install --quiet --disable-pip-version-check \
		-c constraints-oldest.txt transformers
	@touch $@

# `make demo` and `make test` are all that a fresh machine needs; both build .venv from our own files first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := build/docs-venv/.ready
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-oldest portability test-gpu gpu-rehearsal check startup bench-smoke recipes faults
.PHONY: docs reference install clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; set PYTHON=...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## the main job on a CPU, without network: train, compare, merge
	$(BIN)/peftcli train quickstart --output-dir runs/demo --overwrite
	$(BIN)/peftcli generate runs/demo "Oat Milk" "Frozen Peas"
	$(BIN)/peftcli merge runs/demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not gpu and not slow'

test-slow: $(READY)  ## walks that take minutes: every value of every trainer argument
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'slow and not gpu'

portability: $(READY)  ## the numeric tests with the kernels, threads and last bits of other machines
	scripts/portability.sh

test-oldest: $(OLDEST_READY)  ## the tests on the lower bounds of pyproject.toml; several GB of CUDA libraries
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadgroup -m 'not gpu and not slow'

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	touch $(OLDEST_READY)

test-gpu: $(READY)  ## the tests of a GPU; skipped where there is none
	$(BIN)/python -m pytest -m gpu tests/gpu

gpu-rehearsal: $(READY)  ## all that scripts/gpu/prove.sh does on a GPU, on a CPU at tiny shapes
	PYTHON=$(BIN)/python scripts/gpu/prove.sh --rehearse

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config .importlinter

startup: $(READY)  ## seconds of the light commands beside bare Python
	$(BIN)/python scripts/startup.py

bench-smoke: $(READY)  ## speed against plain SFTTrainer, beside the recorded ratios
	$(BIN)/python scripts/bench/smoke.py

recipes: $(READY)  ## every shipped recipe is valid
	@for recipe in recipes/*.yaml; do $(BIN)/peftcli validate $$recipe || exit 1; done

faults: $(READY)  ## the fault matrix as real commands, and how each ended
	$(BIN)/python tests/faults

docs: $(DOCS)  ## the documentation site, in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict --quiet

$(DOCS): constraints.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install --quiet --constraint constraints.txt mkdocs-material
	touch $@

reference: $(READY)  ## the pages that are generated from code
	$(BIN)/python scripts/recipe_reference.py --write
	$(BIN)/python scripts/cli_reference.py --write
	$(BIN)/python scripts/methods_table.py --write
	$(BIN)/python scripts/bench/table.py

clean:
	rm -rf $(VENV) $(OLDEST) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Every target works on a fresh machine: the first run sets up .venv, later runs reuse it.
#
#     make demo TORCH=torch==2.11.0 PYTHON=python3.12    another torch, another Python

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-fast lint bench clean FORCE

demo: $(VENV)/built
	$(BIN)/python -m deepsim_ext demo

test: $(VENV)/built lint
	$(BIN)/python -m pytest -q

test-fast: $(VENV)/built
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Threads stay on cores of their own: left to the scheduler, two of them at times share one for a whole run.
bench: $(VENV)/built
	OMP_PROC_BIND=true OMP_PLACES=cores $(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) build deepsim_ext/_C*.so

# What was asked for, touched only when it changes, so that another TORCH or PYTHON sets up anew.
$(VENV).wish: FORCE
	@echo "$(PYTHON) $(TORCH)" | cmp -s - $@ || echo "$(PYTHON) $(TORCH)" > $@

$(VENV)/torch: $(VENV).wish
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" numpy "setuptools>=77" ninja pybind11
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[demo,bench,test]"
	touch $@

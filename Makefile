# make demo    fit eight schools with four guides, print a table, save a figure
# make test    lint, types, unit tests, docstring examples, README's Python blocks
# make test-all    the same, and the tests that take longer
#
# On Linux, plain torch from PyPI brings CUDA along.  For the small CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= 2
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal

.PHONY: demo test test-all lint clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP_INSTALL) --editable ".[plot]"
	@touch $@

$(VENV)/.test: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP_INSTALL) --editable ".[test]"
	@touch $@

demo: $(VENV)/.demo
	$(VENV)/bin/python -m pyro_flowvi demo

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) --run-long

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

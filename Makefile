# make demo    fit eight schools with four guides, print a table, save a figure
# make test    lint, types, unit tests, docstring examples, README's Python blocks
# make test-all    the same, and the tests that take longer
# make docs    the site, in docs/_build/html; make linkcheck: whether its links to elsewhere answer
# make tutorials    run the notebooks in full and write their outputs
#
# On Linux, plain torch from PyPI brings CUDA along.  For the small CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= 2
NOTEBOOKS ?=
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal
SPHINX = OMP_NUM_THREADS=1 $(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet

.PHONY: demo test test-all tutorials docs linkcheck lint clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP_INSTALL) --editable ".[plot]"
	@touch $@

$(VENV)/.test: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP_INSTALL) --editable ".[test]"
	@touch $@

$(VENV)/.docs: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP_INSTALL) --editable ".[docs]"
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
	$(MAKE) docs

docs: $(VENV)/.docs
	$(SPHINX) -b html docs docs/_build/html

linkcheck: $(VENV)/.docs
	$(SPHINX) -b linkcheck docs docs/_build/linkcheck

tutorials: $(VENV)/.test
	$(VENV)/bin/python tutorials/run.py $(NOTEBOOKS)

clean:
	rm -rf $(VENV) build docs/_build docs/api/generated docs/tutorials *.egg-info .mypy_cache .pytest_cache .ruff_cache

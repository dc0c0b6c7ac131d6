# Everything happens in .venv, which the first target to need it makes.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHONS := python3.12 python3.11 python3
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
# A name on the PATH may be a shim that fails, so each is tried.
PYTHON ?= $(shell for p in $(PYTHONS); do if $$p -c '$(IS_SUPPORTED)' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin
PYTEST_ARGS ?=

.PHONY: help setup demo test chaos lint style types imports format clean

help:  ## show this
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | column -t -s $$'\t'

setup: .venv/.demo  ## install into .venv what running needs

demo: .venv/.demo  ## convert, retrain and sample a small model on this machine
	@$(BIN)/python -m brumby.launch.demo

test: .venv/.dev  ## run the tests; PYTEST_ARGS="-k launch -x" narrows them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

chaos: .venv/.dev  ## kill, hang and damage runs 25 times; a quarter of an hour on two cores
	BRUMBY_CHAOS_RUNS=5 $(BIN)/python -m pytest -q tests/launch/test_chaos.py
	BRUMBY_PREPARE_KILLS=20 $(BIN)/python -m pytest -q tests/data/test_prepare.py -k killed

lint: style types imports  ## check style, types and who imports whom

style: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.dev
	@echo "mypy -p brumby"
	@link=$$(mktemp -d); trap 'rm -r "$$link"' EXIT; ln -s "$$PWD" "$$link/brumby"; \
	MYPYPATH="$$link" $(BIN)/mypy -p brumby

imports: .venv/.dev
	$(BIN)/lint-imports

format: .venv/.dev  ## rewrite the code in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and the caches; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -r {} +

.venv/.demo .venv/.dev: .venv/.%: pyproject.toml | .venv/bin/python
	@echo "installing open-brumby[$*] into .venv; PyTorch and DeepSpeed take a few minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "error: none of $(PYTHONS) is Python 3.11 or 3.12; make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c '$(IS_SUPPORTED)' || { echo "error: $(PYTHON) is not Python 3.11 or 3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	|| { echo "error: $(PYTHON) has no Python.h, which Triton and DeepSpeed compile against: apt-get install python3-dev" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "error: no g++, which DeepSpeed compiles with: apt-get install g++" >&2; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: no venv module: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade 'pip>=24'

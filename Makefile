# Two commands on a fresh machine with any Python from 3.11 to 3.13: `make demo` and `make test`.
# Both set up .venv first, once. `make PYTHON=python3.12 test` chooses the Python.
SHELL := bash
PYTHON ?=
BIN := .venv/bin
# The name holds the Python that was asked for, so that asking for another one sets up .venv for it.
READY := .venv/.ready$(if $(PYTHON),-$(subst /,_,$(PYTHON)))
# What ruff formats: all that people write. calib_nb/ is written by nbdev.
WRITTEN := nbs tests .ci setup.py hubconf.py
PYTEST := $(BIN)/python -m pytest tests
# Three on two cores, since some tests wait for processes that they stopped.
WORKERS := $(shell python3 -c "import os; print(min(4, (os.cpu_count() or 2) * 3 // 2))" 2>/dev/null || echo 2)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo android docs test test-slow test-browser test-android test-machines bench-gpu notebooks export readme lint format types

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

# Runs again only when what it installs has changed.
$(READY): constraints.txt settings.ini setup.py .ci/setup
	@.ci/setup $(PYTHON)
	@touch $(READY)

demo: $(READY)  ## the whole job on built-in data, in outputs/demo
	@$(BIN)/calib-nb demo

android: $(READY)  ## the demo tagger's Android app, in outputs/android
	@$(BIN)/python .ci/android.py

docs: $(READY)  ## notebooks, API and guides as a site, in outputs/docs
	@$(BIN)/python .ci/docs.py

test: $(READY)  ## every check; the log stays in outputs/test
	@mkdir -p outputs/test
	@$(BIN)/python -m compileall -q -j 0 calib_nb
	@set -o pipefail; OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" -n $(WORKERS) --dist worksteal \
	    --junitxml=outputs/test/junit.xml 2>&1 | tee outputs/test/log.txt
	@echo "== all checks passed; the log is $(CURDIR)/outputs/test/log.txt"

test-slow: $(READY)  ## the checks that take longer than a coffee
	@$(PYTEST) -m slow

test-android: $(READY)  ## the Android app from an empty cache: build, structure, its engine in a JVM
	@cache=$$(mktemp -d); trap 'rm -rf "$$cache"' EXIT; CALIB_NB_CACHE=$$cache $(BIN)/python -m pytest tests/test_android.py

test-browser: $(READY)  ## the explorers in JupyterLab and Voila, used in a real browser; pictures in outputs/browser
	@.ci/browser
	@$(BIN)/python -m pytest tests/test_browser.py -s

test-machines: $(READY)  ## the trained notebooks under other instruction sets, thread counts and seeds
	@$(BIN)/python .ci/machines.py

bench-gpu: $(READY)  ## one machine at its limit: training, observation and INT8 beside their bars, in five minutes
	@$(BIN)/python .ci/bench_gpu.py

notebooks: $(READY)  ## run the notebooks and store what they show
	@$(BIN)/python .ci/notebooks.py

export: $(READY)  ## notebooks -> calib_nb/, README.md
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python .ci/readme.py

readme: $(READY)  ## nbs/index.ipynb -> README.md
	@$(BIN)/python .ci/readme.py

lint: $(READY)  ## ruff: mistakes and formatting; changes nothing
	@$(BIN)/ruff check calib_nb $(filter-out nbs,$(WRITTEN))
	@$(BIN)/ruff format --check $(WRITTEN)

format: $(READY)  ## ruff formats notebooks, tests and scripts at 120 columns, then exports
	@$(BIN)/ruff format $(WRITTEN)
	@$(MAKE) --no-print-directory export

types: $(READY)  ## mypy over the front door, calib_nb/__init__
	@$(BIN)/mypy

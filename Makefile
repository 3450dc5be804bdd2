# Two commands on a fresh machine with Python 3.11: `make demo` and `make test`. Both set up .venv first, once.
SHELL := bash
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow notebooks export readme lint

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# The set is installed anew only when what it is made of has changed.
$(READY): constraints.txt settings.ini setup.py
	@echo "== setting up .venv from constraints.txt (about two minutes, once)"
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: install it, or say make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "$(PYTHON) is older than 3.11: say make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[torch,executorch,lab,dev]'
	@touch $(READY)

demo: $(READY)  ## the whole job on built-in data, in outputs/demo
	@$(BIN)/calib-nb demo

test: $(READY)  ## every check; the log stays in outputs/test
	@mkdir -p outputs/test
	@set -o pipefail; OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" -n auto --maxprocesses 4 --dist worksteal --junitxml=outputs/test/junit.xml 2>&1 | tee outputs/test/log.txt
	@echo "== all checks passed; the log is $(CURDIR)/outputs/test/log.txt"

test-slow: $(READY)  ## the checks that take longer than a coffee
	@$(BIN)/python -m pytest tests -m slow

export: $(READY)  ## notebooks -> calib_nb/, README.md
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python .ci/readme.py

lint: $(READY)  ## ruff over the package and the tests
	@$(BIN)/ruff check --config tests/ruff.toml calib_nb tests .ci setup.py

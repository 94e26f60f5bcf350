.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# Those of minutes; compare_methods.py trains for hours, precision.py calibrates a ResNet-50 by three methods for two targets.
BENCHMARKS := train_step data_pipeline retrieval evaluation inference embed

.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[train,dev]'
	touch $@

.PHONY: install quickstart test lint bench clean help
install: .venv/.installed  ## install pmm-edge and its tools into .venv

quickstart: install  ## train on the built-in data set, export to ONNX, prove the export
	$(BIN)/pmm train
	$(BIN)/pmm export
	$(BIN)/pmm bench

test: install  ## run the tests
	$(BIN)/pytest

lint: install  ## format check, lint, import rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: install  ## measure speed against named references
	for name in $(BENCHMARKS); do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## remove what was installed and cached here (runs/ stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .cache

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'

.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock
# Those that take minutes; compare_methods.py trains for hours.
BENCHMARKS := train_step data_pipeline retrieval evaluation inference embed gallery

.venv/.train: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[train]'
	touch $@

.venv/.dev: .venv/.train
	$(INSTALL) -e '.[train,dev,docs]'
	touch $@

.PHONY: install quickstart test lowest lint docs bench clean help
install: .venv/.dev  ## install pmm-edge and its development tools into .venv

quickstart: .venv/.train  ## train on the built-in data set, export to ONNX, verify the export
	$(BIN)/pmm train
	$(BIN)/pmm export
	$(BIN)/pmm bench

test: install  ## run the tests in two processes
	$(BIN)/pytest -n 2 --dist loadfile

lowest: install  ## test what an edge box needs with the lowest allowed versions of its packages
	tests/lowest_versions.sh $(PYTHON)

lint: install  ## check format, lint, import rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: install  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: install  ## measure speed against named references
	for name in $(BENCHMARKS); do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .cache

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'

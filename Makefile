# Everything from nothing: `make train`, `make test`, `make lint`. Needs python3 (>= 3.10), make and, for the C++ kernels, g++.
PYTHON ?= python3
# The exact versions that are installed; `make lock` writes both files. Ranges stand in pyproject.toml.
REQUIREMENTS ?= requirements/locked.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
UV := build/uv/bin/uv
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/kernels/*.inc)
RUN_DIR ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test test-all test-oldest test-latest docs lock sanitize lint format clean

train: $(VENV)/.built
	$(BIN)/dfs train --config digits_vgg7_dfs --run_dir $(RUN_DIR)

# GPU tests skip themselves where there is no GPU; `slow` ones run with `make test-all`. Without a GPU the Triton kernels
# run in its interpreter, which is chosen before Python starts.
test: $(VENV)/.built
	$(BIN)/python -m pytest -n 2 -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests/kernels

test-all: $(VENV)/.built
	$(BIN)/python -m pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels

# The suite on the oldest supported versions, and on the newest that there are today. In a copy of the tree with an
# environment of its own, because the extension is built in place.
test-oldest: build/oldest
	$(MAKE) -C $< test REQUIREMENTS=requirements/oldest.txt
test-latest: build/latest
	$(MAKE) -C $< lock
	$(MAKE) -C $< test

.PHONY: build/oldest build/latest
build/oldest build/latest:
	mkdir -p $@
	find $@ \( -name .venv -o -name build -o -name '*.egg-info' \) -prune -o -type f ! -name '*.so' -exec rm {} +
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp -p --parents -t $@

# The site in build/site: README, docs/, the measurements, and the API from its docstrings. Needs no network.
docs: $(VENV)/.built
	$(BIN)/mkdocs build --strict

# Versions for every supported Python, newest and oldest. The header of each file names the command that wrote it.
lock: $(UV)
	$(UV) pip compile --universal --python-version 3.10 --extra dev --upgrade --no-annotate \
		--output-file requirements/locked.txt pyproject.toml
	$(UV) pip compile --universal --python-version 3.10 --extra dev --upgrade --no-annotate --resolution lowest-direct \
		--constraints requirements/oldest.in --output-file requirements/oldest.txt pyproject.toml

$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip --disable-pip-version-check --quiet install uv

# The C++ kernels under the address and undefined-behaviour sanitizers, in a copy of the tree.
sanitize: $(VENV)/.built
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON="$(CURDIR)/$(BIN)/python" tests/sanitize.sh

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(VENV)/.requirements: $(REQUIREMENTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and what else $(REQUIREMENTS) names into $(VENV) (some GB, a few minutes) ..."
	$(PIP) install --requirement $(REQUIREMENTS)
	touch $@

# The extension links against the torch installed above, hence no build isolation.
$(VENV)/.built: $(VENV)/.requirements pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	@echo "Installing dfs_engine and building its extension (some minutes) ..."
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dfs_engine/*.so

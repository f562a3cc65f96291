# Everything starts from python3 >= 3.11, pip, make and git. GPU machines: make demo EXTRA=gpu
EXTRA ?= cpu
VENV ?= .venv
PYTHON ?= python3
UV_VERSION = 0.13.9
BIN = $(VENV)/bin
UV = $(BIN)/uv
STAMP = $(VENV)/.installed-$(EXTRA)

# torch's CPU build: from a folder of wheels when PIP_FIND_LINKS names one, else from PyTorch's own index
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS = $(PIP_FIND_LINKS)
else ifeq ($(EXTRA),cpu)
TORCH = --torch-backend cpu
endif

.PHONY: demo test test-slow check fix setup requirements docs clean

demo: setup
	$(BIN)/grpo run configs/demo.toml $(ARGS)

# two processes share the files of tests out; ARGS=-n0 runs them in this one
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	@echo 'Without the tests marked slow: they are run by `make test-slow`, and by .ci/run'
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

$(STAMP): requirements/$(EXTRA).txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "found Python %d.%d, expected 3.11 or newer: set PYTHON=..." % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	test -x $(UV) || $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python $(TORCH) --no-deps -r requirements/$(EXTRA).txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $(STAMP)

COMPILE = $(UV) pip compile --quiet pyproject.toml --extra dev --upgrade --python-version 3.11 --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links

requirements: setup
	$(COMPILE) --extra cpu --override requirements/overrides.txt -o requirements/cpu.txt
	env -u UV_FIND_LINKS $(COMPILE) --extra gpu --python-platform x86_64-manylinux_2_28 -o requirements/gpu.txt

docs: setup
	$(BIN)/python -m tests.datasets_doc
	$(BIN)/python -m tests.rewards_doc

clean:
	rm -rf $(VENV) runs

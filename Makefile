# labkit. `make` alone lists the targets; each sets up what it needs in .venv, once.

CONSTRAINTS ?= constraints.txt
PIP_FLAGS   ?=
TORCH_INDEX ?=
# The first of these that runs (a name on the PATH may be a pyenv shim for a version that is not there).
PYTHON      ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
                   "$$p" -c "" >/dev/null 2>&1 && { echo "$$p"; break; }; done)

BIN   := .venv/bin
STAMP := .venv/.labkit-stamp
NEWS  := .venv/share/jupyter/lab/settings/overrides.d/labkit.json

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup fetch browser lab test zoo regress bench lint format links clean

help: ## list the targets and variables
	@echo "make TARGET [VARIABLE=value ...]"
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-13s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=...        the Python that .venv is made with"
	@echo "  TORCH_INDEX=...   another package index for torch, such as PyTorch's CPU-only one on Linux"
	@echo "  CONSTRAINTS=      (empty) the newest versions instead of the pinned ones"
	@echo "  PIP_FLAGS=...     further flags for pip install"
	@echo "  REPO=owner/name   the repository on GitHub, for links"
	@echo "  LAB_FLAGS, TEST_FLAGS, REGRESS_FLAGS, BENCH_FLAGS=...   flags for that target's command"

setup: $(STAMP) ## make .venv with the pinned versions

define CHECK_PYTHON
import sys
pinned, have = "$(CONSTRAINTS)" != "", sys.version_info[:2]
need = (3, 11) if pinned else (3, 10)
if have < need:
    sys.exit("%s Python %d.%d or newer, but %s is %d.%d. Install one, or name it: make PYTHON=/path/to/python3.11" % (
        ("The pinned versions need" if pinned else "labkit needs",) + need + (sys.executable,) + have))
endef
export CHECK_PYTHON

# The stamp says where .venv was made and with which pins: a folder that was moved or other pins make it stale.
MADE := $(CURDIR) $(CONSTRAINTS)
ifneq ($(MADE),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif

# The distribution was once called labkit, as another project on PyPI is: whichever is there goes.
# A .venv that works is kept. pip's own launcher fails where the Python is gone, pip was never installed or the folder moved.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@; set -e; \
	if ! $(BIN)/pip --version >/dev/null 2>&1; then \
	    python="$(strip $(PYTHON))"; \
	    if test -z "$$python"; then \
	        echo "No python3 was found. Install Python 3.11, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	    fi; \
	    "$$python" -c "$$CHECK_PYTHON"; \
	    echo "Making .venv with $$("$$python" --version)"; \
	    "$$python" -m venv --clear .venv; \
	fi
	@if $(BIN)/python -m pip show -q labkit 2>/dev/null; then $(BIN)/python -m pip uninstall -q -y labkit; fi
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[lab,test]'
	@echo "$(MADE)" > $@

fetch: $(STAMP) ## get the model and other assets, checked and resumable
	$(BIN)/labkit fetch

# JupyterLab's question about news would cover the page at the first start.
$(NEWS): binder/overrides.json $(STAMP)
	@mkdir -p $(@D) && cp $< $@

# The whole project is in the file browser, not only the notebooks. Jupyter refuses root unless told.
lab: fetch $(NEWS) ## open the lab in JupyterLab
	@root=; if test "$$(id -u)" = 0; then root=--allow-root; fi; \
	exec $(BIN)/jupyter-lab $$root --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(LAB_FLAGS)

# The browser tests need a Chromium. Without one they are skipped and say so; CI must have it.
browser:
	@for b in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$b >/dev/null 2>&1 && exit 0; done; \
	if test "$$(id -u)" = 0; then root=; elif sudo -n true 2>/dev/null; then root="sudo -n"; else root=no; fi; \
	if test "$$root" != no && command -v apt-get >/dev/null 2>&1; then \
	    echo "Installing Debian's chromium for the browser tests"; \
	    $$root apt-get update -q && \
	    $$root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium && exit 0; \
	    why="apt-get could not install it"; \
	else \
	    why="it can be installed only with apt-get by root or through sudo"; \
	fi; \
	echo "No Chromium for the browser tests: $$why. Install chromium or google-chrome yourself and run this again." >&2; \
	if test "$$CI" = true; then exit 1; fi; \
	echo "The browser tests will be skipped." >&2

test: lint browser fetch ## check the style and run every test
	$(BIN)/python -m pytest $(TEST_FLAGS)

zoo: $(STAMP) ## check every family of models, and write docs/families.md
	$(BIN)/python tests/zoo/table.py

regress: fetch ## run every notebook and compare its numbers with the baselines
	$(BIN)/labkit regress $(REGRESS_FLAGS)

bench: fetch ## time labkit's kernels and the whole model side by side with their peers
	$(BIN)/python benchmarks/run.py $(BENCH_FLAGS)

lint: $(STAMP) ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

links: ## write the repository's address, REPO=owner/name, into badges and notebooks
	@python="$(strip $(PYTHON))"; "$${python:-python3}" labkit/links.py "$(REPO)"

clean: ## remove .venv and what tests and runs left here (the asset cache stays)
	rm -rf .venv build dist reports .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +

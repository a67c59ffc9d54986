# The environment is .venv, brought up to date whenever pyproject.toml or constraints.txt changes; no activation needed.
SHELL := /bin/bash
PYTHON ?= python3
UV ?= uv
STAMP := .venv/installed
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --durations 10
NOTEBOOKS := $(PY) -m workbench.notebooks
# Notebooks at once: two, where there are cores for it.
AT_ONCE ?= $(shell test "$$(getconf _NPROCESSORS_ONLN)" -ge 2 && echo 2 || echo 1)

# One thread a process: on models this small more threads cost more than they give, above all on a busy machine.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

# A kernel named python3 that lies elsewhere must not win over the environment's own.
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter$(if $(JUPYTER_PATH),:$(JUPYTER_PATH))

.PHONY: help env browser demo figures test test-full nbval lab notebooks lock

help:
	@echo "make demo       run every notebook on the bundled pool: copies in runs/, figures in figures/"
	@echo "make figures    a paper's figures in figures/paper, from the notebooks' stored data (VENUE=neurips for its widths)"
	@echo "make lab        open JupyterLab on the notebooks"
	@echo "make test       ruff, the tests, nbval over the notebooks' stored outputs"
	@echo "make test-full  what make test leaves out: slow tests, every notebook at three or more other sets of parameters"
	@echo "make browser    install a Chromium for make test-full, where there is none"
	@echo "make notebooks  execute the notebooks in place and store their outputs (ONLY=03 for one)"
	@echo "make lock       compile constraints.txt from pyproject.toml (needs uv)"
	@echo "make env        create or update .venv, which the others do by themselves"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@new='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(PY) -c "$$new" 2>/dev/null; then \
	  for python in "$(PYTHON)" python3.11 python3.12 python3.13 ""; do \
	    if test -n "$$python" && "$$python" -c "$$new" 2>/dev/null; then break; fi; \
	  done; \
	  if test -z "$$python"; then \
	    echo "workbench needs Python 3.11 or newer, and $(PYTHON) is not; say which one to use: make PYTHON=…" >&2; \
	    exit 1; \
	  fi; \
	  echo "creating .venv with $$python; the first time takes some minutes"; \
	  "$$python" -m venv --clear .venv; \
	fi
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev,cluster,tasks]'
	@touch $@

demo: $(STAMP)
	$(NOTEBOOKS) run --jobs $(AT_ONCE) --to runs --out figures

figures: $(STAMP)
	.venv/bin/workbench figures $(if $(VENUE),--venue $(VENUE))

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PYTEST) -m 'not slow'
	@$(MAKE) --no-print-directory nbval

test-full: $(STAMP) browser
	$(PYTEST) -m slow
	$(NOTEBOOKS) run --jobs $(AT_ONCE) --parameterised

# A Chromium for the tests that drive the controls: the one that is there, the system's package, or playwright's own. Where
# none can be had those tests are skipped and say so.
browser: $(STAMP)
	@command -v chromium chromium-browser google-chrome >/dev/null && exit 0; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  { apt-get install -qy chromium || { apt-get update -q && apt-get install -qy chromium; }; } >/dev/null 2>&1 && exit 0; \
	fi; \
	$(PY) -m playwright install chromium || echo "no chromium could be installed; tests that need it will be skipped" >&2

# On a copy, since the notebooks write their figures beside them. The copy must be pytest's root: cells of files outside
# it all have the same name, and only one notebook's would run. Its own empty settings keep pyproject's away (there
# warnings are errors).
nbval: $(STAMP)
	@if ! ls notebooks/[0-9]*.ipynb >/dev/null 2>&1; then echo "nbval: no notebooks, nothing was checked"; exit 0; fi; \
	copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && mkdir -p figures && cp -R notebooks figures "$$copy" && \
	echo '[pytest]' >"$$copy/pytest.ini" && \
	$(PY) -m pytest -c "$$copy/pytest.ini" --rootdir "$$copy" -p no:cacheprovider --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout 300 --nbval-sanitize-with tests/sanitize.cfg -n 2 --dist loadscope "$$copy"/notebooks/[0-9]*.ipynb

lab: $(STAMP)
	.venv/bin/workbench lab $(LAB)

notebooks: $(STAMP)
	@mkdir -p figures
	$(NOTEBOOKS) store $(ONLY)

lock:
	@command -v $(UV) >/dev/null || { echo "make lock needs uv (pip install uv), or make lock UV=…" >&2; exit 1; }
	$(UV) pip compile pyproject.toml --all-extras --python-version 3.11 -o constraints.txt

# All need a Linux machine with Python >= 3.10 (venv) and make; everything else they install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: test test-matrix gpu-check tables docs lint lint-ruff lint-format lint-mypy lint-imports demo dist clean
.DEFAULT_GOAL := test

# Each test uses one thread, so that tests can run in parallel: one process more than cores, since some tests wait.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $$(( $$(nproc) < 8 ? $$(nproc) + 1 : 8 )) --dist worksteal

# The oldest versions that pyproject.toml allows, on the oldest Python, and what pip takes today on each. An environment
# is made for each (6 GB, a few minutes), tested and removed: make test-matrix MATRIX=3.12-newest KEEP=1 keeps it.
MATRIX ?= 3.10-lowest 3.10-newest 3.11-newest 3.12-newest 3.13-newest
KEEP ?=

test-matrix:
	@KEEP="$(KEEP)" .ci/matrix $(MATRIX)

# All checks that need a GPU, in at most MINUTES minutes: tests, benchmarks and trainings on the left atrium, see
# benchmarks/README.md. DATA is not needed if WORK is prepared. A try without a GPU:
# make gpu-check DATA=<la_125mm> DEVICE=cpu OPTIONS="--tiny --results <folder>"
DATA ?=
WORK ?= gpu_check
MINUTES ?= 12
DEVICE ?= cuda
OPTIONS ?=

gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_check $(if $(DATA),--data "$(DATA)") --work "$(WORK)" --minutes $(MINUTES) \
	  --device $(DEVICE) $(OPTIONS)

# The tables and figures in docs and README: results of benchmarks, settings, options of commands.
tables: $(INSTALLED)
	$(BIN)/python -m docs.tables

# The documentation site in site/, without network access. Broken links and anchors are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: lint-ruff lint-format lint-mypy lint-imports

lint-ruff: $(INSTALLED)
	$(BIN)/ruff check .

lint-format: $(INSTALLED)
	$(BIN)/ruff format --check .

lint-mypy: $(INSTALLED)
	$(BIN)/mypy

# The contracts of pyproject.toml, on an unpacked wheel: only there trainers and dataset_conversion are sub-packages.
lint-imports: $(INSTALLED)
	@wheel=$$(mktemp -d) && trap 'rm -rf "$$wheel" build' EXIT && rm -rf build && \
	  $(BIN)/python -m build --wheel --no-isolation -o "$$wheel" . > "$$wheel/log" 2>&1 || { cat "$$wheel/log"; exit 1; }; \
	  $(BIN)/python -m zipfile -e "$$wheel"/*.whl "$$wheel/unpacked" && cd "$$wheel/unpacked" && \
	  NO_COLOR=1 $(abspath $(BIN))/lint-imports $(CURDIR)/pyproject.toml --no-logo --no-cache

demo: $(INSTALLED)
	$(BIN)/nnunet_dycon demo -o demo

# sdist and wheel, built from the sdist, in dist; to publish them: .venv/bin/twine upload dist/*
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --no-isolation -o dist .
	$(BIN)/python -m twine check --strict dist/*

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than Python 3.10; name another with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) lacks the venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing nnU-Net, PyTorch and nnunet-dycon into $(VENV) (about 6 GB, a few minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint,docs,release]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-*-lowest .venv-*-newest demo build dist site *.egg-info
